"""Memory by arithmetic is what real modules keep; what a knob changes follows from its definition."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

from simplear.language_model import Adapter, Architecture, add_adapter
from simplear.stages.decoder_layers import MODES, ActivationCheckpointing, checkpoint_activations
from simplear.stages.memory import (
    A100,
    BANDWIDTH_UTILISATION,
    GIB,
    H100,
    LAYER_SECONDS,
    SAVED_BYTES,
    Rollouts,
    Run,
    at_work_a_token,
    drawing_seconds,
    flops_a_step,
    memory,
    saved_a_token,
)
from simplear.stages.memory import seconds_a_step as seconds

BATCH, LENGTH = 3, 51  # a product that is no side of a weight


class Alive(TorchDispatchMode):
    """Counts the bytes of what operations made and something still holds: autograd, a checkpoint, or the result."""

    def __init__(self, but: Iterable[Tensor]) -> None:
        super().__init__()
        self.sizes: dict[Any, int] = {}
        self.peak = 0
        self.but = {StorageWeakRef(tensor.untyped_storage()) for tensor in but}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        made = operation(*arguments, **(keywords or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.sizes[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, self.count())
        return made

    def count(self) -> int:
        return sum(size for storage, size in self.sizes.items() if storage not in self.but and not storage.expired())


def config_of(sides: tuple[int, ...], layers: int) -> Qwen2Config:
    hidden, mlp, heads, key_values, width = sides
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_values,
        head_dim=width,
        vocab_size=64,
    )


def kept_and_added(
    config: Qwen2Config, precision: str, mode: ActivationCheckpointing, length: int, adapter: Adapter | None = None
) -> list[float]:
    """Bytes a token that a forward pass leaves behind, and the most that the backward pass adds to them; weights, their
    casts and their gradients left out.
    """
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).train()
    if adapter is not None:
        whole: Any = SimpleNamespace(decoder=model, parameters=model.parameters)
        add_adapter(whole, adapter, torch.bfloat16 if precision == "bf16-mixed" else None)
    checkpoint_activations(model, mode, None if adapter is None else adapter.r)
    if precision == "bf16-true":
        model.bfloat16()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    mixed = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
    alive = Alive(
        but=[tensor for weight in model.parameters() for tensor in (weight, weight.grad) if tensor is not None]
    )
    with alive:
        with mixed:
            result = model.model(
                input_ids=torch.randint(0, 64, (BATCH, length)),
                position_ids=torch.arange(length)[None],
                attention_mask={"full_attention": None},
                use_cache=False,
            ).last_hidden_state
        found = alive.count()
        alive.peak = 0
        result.backward(torch.ones_like(result))
    casts = precision == "bf16-mixed" and mode == "none"  # else they are made again in the backward pass
    weights = sum(
        weight.numel()
        for weight in model.model.layers.parameters()
        if weight.dim() == 2 and weight.dtype == torch.float32
    )
    return [size / (BATCH * length) for size in (found - 2 * weights * casts, alive.peak - found)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", SAVED_BYTES)
@pytest.mark.parametrize("sides", [(96, 200, 4, 2, 32), (192, 400, 6, 3, 16), (64, 304, 8, 1, 24)])
def test_a_layer_keeps_what_arithmetic_says(
    precision: str, sides: tuple[int, ...], mode: ActivationCheckpointing
) -> None:
    """To the byte where layers compute again, else to half a percent: the norms' few numbers a token are left out."""
    three, two = (kept_and_added(config_of(sides, layers), precision, mode, LENGTH)[0] for layers in (3, 2))
    tolerance = 5e-3 if mode == "none" else 0.0
    expected = saved_a_token(Architecture.of(config_of(sides, 1)), precision, mode)
    assert expected == pytest.approx(three - two, rel=tolerance, abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 5e-3), ("bf16-true", 0.11), ("bf16-mixed", 0.11)])
