"""A training step against the same step done the plain way, optimisation by optimisation, at the paper's 0.5B shape.

The model is configs/paper/0.5b.yaml in float32 with its vocabulary of 151,672 text ids and 64,000 codes; the batch is
images of 32 x 32 codes with captions of the package's own prompts, half of DPG-Bench's and half of GenEval's, as ids of
a byte-level BPE trained on them; the loss is Eq. 1 of the paper, image targets alone.

The plain way pads the batch to its longest caption, multiplies the hidden states of the targets by all 215,672 rows of
the head and holds these logits in float32 at once, keeps all activations, and updates weights by an AdamW that is
neither fused nor by ``foreach``. Ours is what `LADDER` ends in. Both normalise over the image columns (``by_modality``)
or over all (``full``).

Head, embedding, layers and optimizer are measured apart, each forward and backward, since 24 layers and a plain head
together take more memory than is at hand here. Of a step with N layers, where two are timed:

    seconds = embedding + head + layers × N / 2 + optimizer, by number of weights
    memory  = N × what a layer keeps + the larger of what the head and what one layer's backward pass take on top,
              or the gradients of head and embedding, which wait for each other, if these are more

A layer keeps what the peak of two layers is above that of one. Memory is resident memory at its highest above what was
there before, which is weights, gradients and optimizer state; so a step's holds its gradient of the head's weight until
that is added to the one that is there. With two layers the arithmetic is held against whole steps.

Beside it: the head in all its forms; equal losses over 20 steps of a small model; and what Lightning takes
(hand_loop.py).

    python benchmarks/training.py        # twelve minutes and 13 GB of memory
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor
from torch.optim import AdamW
from transformers import Qwen2Config, Qwen2ForCausalLM

from hand_loop import overhead
from measure import Runs, alternate, claim, median, parser, publish, ratios
from simplear.language_model import Architecture, LanguageModel, Normalizer, next_token_losses, train_text_tokenizer
from simplear.language_model.model import load_text_tokenizer
from simplear.sequence import TokenLayout, encode_captions, image_target_mask, training_batch
from simplear.stages.decoder_layers import ActivationCheckpointing, checkpoint_activations, compile_decoder_layers
from simplear.stages.optimizers import parameter_groups

ROOT = Path(__file__).parents[1]
SIZE = ROOT / "configs" / "paper" / "0.5b.yaml"
PROMPTS = ROOT / "src" / "simplear" / "evaluation"
PROMPT_FILES = (PROMPTS / "dpg_data" / "prompts.jsonl", PROMPTS / "geneval_data" / "evaluation_metadata.jsonl")
"""Long captions and short ones."""
LAYOUT = TokenLayout(
    text_to_image_id=151_665, start_of_image_id=151_667, image_token_offset=151_672, codebook_size=64_000
)
SMALL_LAYOUT = TokenLayout(
    text_to_image_id=13_990, start_of_image_id=13_992, image_token_offset=14_000, codebook_size=6_000
)
SMALL_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
NORMALIZERS: tuple[Normalizer, ...] = ("by_modality", "full")
TIMED_LAYERS = 2
EQUAL_STEPS = 20
VOCABULARY = 4000
"""Of the tokenizer trained on the spot; DPG-Bench's captions become some 85 ids, GenEval's 8."""
GIB = 2**30


@dataclass(frozen=True)
class Layers:
    """How the decoder's layers run."""

    packed: bool = False
    compiled: bool = False
    checkpointing: ActivationCheckpointing = "none"


@dataclass(frozen=True)
class Step:
    """A training step by its parts, each a name of what is measured."""

    head: str
    layers: str
    optimizer: str


