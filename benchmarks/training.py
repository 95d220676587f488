"""The head's losses in chunks of rows against their plain form, and what that makes of a training step.

The model is the paper's 0.5B (configs/paper/0.5b.yaml) in float32 with its vocabulary of 151,672 text ids and 64,000
codes; the batch is two images of 32 x 32 codes with 60 caption tokens each, image targets alone (Eq. 1 of the paper).
The plain form takes the hidden states of the same targets, multiplies them by all 215,672 rows of the head, and
normalises over all of them (``full``) or over the image columns (``by_modality``); `next_token_losses` with
``chunk_rows`` computes the same loss. Without a bar beside them: logits of the image ids alone, all at once, and
PyTorch's own `F.linear_cross_entropy` in chunks.

Head and body are timed apart, each forward and backward. The body is the embedding and two layers; a step of the whole
model is computed as head + embedding + layers x 24 / 2, without the optimizer's update.

Memory is of the head: the peak of resident memory above what is there before, weights and gradients among it. So it
holds this batch's gradient of the head's weight until that is added to the one that is there.

    python benchmarks/training.py        # some ten minutes and 9 GB of memory
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from transformers import Qwen2Config, Qwen2ForCausalLM

from measure import Runs, alternate, claim, median, parser, publish, ratios
from simplear.language_model import LanguageModel, Normalizer, next_token_losses
from simplear.sequence import TokenLayout, image_target_mask, training_batch

SIZE = Path(__file__).parents[1] / "configs" / "paper" / "0.5b.yaml"
LAYOUT = TokenLayout(
    text_to_image_id=151_665, start_of_image_id=151_667, image_token_offset=151_672, codebook_size=64_000
)
QUICK_LAYOUT = TokenLayout(
    text_to_image_id=13_990, start_of_image_id=13_992, image_token_offset=14_000, codebook_size=6_000
)
NORMALIZERS: tuple[Normalizer, ...] = ("by_modality", "full")
GIB = 2**30


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "training")
    made.add_argument("--images", type=int, default=2)
    made.add_argument("--grid", type=int, default=32, help="codes along each side")
    made.add_argument("--caption-tokens", type=int, default=60)
    made.add_argument("--chunk-rows", type=int, default=512)
    made.add_argument("--layers", type=int, default=2, help="layers that are timed")
    made.add_argument("--rounds", type=int, default=3)
    chosen = made.parse_args(argv)
    if chosen.quick:
        chosen.images, chosen.grid, chosen.caption_tokens, chosen.chunk_rows, chosen.rounds = 2, 16, 5, 64, 1
    return chosen


def build_model(layers: int, quick: bool) -> tuple[LanguageModel, int]:
    """The model with that many layers, gradients in place, and the number of layers that its configuration states."""
    stated = OmegaConf.load(SIZE).model.init_args.language_model.architecture
    architecture: dict[str, Any] = OmegaConf.to_container(stated)  # type: ignore[assignment]
    if quick:
        architecture |= {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    layout = QUICK_LAYOUT if quick else LAYOUT
    config = Qwen2Config(**{**architecture, "num_hidden_layers": layers, "vocab_size": layout.vocab_size})
    model = LanguageModel(Qwen2ForCausalLM(config), layout).train()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    return model, architecture["num_hidden_layers"]


@dataclass
class Batch:
    """What the head gets."""

    hidden: Tensor
    """(B, L, D), a leaf that requires a gradient."""
    labels: Tensor
    """(B, L)"""
    input_ids: Tensor
    """(B, L)"""


def make_batch(model: LanguageModel, images: int, grid: int, caption_tokens: int) -> Batch:
    captions = torch.randint(0, model.layout.text_to_image_id, (images, caption_tokens)).tolist()
    codes = torch.randint(0, model.layout.codebook_size, (images, grid, grid))
    made = training_batch(captions, codes, model.layout)
    # As the final norm leaves them: of mean square 1.
    hidden = torch.randn(*made["input_ids"].shape, model.decoder.config.hidden_size, requires_grad=True)
    return Batch(hidden, made["labels"], made["input_ids"])


def plain_loss(batch: Batch, weight: Tensor, layout: TokenLayout, normalizer: Normalizer) -> Tensor:
    """Logits of all ids, then the normaliser's softmax; all images have as many codes, so one mean is theirs."""
    targets = batch.labels[:, 1:]
    mask = image_target_mask(targets, layout)
    logits = F.linear(batch.hidden[:, :-1][mask], weight)
    if normalizer == "by_modality":
        return F.cross_entropy(logits[:, layout.image_token_offset :], targets[mask] - layout.image_token_offset)
    return F.cross_entropy(logits, targets[mask])


def pytorch_loss(batch: Batch, weight: Tensor, layout: TokenLayout, chunk_rows: int) -> Tensor:
    """``by_modality`` through PyTorch's chunked operation with a loss a row, as a mean by sample needs it."""
    targets = batch.labels[:, 1:]
    mask = image_target_mask(targets, layout)
    first = layout.image_token_offset
    return F.linear_cross_entropy(
        batch.hidden[:, :-1][mask],
        weight[first:],
        targets[mask] - first,
        reduction="none",
        options=LinearCrossEntropyOptions(batch_chunk_size=chunk_rows),
    ).mean()


