"""At the sizes of the paper on a GPU that computes nothing: devices, waiting for values, and memory.

What no test without a GPU shows otherwise: that a pass and a training step keep to one device, read no value back but
those that are stated here, and take the memory that a plan says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from pretended_gpu import GPU, PretendedGPU, autocast_on_gpu, backward
from simplear.generation import FusedEngine, SamplingSettings
from simplear.generation.decoder_step import attention_by_length
from simplear.generation.engine import DrawRequest
from simplear.generation.fused import DecodeState
from simplear.language_model import Architecture, LanguageModel, LanguageModelConfig
from simplear.sequence import TokenLayout, training_batch
from simplear.stages import GRPOModule, PretrainModule, SFTModule
from simplear.stages.grpo import Rollout
from simplear.stages.memory import Run, memory
from simplear.stages.next_token import NextTokenModule, NextTokenObjective

LAYOUT = TokenLayout(151_665, 151_667, 151_672, 64_000)
"""Of Qwen2.5's tokenizer with the seven special tokens, and Cosmos DV8x16x16."""
GRID, CODES = (64, 64), 4096
SAMPLING = SamplingSettings(guidance_scale=6.0, top_k=64_000)
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
NUMBERS_A_CODE = 10
"""float64 numbers a code of the codebook while one is drawn: log-weights of both rows, probabilities, hashes."""
LAYERS = 6
"""Where more would only take longer."""


def language_model(size: str, dtype: torch.dtype, **changes: Any) -> LanguageModel:
    """Of a size of configs/paper, on the GPU. Only within a `PretendedGPU`."""
    content = yaml.safe_load(Path(f"configs/paper/{size}.yaml").read_text())
    architecture = content["run"]["architecture"] | changes
    config = LanguageModelConfig("", LAYOUT.codebook_size, architecture=architecture)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return LanguageModel(config.random_decoder(LAYOUT.vocab_size), LAYOUT)
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def gpu() -> Iterator[PretendedGPU]:
    made = PretendedGPU()
    with made.active():
        yield made


def prefilled(engine: FusedEngine, images: int, grid: tuple[int, int] = GRID) -> DecodeState:
    engine.refresh()
    prompts = [torch.arange(40 - row) for row in range(images)]
    request = DrawRequest(prompts, [torch.arange(2)] * images, grid, SAMPLING, range(images), None, None)
    return engine.prefill(request)[0]


@pytest.mark.parametrize(("size", "images", "layers"), [("0.5b", 1, 24), ("1.5b", 32, LAYERS)])
def test_a_pass_of_a_drawing_waits_for_nothing_and_leaves_nothing(
    gpu: PretendedGPU, size: str, images: int, layers: int
) -> None:
    model = language_model(size, torch.bfloat16, num_hidden_layers=layers).eval()
    engine = FusedEngine(model)
    with torch.inference_mode():
        state = prefilled(engine, images)
        capacity = state.visible
        architecture = Architecture.of(model.decoder.config)
        cache = sum(layer.untyped_storage().nbytes() for layer in state.cache.layers)
        assert capacity >= 40 + CODES and cache == 2 * architecture.key_value_numbers(2 * images * capacity)
        assert {tensor.device for tensor in (*state.buffers(), *state.step.buffers())} == {GPU}
        for visible in (41, capacity):
            state.visible = visible
            before = gpu.restart()
            state.advance()
            assert not gpu.transfers and gpu.alive() == before
            # What a draw takes, and for two rows an image the widest of what passes through a layer.
            width = 2 * (3 * architecture.intermediate_size + 8 * architecture.hidden_size + 20 * capacity)
            assert gpu.peak - before < images * (8 * NUMBERS_A_CODE * LAYOUT.codebook_size + 2 * 2 * width)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_travels_between_the_devices_does_not_depend_on_the_codes(gpu: PretendedGPU, dtype: torch.dtype) -> None:
    """A whole drawing, of two layers; the first refreshes the step."""
    engine, found = FusedEngine(language_model("0.5b", dtype, num_hidden_layers=2).eval()), []
    for grid in ((1, 1), (1, 2), (3, 5)):
        gpu.restart()
        codes, stats = engine.generate([torch.arange(5)] * 2, [torch.arange(2)] * 2, grid, SAMPLING, [0, 1])
        assert codes.device == GPU and codes.shape == (2, *grid) and stats.steps == grid[0] * grid[1]
        found.append(dict(gpu.transfers))
    assert found[1] == found[2] and "to the CPU" not in found[1]