LAYERS = {
    "plain": Layers(),
    "packed": Layers(packed=True),
    "compiled": Layers(packed=True, compiled=True),
    "selective": Layers(packed=True, compiled=True, checkpointing="selective"),
    "full": Layers(packed=True, compiled=True, checkpointing="full"),
}
PLAIN = Step("by_modality, plain", "plain", "unfused")
LADDER = {
    "logits of image ids alone": Step("by_modality, image rows", "plain", "unfused"),
    "head's loss in chunks": Step("by_modality, chunks", "plain", "unfused"),
    "fused AdamW": Step("by_modality, chunks", "plain", "fused"),
    "packing": Step("by_modality, chunks", "packed", "fused"),
    "compiled layers": Step("by_modality, chunks", "compiled", "fused"),
    "selective activation checkpointing": Step("by_modality, chunks", "selective", "fused"),
}
"""Each optimisation on top of those before it; the last is our step."""
OURS = list(LADDER.values())[-1]
BESIDE = {"full activation checkpointing": Step("by_modality, chunks", "full", "fused")}
"""In place of the last of the ladder."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "training")
    made.add_argument("--images", type=int, default=4)
    made.add_argument("--grid", type=int, default=32, help="codes along each side")
    made.add_argument("--chunk-rows", type=int, default=512)
    made.add_argument("--backend", default="inductor", help="of torch.compile")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--loop-steps", type=int, default=60, help="of a round, against the loop written by hand")
    made.add_argument("--loop-rounds", type=int, default=5)
    made.add_argument("--loop-batch", type=int, default=64, help="as the demo has")
    chosen = made.parse_args(argv)
    if chosen.quick:
        chosen.images, chosen.grid, chosen.chunk_rows, chosen.rounds = 4, 8, 64, 1
        chosen.loop_steps, chosen.loop_rounds, chosen.loop_batch = 8, 1, 4
        chosen.backend = "eager"  # compiling takes half a minute
    return chosen


def encoded_prompts(vocabulary: int, directory: Path) -> list[list[list[int]]]:
    """The captions of each of `PROMPT_FILES` as ids."""
    files = [[json.loads(line)["prompt"] for line in file.read_text().splitlines()] for file in PROMPT_FILES]
    train_text_tokenizer([text for texts in files for text in texts], vocabulary, directory)
    tokenizer = load_text_tokenizer(str(directory))
    return [encode_captions(tokenizer, texts) for texts in files]


def make_batch(prompts: list[list[list[int]]], images: int, grid: int, layout: TokenLayout) -> dict[str, Tensor]:
    """Right-padded sequences of random codes, and of captions half of which come from each list."""
    captions = [prompts[n % 2][int(torch.randint(len(prompts[n % 2]), ()))] for n in range(images)]
    codes = torch.randint(0, layout.codebook_size, (images, grid, grid))
    return training_batch(captions, codes, layout)


def build_model(layers: int, layout: TokenLayout, small: bool = False) -> LanguageModel:
    """The configured shape with that many layers, in training."""
    config = Qwen2Config(**architecture(small) | {"num_hidden_layers": layers, "vocab_size": layout.vocab_size})
    return LanguageModel(Qwen2ForCausalLM(config), layout).train()


def architecture(small: bool) -> dict[str, Any]:
    stated: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(SIZE).run.architecture)  # type: ignore[assignment]
    return {**stated, **(SMALL_SIZES if small else {})}


def with_layers(model: LanguageModel, layers: Layers, backend: str = "inductor") -> LanguageModel:
    """A copy that shares the weights, whose layers run that way."""
    made = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    checkpoint_activations(made.decoder, layers.checkpointing)
    if layers.compiled:
        compile_decoder_layers(made.decoder, backend)
    return made


# The head


def plain_loss(hidden: Tensor, weight: Tensor, labels: Tensor, layout: TokenLayout, normalizer: Normalizer) -> Tensor:
    """Logits of all ids, then the normaliser's softmax; all images have as many codes, so one mean is theirs."""
    targets = labels[:, 1:]
    mask = image_target_mask(targets, layout)
    logits = F.linear(hidden[:, :-1][mask], weight)
    if normalizer == "by_modality":
        return F.cross_entropy(logits[:, layout.image_token_offset :], targets[mask] - layout.image_token_offset)
    return F.cross_entropy(logits, targets[mask])


