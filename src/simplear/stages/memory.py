"""Memory of a GPU and pace of a training, by arithmetic, before anything is bought or started.

What layers keep for the backward pass, and what it adds to that, are those of the modules of transformers' Qwen2 with
fused attention, counted on the CPU in the tests. What a GPU's allocator and libraries take on top is an assumption
(`RESERVED_GIB`). The pace is FLOPs, those of recomputed layers included, at an assumed utilisation. Drawing in rollouts
is the reading of weights and cache at an assumed share of the memory's bandwidth, but a pass takes at least what the
host needs to start its kernels (`LAYER_SECONDS`).
"""

from __future__ import annotations

from dataclasses import dataclass

from simplear.language_model import Adapter, Architecture
from simplear.stages.decoder_layers import ActivationCheckpointing

GIB = 2**30
RESERVED_GIB = 4.0
"""CUDA's context, NCCL's buffers, and what the allocator cannot use."""

SAVED_BYTES = {"bf16-mixed": (26, 8, 4, 4), "bf16-true": (16, 8, 4, 4), "32-true": (24, 16, 8, 8)}
"""Bytes that a layer which computes nothing again keeps for each token: per hidden unit, MLP unit, query unit, and key
or value unit."""
WEIGHT_BYTES = {"bf16-mixed": 4, "bf16-true": 2, "32-true": 4}
"""Of a number of the residual stream too, which is what a layer that computes again always keeps."""
COMPUTE_BYTES = {"bf16-mixed": 2, "bf16-true": 2, "32-true": 4}
LOG_SUM_EXP_BYTES = 4
"""For each head and token, of fused attention."""
WIDE = 4
"""Bytes of float32."""
LAYER_SECONDS = 0.05e-3
"""The least that a layer of the compiled engine takes in a pass of one code, on any device: the host's time. Measured
on one CPU core at 24 layers so narrow that nothing else is left: 1.2 ms a pass (beside other work up to twice that).
Starting a GPU's kernels is assumed to take as long, though in a CUDA graph it may take less."""
BANDWIDTH_UTILISATION = 0.5
"""Share of the memory's bandwidth that drawing reaches; assumed."""
MOMENTS = 2
"""Numbers that AdamW keeps for each weight."""


@dataclass(frozen=True)
class Device:
    """A GPU's data sheet.

    Args:
        name: of the GPU.
        memory_gib: as PyTorch reports it, before anything runs.
        flops: bfloat16, dense, a second.
        bandwidth: bytes a second.
    """

    name: str
    memory_gib: float
    flops: float
    bandwidth: float


A100 = Device("A100 80 GB", 79.1, 312e12, 2.039e12)
"""NVIDIA A100 80GB SXM datasheet, 2021."""
H100 = Device("H100 80 GB", 79.1, 989.4e12, 3.35e12)
"""NVIDIA H100 SXM datasheet, 2023, without sparsity."""


@dataclass(frozen=True)
class Rollouts:
    """What GRPO adds to a step.

    Args:
        group_size: images of a caption.
        batch_size: images drawn at once; None: a rank's whole rollout.
        inner_updates: optimizer steps on each rollout.
        reference_bytes: bytes of each weight of the reference on the training's device: 0 where there is no reference
            or it lives elsewhere.
        with_reference: whether log-probs under a reference are computed.
    """

    group_size: int
    batch_size: int | None
    inner_updates: int
    reference_bytes: int
    with_reference: bool