@pytest.mark.parametrize("sides", [(96, 400, 3, 1, 32), (128, 704, 2, 2, 64)])
def test_a_backward_pass_adds_what_arithmetic_says(
    precision: str, tolerance: float, sides: tuple[int, ...], mode: ActivationCheckpointing
) -> None:
    """In bfloat16 less is alive at once than the sum says, or a cast of a weight more."""
    expected = at_work_a_token(Architecture.of(config_of(sides, 1)), precision, mode)
    added = kept_and_added(config_of(sides, 2), precision, mode, 20 * LENGTH)[1]
    assert expected == pytest.approx(added, rel=tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", SAVED_BYTES)
def test_beside_frozen_weights_activations_are_in_the_dtype_that_is_computed_in(
    precision: str, mode: ActivationCheckpointing
) -> None:
    """With an adapter arithmetic is never below what is kept, and at most a seventh above."""
    sides = (192, 400, 6, 3, 16)
    adapter = Adapter(r=4)
    three, two = (kept_and_added(config_of(sides, layers), precision, mode, LENGTH, adapter)[0] for layers in (3, 2))
    run = Run(Architecture.of(config_of(sides, 1)), 8, 1, 1, 0, 1, 1, 1, 1, False, precision, mode, None, False)
    runs = [replace(run, architecture=Architecture.of(config_of(sides, n)), adapter=adapter) for n in (2, 1)]
    kept = memory(runs[0])["activations"] - memory(runs[1])["activations"]
    assert (1 - 1e-9) * (three - two) <= kept <= 8 / 7 * (three - two)
    if mode != "none":
        assert kept == pytest.approx(three - two)
    added = kept_and_added(config_of(sides, 2), precision, mode, 20 * LENGTH, adapter)[1]
    assert memory(runs[1])["activations"] - kept == pytest.approx(added, rel=0.2)


@pytest.fixture
def run() -> Run:
    """The paper's 1.5B model at 1024 px on one GPU."""
    shape = Architecture(1536, 8960, 28, 12, 2, 128, 215_672, True)
    return Run(shape, 64_000, 4096, 100, 514, 8, 1000, 256, 1, False, "bf16-mixed", "none", 512, False)


def test_static_memory_is_sixteen_bytes_a_parameter(run: Run) -> None:
    parts = memory(run)
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == 16 * 1_641_612_800
    sharded = memory(replace(run, devices=32, sharded=True))
    for name in ("weights", "gradients", "optimizer"):
        assert sharded[name] == parts[name] / 32
    assert memory(replace(run, devices=32))["optimizer"] == parts["optimizer"], "DDP shards nothing"


@pytest.mark.parametrize(
    ("adapter", "tied", "rows"),
    [(Adapter(), True, 0), (Adapter(code_rows=True), True, 1), (Adapter(code_rows=True), False, 2)],
)
def test_an_adapter_alone_has_gradients_and_moments(run: Run, adapter: Adapter, tied: bool, rows: int) -> None:
    run = replace(run, architecture=replace(run.architecture, tie_word_embeddings=tied), adapter=adapter)
    stream, inner, keys = 1536, 8960, 256
    beside = 16 * 28 * (4 * stream + 2 * (stream + keys) + 3 * (stream + inner))
    trained = beside + rows * 64_000 * stream
    assert run.trained_parameters == trained
    parts = memory(run)
    assert parts["gradients"] == 4 * trained and parts["optimizer"] == 8 * trained
    assert parts["weights"] == 2 * run.architecture.parameters + 4 * trained
    assert (parts["logits"] > memory(replace(run, adapter=Adapter()))["logits"]) == adapter.code_rows


def test_the_paper_needs_checkpointing_at_1024_px(run: Run) -> None:
    plain = sum(memory(replace(run, devices=32, sharded=True)).values()) / GIB
    selective, full = (
        sum(memory(replace(run, devices=32, sharded=True, activation_checkpointing=mode)).values()) / GIB
        for mode in ("selective", "full")
    )
    assert plain > A100.memory_gib > selective > full


def test_what_each_knob_saves(run: Run) -> None:
    def total(**changes: Any) -> float:
        return sum(memory(replace(run, **changes)).values())

    assert total(images=4) < total()
    assert total(chunk_rows=None) > 2 * total(chunk_rows=512) - total(chunk_rows=1)
    assert total(precision="bf16-true") < total() < total(precision="32-true")
    assert total(chunk_rows=None) - total(chunk_rows=None, images=4) > 4 * 4096 * 64_000 * 8, "logits are in float32"


@pytest.fixture
def rollouts(run: Run) -> Run:
    """GRPO of that model: four images at once on each of seven GPUs."""
    drawing = Rollouts(4, None, 1, 2, True)
    return replace(run, images=1, images_a_step=28, devices=7, activation_checkpointing="full", rollouts=drawing)


def test_rollouts_keep_weights_and_caches_beside_the_update(rollouts: Run) -> None:
    parts, shape = memory(rollouts), rollouts.architecture
    assert parts["reference"] == 2 * shape.parameters
    assert parts["weights to draw with"] == 2 * (shape.parameters + 64_000 * 1536), "the head is a copy of its own"
    # Four images of a caption that is read once.
    assert parts["KV cache"] == 2 * 28 * 2 * 2 * 128 * (4 * (514 + 4096) + 514)
    assert parts["activations"] == memory(replace(rollouts, rollouts=None))["activations"]


def test_ddp_holds_its_gradients_twice(run: Run) -> None:
    alone, together = memory(run), memory(replace(run, devices=8, images_a_step=64))
    assert together["gradients"] == 2 * alone["gradients"]


@pytest.mark.parametrize(("images", "layers"), [(4, 28), (4000, 28), (4, 300)])
def test_a_pass_waits_for_the_memory_or_for_the_host(rollouts: Run, images: int, layers: int) -> None:
    """Whichever takes longer: with many images the cache that is read, with narrow layers the host."""
    assert rollouts.rollouts is not None
    narrow = {} if layers == 28 else {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": layers}
    drawing = replace(rollouts, images_a_step=7 * images, architecture=replace(rollouts.architecture, **narrow))
    shape = drawing.architecture
    weights = 2 * (layers * shape.parameters_a_layer + 64_000 * shape.hidden_size)
    cache = 2 * images * (layers * 2 * 2 * 128) * (100 + 4096 // 2)
    read, host = (weights + cache) / (BANDWIDTH_UTILISATION * 2.039e12), layers * LAYER_SECONDS
    assert drawing_seconds(drawing, A100) == pytest.approx(4096 * max(read, host))
    assert (read > host) == (layers == 28)
    # As many passes in each of the parts that are drawn one after another, which read smaller caches.
    halves = replace(drawing, rollouts=replace(rollouts.rollouts, batch_size=images // 2))
    assert drawing_seconds(halves, A100) > drawing_seconds(drawing, A100)


@pytest.mark.parametrize("updates", [1, 3])
def test_pace_counts_what_is_computed_again(rollouts: Run, updates: int) -> None:
    """With full checkpointing alone, and in every inner update: of each layer all products but the last."""
    assert rollouts.rollouts is not None
    full = replace(rollouts, rollouts=replace(rollouts.rollouts, inner_updates=updates))
    none, selective = (replace(full, activation_checkpointing=mode) for mode in ("none", "selective"))
    assert seconds(none, A100, 0.4) == seconds(selective, A100, 0.4)
    tokens = 100 + 4096
    forward = full.architecture.layer_flops(tokens, tokens * tokens)
    again = 28 * updates * (forward - 2 * 28 * 1536 * 8960 * tokens)
    added = seconds(full, A100, 0.4) - seconds(none, A100, 0.4)
    assert added == pytest.approx(again / (7 * 0.4 * 312e12))


def test_pace(run: Run) -> None:
    one, eight = (seconds(replace(run, devices=devices), A100, 0.4) for devices in (1, 8))
    assert one == pytest.approx(8 * eight) == pytest.approx(flops_a_step(run) / (0.4 * 312e12))
    assert seconds(run, H100, 0.4) < one
    # Six FLOPs a weight and token is the rule of thumb; attention at 4,196 tokens and a smaller head move it little.
    rule = 6 * run.architecture.parameters * 256 * (4096 + 100)
    assert 0.8 < flops_a_step(run) / rule < 1.6