def pytorch_loss(hidden: Tensor, weight: Tensor, labels: Tensor, layout: TokenLayout, chunk_rows: int) -> Tensor:
    """``by_modality`` through PyTorch's chunked operation with a loss a row, as a mean by sample needs it."""
    from torch.nn import LinearCrossEntropyOptions

    targets = labels[:, 1:]
    mask = image_target_mask(targets, layout)
    first = layout.image_token_offset
    return F.linear_cross_entropy(
        hidden[:, :-1][mask],
        weight[first:],
        targets[mask] - first,
        reduction="none",
        options=LinearCrossEntropyOptions(batch_chunk_size=chunk_rows),
    ).mean()


class HeadStep:
    """Forward and backward of one way to the loss; keeps the loss and the gradient of the hidden states."""

    def __init__(self, loss: Callable[[], Tensor], hidden: Tensor) -> None:
        self.loss, self.hidden = loss, hidden
        self.value = 0.0
        self.gradient: Tensor | None = None

    def __call__(self) -> None:
        self.hidden.grad = None
        loss = self.loss()
        loss.backward()
        self.value, self.gradient = loss.detach().item(), self.hidden.grad


def head_steps(model: LanguageModel, labels: Tensor, chunk_rows: int) -> dict[str, HeadStep]:
    """All ways to the loss, by name."""
    weight, layout = model.decoder.lm_head.weight, model.layout
    # As the final norm leaves them: of mean square 1.
    hidden = torch.randn(*labels.shape, weight.shape[1], requires_grad=True)

    def ours(normalizer: Normalizer, rows: int | None) -> Tensor:
        options: dict[str, Any] = {"normalizer": normalizer, "with_text": False, "chunk_rows": rows}
        return next_token_losses(hidden, weight, labels, layout, **options)[0].mean()

    losses: dict[str, Callable[[], Tensor]] = {}
    for kind in NORMALIZERS:
        losses[f"{kind}, plain"] = lambda kind=kind: plain_loss(hidden, weight, labels, layout, kind)
        losses[f"{kind}, chunks"] = lambda kind=kind: ours(kind, chunk_rows)
    losses["by_modality, image rows"] = lambda: ours("by_modality", None)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # since PyTorch 2.14
        losses["by_modality, PyTorch's chunks"] = lambda: pytorch_loss(hidden, weight, labels, layout, chunk_rows)
    return {name: HeadStep(loss, hidden) for name, loss in losses.items()}


def largest_difference(steps: dict[str, HeadStep], kind: str) -> tuple[float, float]:
    """Of all ways to one normaliser's loss from the plain one: loss, relative; gradient, relative to its largest."""
    plain = steps[f"{kind}, plain"]
    others = [step for name, step in steps.items() if name.startswith(kind)]
    assert plain.gradient is not None
    scale = float(plain.gradient.abs().max())
    return (
        max(abs(step.value - plain.value) / plain.value for step in others),
        max(float((step.gradient - plain.gradient).abs().max()) / scale for step in others),
    )


# The other parts


def embedding_step(model: LanguageModel, input_ids: Tensor) -> None:
    states = model.decoder.model.embed_tokens(input_ids)
    states.backward(torch.ones_like(states))


def whole_step(
    model: LanguageModel,
    batch: dict[str, Tensor],
    grid: int,
    layers: Layers,
    chunk_rows: int | None,
    normalizer: Normalizer = "by_modality",
) -> Tensor:
    """Forward and backward of the loss as the stages compute it."""
    losses, _ = model(
        batch["input_ids"],
        batch["labels"],
        (grid, grid),
        normalizer=normalizer,
        with_text=False,
        chunk_rows=chunk_rows,
        packed=layers.packed,
    )
    loss = losses.mean()
    loss.backward()
    return loss.detach()