@dataclass(frozen=True)
class Run:
    """A training as far as its memory and pace depend on it.

    Args:
        architecture: of the decoder.
        codebook_size: number of codes.
        codes: of an image.
        mean_text: tokens of a prompt on average, control tokens included: for the pace.
        longest_text: the most tokens of a prompt: for the memory.
        images: in one forward and backward pass of one GPU.
        steps: training steps of the whole run.
        images_a_step: of all GPUs; of GRPO, images drawn.
        devices: number of GPUs.
        sharded: FSDP2 over all devices; else each holds everything.
        precision: a key of `SAVED_BYTES`.
        activation_checkpointing: what layers compute again.
        chunk_rows: rows of logits held at once; None holds them all.
        full_softmax: over all ids, not over the codes alone.
        rollouts: of GRPO.
        adapter: what is trained in place of all weights.
    """

    architecture: Architecture
    codebook_size: int
    codes: int
    mean_text: int
    longest_text: int
    images: int
    steps: int
    images_a_step: int
    devices: int
    sharded: bool
    precision: str
    activation_checkpointing: ActivationCheckpointing
    chunk_rows: int | None
    full_softmax: bool
    rollouts: Rollouts | None = None
    adapter: Adapter | None = None

    @property
    def trained_parameters(self) -> int:
        """What has gradients and optimizer state."""
        return self.architecture.trained_parameters(self.adapter, self.codebook_size)

    @property
    def choices(self) -> int:
        """Ids that a code is chosen among."""
        return self.architecture.vocab_size if self.full_softmax else self.codebook_size


def saved_a_token(architecture: Architecture, precision: str, mode: ActivationCheckpointing = "none") -> int:
    """Bytes that one layer keeps of one token for its backward pass."""
    narrow, layer_input = COMPUTE_BYTES[precision], WEIGHT_BYTES[precision] * architecture.hidden_size
    if mode == "full":
        return layer_input
    log_sum_exp = LOG_SUM_EXP_BYTES * architecture.num_attention_heads
    if mode == "selective":
        # Queries, keys, values; attention; what it adds to the stream; the MLP's two inner products.
        outputs = 2 * architecture.attention_width + 2 * architecture.key_value_width
        outputs += architecture.hidden_size + 2 * architecture.intermediate_size
        return layer_input + narrow * outputs + log_sum_exp
    hidden, mlp, query, key_value = SAVED_BYTES[precision]
    return (
        hidden * architecture.hidden_size
        + mlp * architecture.intermediate_size
        + query * architecture.attention_width
        + key_value * architecture.key_value_width
        + log_sum_exp
    )


def at_work_a_token(architecture: Architecture, precision: str, mode: ActivationCheckpointing = "none") -> int:
    """Bytes of one token that the backward pass holds for a while: what it computes again of a layer and the gradients
    of its MLP's inner products, or the final norm's numbers in float32, whichever is more.
    """
    again = saved_a_token(architecture, precision) - saved_a_token(architecture, precision, mode)
    gradients = 2 * COMPUTE_BYTES[precision] * architecture.intermediate_size
    return max(again + gradients, 5 * WIDE * architecture.hidden_size)