def head_losses(model: LanguageModel, batch: Batch, chunk_rows: int) -> dict[str, Callable[[], Tensor]]:
    """All ways to the loss, by name."""
    weight, layout = model.decoder.lm_head.weight, model.layout

    def ours(normalizer: Normalizer, rows: int | None) -> Tensor:
        image, _ = next_token_losses(
            batch.hidden, weight, batch.labels, layout, normalizer=normalizer, with_text=False, chunk_rows=rows
        )
        return image.mean()

    losses: dict[str, Callable[[], Tensor]] = {}
    for normalizer in NORMALIZERS:
        losses[f"{normalizer}, plain"] = lambda kind=normalizer: plain_loss(batch, weight, layout, kind)
        losses[f"{normalizer}, chunks"] = lambda kind=normalizer: ours(kind, chunk_rows)
    losses["by_modality, image rows"] = lambda: ours("by_modality", None)
    losses["by_modality, PyTorch's chunks"] = lambda: pytorch_loss(batch, weight, layout, chunk_rows)
    return losses


class HeadStep:
    """Forward and backward of one way to the loss; keeps the loss and the gradient of the hidden states."""

    def __init__(self, loss: Callable[[], Tensor], batch: Batch) -> None:
        self.loss, self.batch = loss, batch
        self.value = 0.0
        self.gradient: Tensor | None = None

    def __call__(self) -> None:
        self.batch.hidden.grad = None
        loss = self.loss()
        loss.backward()
        self.value, self.gradient = loss.detach().item(), self.batch.hidden.grad
        self.batch.hidden.grad = None  # or the layers' step would add its own to it


def embedding_step(model: LanguageModel, batch: Batch) -> None:
    states = model.decoder.model.embed_tokens(batch.input_ids)
    states.backward(torch.ones_like(states))


def layers_step(model: LanguageModel, batch: Batch) -> None:
    states = model.decoder.model(
        inputs_embeds=batch.hidden,
        position_ids=torch.arange(batch.hidden.shape[1])[None],
        attention_mask={"full_attention": None},
        use_cache=False,
    ).last_hidden_state
    states.backward(torch.ones_like(states))


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


def step_ratios(runs: Runs, variant: str, reference: str, whole: float) -> list[float]:
    """Head + embedding + all layers, of one head over another's, in each round."""

    def step(number: int, head: str) -> float:
        parts = (runs[head], runs["embedding"])
        return sum(part[number].seconds for part in parts) + runs["layers"][number].seconds * whole

    return [step(number, variant) / step(number, reference) for number in range(len(runs["layers"]))]


def main(argv: Sequence[str] | None = None) -> None:
    settings = arguments(argv)
    torch.manual_seed(0)
    model, all_layers = build_model(settings.layers, settings.quick)
    batch = make_batch(model, settings.images, settings.grid, settings.caption_tokens)
    few = make_batch(model, settings.images, 4, 1)
    # Threads and libraries start with a few rows; memory needs no warming, it is mapped anew for every large tensor.
    for loss in head_losses(model, few, 8).values():
        loss().backward()
    layers_step(model, few)
    steps = {name: HeadStep(loss, batch) for name, loss in head_losses(model, batch, settings.chunk_rows).items()}
    variants: dict[str, Callable[[], object]] = {
        **steps,
        "embedding": lambda: embedding_step(model, batch),
        "layers": lambda: layers_step(model, batch),
    }
    runs = alternate(variants, settings.rounds, "training", memory=True)

    bars = {"by_modality": 0.5, "full": 0.9}
    claims: list[dict[str, Any]] = []
    details: dict[str, Any] = {"losses": {name: step.value for name, step in steps.items()}}
    for kind in NORMALIZERS:
        chunks, plain = f"{kind}, chunks", f"{kind}, plain"
        loss_difference, gradient_difference = largest_difference(steps, kind)
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
            claim(
                f"{kind}: step of {all_layers} layers, chunks over plain",
                step_ratios(runs, chunks, plain, all_layers / settings.layers),
            ),
        ]
    for name, words in (("image rows", "unchunked logits of image ids alone"), ("PyTorch's chunks",) * 2):
        reference = "by_modality, plain"
        claims += [
            claim(f"by_modality: head time, {words} over plain", ratios(runs, f"by_modality, {name}", reference)),
            claim(
                f"by_modality: head memory, {words} over plain",
                ratios(runs, f"by_modality, {name}", reference, "peak_bytes"),
            ),
        ]
    details["seconds"] = {name: median(found) for name, found in runs.items()}
    details["peak_gib"] = {name: median(found, "peak_bytes") / GIB for name, found in runs.items()}
    details["step"] = f"head + embedding + layers x {all_layers} / {settings.layers}"
    publish("training", settings, claims, details)


if __name__ == "__main__":
    main()