def plain_whole_step(
    model: LanguageModel, batch: dict[str, Tensor], grid: int, normalizer: Normalizer = "by_modality"
) -> Tensor:
    """The same the plain way."""
    ids, labels = batch["input_ids"], batch["labels"]
    hidden = model.hidden_states(ids, model.training_positions(ids, (grid, grid)), attention_mask=None)
    loss = plain_loss(hidden, model.decoder.lm_head.weight, labels, model.layout, normalizer)
    loss.backward()
    return loss.detach()


def make_optimizer(weights: Any, fused: bool) -> AdamW:
    return AdamW(weights, lr=1e-4, fused=True) if fused else AdamW(weights, lr=1e-4, foreach=False, fused=False)


class Measured:
    """Seconds and memory of the parts, and what steps they make."""

    def __init__(self, runs: Runs, one_layer: Runs, layers: int, weights: float) -> None:
        self.runs, self.one_layer, self.layers, self.weights = runs, one_layer, layers, weights

    def seconds(self, step: Step, number: int, layers: int | None = None, optimizer: bool = True) -> float:
        """Of a step, from the parts of one round."""
        times = (layers or self.layers) / TIMED_LAYERS
        found = self.runs[step.head][number].seconds + self.runs["embedding"][number].seconds
        found += self.runs[f"layers, {step.layers}"][number].seconds * times
        return found + optimizer * self.runs[f"AdamW, {step.optimizer}"][number].seconds * self.weights

    def peak(self, step: Step, layers: int | None = None) -> float:
        """Bytes of a step above weights, gradients and optimizer state."""
        one = median(self.one_layer[f"layers, {step.layers}"], "peak_bytes")
        # Of layers that are computed again it is a few MiB, less than what measuring is off by.
        kept = max(0.0, (median(self.runs[f"layers, {step.layers}"], "peak_bytes") - one) / (TIMED_LAYERS - 1))
        head, embedding = (median(self.runs[name], "peak_bytes") for name in (step.head, "embedding"))
        # Their weight is the same: autograd holds the head's gradient, as large, until it can add the embedding's.
        return max((layers or self.layers) * kept + max(head, one - kept), 2 * embedding)

    def over(self, step: Step, other: Step) -> list[float]:
        """Seconds of one step over another's, by round."""
        rounds = range(len(self.runs["embedding"]))
        return [self.seconds(step, number) / self.seconds(other, number) for number in rounds]

    def claims(self, words: str, step: Step, other: Step, bars: bool = False) -> list[dict[str, Any]]:
        """Time and memory of one step over another's."""
        peaks = self.peak(step), self.peak(other)
        note = f"{peaks[0] / GIB:.3g} and {peaks[1] / GIB:.3g} GiB"
        return [
            claim(f"time, {words}", self.over(step, other), ("<=", 0.75) if bars else None),
            claim(f"memory, {words}", [peaks[0] / peaks[1]], ("<=", 0.35) if bars else None, note),
        ]