def memory(run: Run) -> dict[str, float]:
    """Bytes of one GPU at the worst moment, by purpose, without `RESERVED_GIB`."""
    shape, share = run.architecture, run.devices if run.sharded else 1
    wide, narrow = WEIGHT_BYTES[run.precision], COMPUTE_BYTES[run.precision]
    tokens = run.images * (run.longest_text + run.codes)
    mode, trained, frozen = run.activation_checkpointing, run.trained_parameters, 0
    precision, outputs = run.precision, 0
    if run.adapter is not None:
        # Frozen weights have the dtype that is computed in, so activations have it too. Their inputs are not kept, but
        # the adapter's are. Selective checkpointing keeps a layer's output, behind which the last adapter begins.
        frozen = narrow * shape.parameters
        precision = "bf16-true" if narrow != wide else precision
        outputs = narrow * shape.hidden_size if mode == "selective" else 0
    activations = tokens * (
        shape.num_hidden_layers * (saved_a_token(shape, precision, mode) + outputs)
        + at_work_a_token(shape, precision, mode)
    )
    parts: dict[str, float] = {
        "weights": (frozen + wide * trained) / share,
        "gradients": wide * trained / share,
        "optimizer": MOMENTS * wide * trained / share,
    }
    if run.devices > 1 and not run.sharded:
        parts["gradients"] *= 2  # DDP's buckets hold them once more
    working = 0.0
    if narrow != wide and not run.sharded:
        working += narrow * trained  # autocast's copies, until the backward pass has used them
    if run.sharded:
        # Gathered: embedding and head, and two layers, the one at work and the one that is fetched meanwhile. And a
        # layer's gradients, as they are made and as they are added up.
        working += narrow * (shape.root_parameters + 2 * shape.parameters_a_layer)
        working += (narrow + wide) * shape.parameters_a_layer
    parts["working copies of weights"] = working
    if run.rollouts is not None:
        rollouts = run.rollouts
        parts["weights to draw with"] = narrow * (shape.parameters + run.codebook_size * shape.hidden_size)
        parts["reference"] = rollouts.reference_bytes * shape.parameters / share
        a_rank = run.images_a_step // run.devices
        at_once = min(rollouts.batch_size or a_rank, a_rank)
        # Prompts are read in memory of their own. Both are kept for the next rollout, so updates find them there.
        cached = at_once * (run.longest_text + run.codes) + -(-at_once // rollouts.group_size) * run.longest_text
        parts["KV cache"] = narrow * shape.key_value_numbers(cached)
    parts["activations"] = activations
    parts["logits"] = logits_bytes(run)
    return parts


def logits_bytes(run: Run) -> float:
    """Bytes of the head's loss. In chunks: logits of some rows, the head's rows in autocast's dtype, its gradient."""
    narrow = COMPUTE_BYTES[run.precision]
    rows = run.images * run.codes
    if run.chunk_rows is not None and run.chunk_rows < rows:
        a_logit = narrow + WIDE + (narrow if narrow != WIDE else 0)
        head = run.choices * run.architecture.hidden_size * narrow
        trained = run.architecture.vocab_size
        if run.adapter is not None:
            trained = run.choices if run.adapter.code_rows else 0
        gradient = trained * run.architecture.hidden_size * WIDE
        return run.chunk_rows * run.choices * a_logit + head + gradient
    # Logits as computed, in float32, their log-probabilities, and the gradients of both.
    return rows * run.choices * (2 * narrow + 3 * WIDE)


def flops_a_step(run: Run) -> float:
    """FLOPs that the model needs, over all GPUs; recomputed layers are not counted."""
    length = run.mean_text + run.codes
    shape, choices = run.architecture, run.codes * run.choices
    training = run.images_a_step * shape.training_flops(length, length * length, choices, run.adapter)
    if run.rollouts is None:
        return training
    updates = run.rollouts.inner_updates
    forward = run.images_a_step * (shape.layer_flops(length, length * length) + shape.head_flops(choices))
    return updates * training + (run.rollouts.with_reference + (updates > 1)) * forward


def recomputed_flops_a_step(run: Run) -> float:
    """FLOPs on top of these under full activation checkpointing, over all GPUs; selective repeats no product."""
    if run.activation_checkpointing != "full":
        return 0.0
    length, updates = run.mean_text + run.codes, 1 if run.rollouts is None else run.rollouts.inner_updates
    return updates * run.images_a_step * run.architecture.recomputed_flops(length, length * length, run.adapter)


def drawing_seconds(run: Run, device: Device) -> float:
    """Of a rollout: every code takes a pass, which reads the weights and the cache as far as it has grown, or waits for
    the host, whichever takes longer.
    """
    if run.rollouts is None:
        return 0.0
    a_rank = run.images_a_step // run.devices
    at_once = min(run.rollouts.batch_size or a_rank, a_rank)
    shape, narrow = run.architecture, COMPUTE_BYTES[run.precision]
    weights = narrow * (shape.num_hidden_layers * shape.parameters_a_layer + run.codebook_size * shape.hidden_size)
    cache = narrow * at_once * shape.key_value_numbers(run.mean_text + run.codes // 2)
    host = shape.num_hidden_layers * LAYER_SECONDS
    passes = run.codes * -(-a_rank // at_once)
    return passes * max(host, (weights + cache) / (device.bandwidth * BANDWIDTH_UTILISATION))


def seconds_a_step(run: Run, device: Device, mfu: float) -> float:
    """One training step: arithmetic of the updates at an MFU, and the drawing of a rollout."""
    flops = flops_a_step(run) + recomputed_flops_a_step(run)
    return flops / (run.devices * device.flops * mfu) + drawing_seconds(run, device)