def reading(state: DecodeState) -> None:
    if int(state.final_counts.min()) < state.count:
        state.advance()


def from_the_cpu(state: DecodeState) -> None:
    state.canvas.add_(torch.arange(state.canvas.shape[1]))
    state.advance()


def over_the_cpu(state: DecodeState) -> None:
    state.final_counts.copy_(state.final_counts.cpu())


def branching(state: DecodeState) -> None:
    state.canvas[state.canvas < 0] += 1
    state.fixed_codes[state.canvas.nonzero()[0]]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (reading, DataDependentOutputException),
        (from_the_cpu, RuntimeError),
        (over_the_cpu, None),
        (branching, torch._subclasses.fake_tensor.DynamicOutputShapeException),
    ],
)
def test_wrong_passes_are_found(gpu: PretendedGPU, wrong: Callable[[DecodeState], None], error: Any) -> None:
    engine = FusedEngine(language_model("0.5b", torch.bfloat16, num_hidden_layers=1).eval())
    with torch.inference_mode():
        state = prefilled(engine, 2, (2, 2))
        gpu.restart()
        if error is None:
            wrong(state)
            assert gpu.transfers == {"to the CPU": 1, "to the GPU": 1}
        else:
            with pytest.raises(error):
                wrong(state)


def training_run(model: LanguageModel, images: int, codes: int, text: int, chunk_rows: int | None) -> Run:
    """As `simplear plan` sees one step on one GPU."""
    return Run(
        architecture=Architecture.of(model.decoder.config),
        codebook_size=LAYOUT.codebook_size,
        codes=codes,
        mean_text=text,
        longest_text=text,
        images=images,
        steps=1,
        images_a_step=images,
        devices=1,
        sharded=False,
        precision="bf16-mixed",
        activation_checkpointing="none",
        chunk_rows=chunk_rows,
        full_softmax=False,
    )


def on_gpu(module: Any) -> Any:
    """A stage whose model lies on the GPU, and which logs nothing."""
    module._device = GPU
    module.log_dict = module.log = lambda *arguments, **options: None
    module.configure_model()
    return module


def sequences(captions: list[int], codes: Tensor) -> dict[str, Tensor]:
    """A training batch on the GPU."""
    batch = training_batch([[7] * count for count in captions], codes, LAYOUT)
    return {**{name: tensor.to(GPU) for name, tensor in batch.items()}, "codes": codes.to(GPU)}