def measure_parts(
    settings: argparse.Namespace, prompts: list[list[list[int]]], details: dict[str, Any]
) -> tuple[Measured, dict[str, HeadStep]]:
    """All parts in turn, and whole steps of two layers."""
    layout = SMALL_LAYOUT if settings.quick else LAYOUT
    model = build_model(TIMED_LAYERS, layout, settings.quick)
    batch = make_batch(prompts, settings.images, settings.grid, layout)
    few = make_batch(prompts, 2, 2, layout)
    shape = Architecture.of(Qwen2Config(**architecture(settings.quick), vocab_size=layout.vocab_size))
    details["lengths"] = batch["attention_mask"].sum(dim=1).tolist()

    # The layers by themselves, through `LanguageModel.forward`: of a vocabulary so small that its head costs nothing.
    tiny = TokenLayout(text_to_image_id=5_000, start_of_image_id=5_001, image_token_offset=5_002, codebook_size=64)
    body = build_model(TIMED_LAYERS, tiny, settings.quick)
    body.decoder.model.layers = model.decoder.model.layers
    short = make_batch(prompts, settings.images, settings.grid, tiny)
    short_few = make_batch(prompts, 2, 2, tiny)
    variants: dict[str, Callable[[], object]] = {}
    single: dict[str, Callable[[], object]] = {}
    for name, layers in LAYERS.items():
        made = with_layers(body, layers, settings.backend)
        one = with_layers(body, layers, settings.backend)
        one.decoder.model.layers = one.decoder.model.layers[:1]
        one.decoder.config.num_hidden_layers = 1
        for each, target in ((made, variants), (one, single)):
            # Threads start, layers compile: at the size that is timed, since another one may have a graph of its own.
            whole_step(each, *((short, settings.grid) if layers.compiled else (short_few, 2)), layers, None)
            target[f"layers, {name}"] = lambda each=each, layers=layers: whole_step(
                each, short, settings.grid, layers, None
            )
    optimizers = {
        name: make_optimizer(list(model.decoder.model.layers.parameters()), name == "fused")
        for name in ("unfused", "fused")
    }
    for name, optimizer in optimizers.items():
        optimizer.step()  # makes its state
        variants[f"AdamW, {name}"] = optimizer.step
    for step in head_steps(model, few["labels"], 8).values():
        step()
    heads = head_steps(model, batch["labels"], settings.chunk_rows)
    ours = LAYERS[OURS.layers]
    whole = with_layers(model, ours, settings.backend)
    whole_step(whole, few, 2, ours, 8)
    variants |= {
        **heads,
        "embedding": lambda: embedding_step(model, batch["input_ids"]),
        "whole, plain": lambda: plain_whole_step(model, batch, settings.grid),
        "whole, ours": lambda: whole_step(whole, batch, settings.grid, ours, settings.chunk_rows),
    }
    runs = alternate(variants, settings.rounds, "training", memory=True)
    one_layer = alternate(single, 1, "one layer", memory=True)
    weights = shape.parameters / (TIMED_LAYERS * shape.parameters_a_layer)
    details["seconds"] = {name: median(found) for name, found in runs.items()}
    details["peak_gib"] = {name: median(found, "peak_bytes") / GIB for name, found in runs.items()}
    details["peak_gib_of_one_layer"] = {name: median(found, "peak_bytes") / GIB for name, found in one_layer.items()}
    return Measured(runs, one_layer, shape.num_hidden_layers, weights), heads


def head_claims(measured: Measured, heads: dict[str, HeadStep], details: dict[str, Any]) -> list[dict[str, Any]]:
    """The head by itself."""
    runs = measured.runs
    details["losses"] = {name: step.value for name, step in heads.items()}
    bars = {"by_modality": 0.5, "full": 0.9}
    claims: list[dict[str, Any]] = []
    for kind in NORMALIZERS:
        chunks, plain = f"{kind}, chunks", f"{kind}, plain"
        loss_difference, gradient_difference = largest_difference(heads, kind)
        details[f"{kind}_gradient_difference"] = gradient_difference
        claims += [
            claim(f"{kind}: head time, chunks over plain", ratios(runs, chunks, plain), ("<=", bars[kind])),
            claim(
                f"{kind}: head memory, chunks over plain",
                ratios(runs, chunks, plain, "peak_bytes"),
                ("<=", 0.35),
                note=" and ".join(f"{median(runs[name], 'peak_bytes') / GIB:.2f}" for name in (chunks, plain)) + " GiB",
            ),
            claim(f"{kind}: loss, relative difference from plain", [loss_difference], ("<=", 1e-5)),
        ]
    reference, pytorch = "by_modality, plain", "by_modality, PyTorch's chunks"
    if pytorch in runs:
        memory = ratios(runs, pytorch, reference, "peak_bytes")
        claims += [
            claim("by_modality: head time, PyTorch's chunks over plain", ratios(runs, pytorch, reference)),
            claim("by_modality: head memory, PyTorch's chunks over plain", memory),
        ]
    return claims