@pytest.mark.parametrize(("stage", "size", "side", "images"), [("pretrain", "1.5b", 32, 8), ("sft", "0.5b", 64, 2)])
def test_a_training_step_reads_two_masks_and_takes_the_memory_of_its_plan(
    gpu: PretendedGPU, stage: str, size: str, side: int, images: int
) -> None:
    """In bf16-mixed, packed, with the loss in chunks, as configs/paper has it; the captions are of several lengths."""
    captions, codes = [100 - number for number in range(images)], side * side
    model = language_model(size, torch.float32, num_hidden_layers=LAYERS)
    options = {"objective": NextTokenObjective(chunk_rows=512), "packed": True}
    module: NextTokenModule = PretrainModule({}, **options) if stage == "pretrain" else SFTModule("", **options)
    module.load_language_model = lambda: (model, None)  # type: ignore[method-assign, assignment, return-value]
    on_gpu(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    batch = sequences(captions, torch.zeros(images, side, side, dtype=torch.long))
    for weight in module.parameters():  # a first step, which makes the optimizer's moments
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    # The places of all tokens but padding, and of all codes; in the backward pass whether the loss is a mean.
    gpu.nonzero, gpu.truths = [sum(captions) + images * (codes + 2), images * codes], [True]
    gpu.restart()
    with autocast_on_gpu():
        loss = module.training_step(batch, 0)
    backward(loss)
    assert not gpu.nonzero and not gpu.truths
    optimizer.step()
    assert not gpu.transfers and loss.device == GPU and loss.dtype == torch.float32
    planned = sum(memory(training_run(model, images, codes, captions[0] + 2, 512)).values())
    assert 0.85 * planned < gpu.peak < 1.02 * planned


def test_an_update_of_grpo_reads_two_values_a_pass_and_the_norm(gpu: PretendedGPU) -> None:
    """Reference, policy, objective and optimizer, on 4 images in micro-batches of 2.

    Left out: putting prompts and codes into one batch, which happens on the CPU by way of lists.
    """
    images, captions, codes = 4, [90, 90, 80, 80], GRID[0] * GRID[1]
    model = language_model("0.5b", torch.float32, num_hidden_layers=LAYERS)
    module = GRPOModule("", lambda *_: None, micro_batch_size=2, grid=GRID, chunk_rows=512, packed=True)  # type: ignore[arg-type]
    module.load_language_model = lambda: (model, None)  # type: ignore[method-assign, assignment, return-value]
    on_gpu(module)
    assert module._reference is not None
    module._reference.device = GPU
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)
    module.optimizers = lambda: optimizer  # type: ignore[method-assign, assignment, return-value]
    module.manual_backward = backward  # type: ignore[method-assign, assignment]
    module._trainer = SimpleNamespace(strategy=None)  # type: ignore[assignment]
    drawn = torch.zeros(images, *GRID, dtype=torch.long)
    parts = {2 * part: sequences(captions[2 * part :][:2], drawn[:2])["input_ids"] for part in (0, 1)}
    order = iter(parts.values())
    module._sequences = lambda prompts, codes: next(order)  # type: ignore[method-assign]
    prompts = [torch.arange(count) for count in captions]
    scores = torch.zeros(images, device=GPU)
    rollout = Rollout(["a", "a", "b", "b"], prompts, drawn.to(GPU), torch.empty(0), scores, {})
    packed = [sum(captions[part : part + 2]) + 2 * (codes + 2) for part in (0, 2)]
    # In each pass where the tokens are, and whether an id lies outside the codebook; then whether the norm is finite.
    gpu.nonzero, gpu.truths = [*packed, *packed], [False] * 4 + [True]
    gpu.restart()
    with autocast_on_gpu():
        module._update(rollout, scores)
    assert not gpu.nonzero and not gpu.truths
    assert not gpu.transfers
    assert {weight.device for state in optimizer.state.values() for weight in state.values()} == {GPU}


def test_the_backward_pass_is_torchs() -> None:
    """Which cannot run here on what it takes for a GPU's tensors."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.GELU(), torch.nn.Linear(8, 8))
    x = torch.randn(5, 4)

    def loss() -> Tensor:
        left, right = layers(x).chunk(2, dim=-1)
        return (layers[3](torch.cat([left * right, right + left], dim=-1)) * left.repeat(1, 2)).square().mean()

    loss().backward()
    expected = [weight.grad.clone() for weight in layers.parameters()]
    layers.zero_grad()
    backward(loss())
    for weight, gradient in zip(layers.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)


def test_attention_by_length(gpu: PretendedGPU) -> None:
    attention: Any = attention_by_length(GPU, torch.bfloat16)
    if attention is None:
        pytest.skip("varlen_attn of PyTorch 2.11 reads no caches")
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": GPU}
    tokens, lengths = torch.empty(4 * 100, 4, 64, **options), torch.ones(5, dtype=torch.int32, device=GPU)
    for new, window in ((1, (-1, -1)), (5, (-1, 0))):
        attended = attention(
            torch.empty(4 * new, 14, 64, **options),
            tokens.narrow(1, 0, 2),
            tokens.narrow(1, 2, 2),
            lengths,
            lengths,
            new,
            100,
            window_size=window,
            enable_gqa=True,
            seqused_k=lengths[:4],
        )
        assert attended.shape == (4 * new, 14, 64) and attended.device == GPU
    assert (
        attention_by_length(GPU, torch.float32) is None and attention_by_length(torch.device("cpu"), torch.half) is None
    )