def step_claims(measured: Measured) -> list[dict[str, Any]]:
    """Our step over the plain one, each optimisation over the step without it, and what the arithmetic is worth."""
    layers = measured.layers
    claims = measured.claims(f"by_modality: our step of {layers} layers over the plain one", OURS, PLAIN, bars=True)
    full = Step("full, chunks", OURS.layers, OURS.optimizer), Step("full, plain", PLAIN.layers, PLAIN.optimizer)
    claims += measured.claims(f"full: our step of {layers} layers over the plain one", *full, bars=True)
    before = PLAIN
    for name, step in LADDER.items():
        without = before
        claims += measured.claims(f"step with {name} over the step without", step, without)
        before = step
    for name, step in BESIDE.items():
        claims += measured.claims(f"step with {name} over the step without", step, without)
    for name, step in (("plain", PLAIN), ("ours", OURS)):
        whole = measured.runs[f"whole, {name}"]
        seconds = [
            measured.seconds(step, number, TIMED_LAYERS, optimizer=False) / run.seconds
            for number, run in enumerate(whole)
        ]
        memory = measured.peak(step, TIMED_LAYERS) / median(whole, "peak_bytes")
        words = f"{TIMED_LAYERS} layers and the head, computed from parts over measured at once, {name}"
        claims += [claim(f"time, {words}", seconds), claim(f"memory, {words}", [memory])]
    return claims


def equal_losses(prompts: list[list[list[int]]], normalizer: Normalizer, steps: int, grid: int, backend: str) -> float:
    """Largest difference between the losses of our training and of the plain one, of a small model."""
    torch.manual_seed(0)
    plain, layers = build_model(TIMED_LAYERS, SMALL_LAYOUT, small=True), LAYERS[OURS.layers]
    ours = with_layers(copy.deepcopy(plain), layers, backend)
    optimizers = [make_optimizer(parameter_groups(model), fused) for model, fused in ((plain, False), (ours, True))]
    differences = []
    for _ in range(steps):
        batch = make_batch(prompts, 4, grid, SMALL_LAYOUT)
        one = plain_whole_step(plain, batch, grid, normalizer)
        other = whole_step(ours, batch, grid, layers, 64, normalizer)
        differences.append(abs(float(one - other)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return max(differences)


def main(argv: Sequence[str] | None = None) -> None:
    settings = arguments(argv)
    torch.manual_seed(0)
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="simplear-benchmark-") as name:
        prompts = encoded_prompts(VOCABULARY, Path(name) / "text_tokenizer")
        (Path(name) / "loop").mkdir()
        loops = overhead(Path(name) / "loop", settings.loop_steps, settings.loop_batch, settings.loop_rounds)
    equal = [
        claim(
            f"{kind}: loss, largest difference between ours and the plain one in {EQUAL_STEPS} steps of a small model",
            [equal_losses(prompts, kind, EQUAL_STEPS, settings.grid // 2, settings.backend)],
            ("<=", 1e-4),
        )
        for kind in NORMALIZERS
    ]
    measured, heads = measure_parts(settings, prompts, details)
    lightning = claim(
        "a step of the demo's pretraining, Lightning over a loop written by hand",
        ratios(loops, "Lightning", "by hand"),
        ("<=", 1.03),
    )
    claims = [*step_claims(measured), *equal, lightning, *head_claims(measured, heads, details)]
    details["milliseconds_a_step"] = {name: 1000 * median(found) for name, found in loops.items()}
    publish("training", settings, claims, details)


if __name__ == "__main__":
    main()
