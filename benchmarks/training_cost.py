"""What a training step costs against its size: seconds and memory at four widths and four lengths of sequences.

Models of two layers shaped like Qwen2.5-0.5B (heads of 64, an MLP of 5.5 times the width) with the loss over image ids
in chunks and fused AdamW, in float32; each step is forward, backward and update. Seconds are fitted by
``a + b x FLOPs``, with the FLOPs of `simplear.language_model.arithmetic`, and 1 / b stands beside the FLOP/s of a plain
matrix product in the same run. Peak memory above weights, gradients and optimizer state stands beside the bytes of
`simplear.stages.memory`, from which `simplear plan` says what a training takes.

    python benchmarks/training_cost.py        # three minutes and 4 GB of memory
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from bounds import measured_machine
from measure import Runs, alternate, claim, median, parser, publish, result_file
from simplear.language_model import Architecture, LanguageModel
from simplear.language_model.arithmetic import TRAINING_PASSES
from simplear.sequence import TokenLayout, training_batch
from simplear.stages.memory import Run, logits_bytes, memory

LAYERS = 2
HEAD_SIZE = 64
KEY_HEADS = 2
CAPTION_TOKENS = 30
LAYOUT = TokenLayout(text_to_image_id=993, start_of_image_id=995, image_token_offset=1000, codebook_size=8192)
MIB = 2**20


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "training_cost")
    made.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 896], help="multiples of 128")
    made.add_argument("--grids", type=int, nargs="+", default=[8, 16, 24, 32], help="codes along each side")
    made.add_argument("--images", type=int, default=4)
    made.add_argument("--chunk-rows", type=int, default=512)
    made.add_argument("--rounds", type=int, default=5)
    chosen = made.parse_args(argv)
    if chosen.quick:
        chosen.widths, chosen.grids, chosen.chunk_rows, chosen.rounds = [128, 256], [2, 4], 32, 1
    return chosen


class TrainingStep:
    """Forward, backward and update on one batch.

    Args:
        model: shared by the steps of a width, as is its optimizer.
    """

    def __init__(
        self, model: LanguageModel, optimizer: torch.optim.Optimizer, grid: int, settings: argparse.Namespace
    ) -> None:
        self.model, self.optimizer, self.grid, self.chunk_rows = model, optimizer, grid, settings.chunk_rows
        captions = torch.randint(0, LAYOUT.text_to_image_id, (settings.images, CAPTION_TOKENS)).tolist()
        codes = torch.randint(0, LAYOUT.codebook_size, (settings.images, grid, grid))
        self.batch = training_batch(captions, codes, LAYOUT)
        self.run = Run(
            architecture=Architecture.of(model.decoder.config),
            codebook_size=LAYOUT.codebook_size,
            codes=grid * grid,
            mean_text=CAPTION_TOKENS + 2,
            longest_text=CAPTION_TOKENS + 2,
            images=settings.images,
            steps=1,
            images_a_step=settings.images,
            devices=1,
            sharded=False,
            precision="32-true",
            activation_checkpointing="none",
            chunk_rows=settings.chunk_rows,
            full_softmax=False,
        )

    def __call__(self) -> None:
        losses, _ = self.model(
            self.batch["input_ids"],
            self.batch["labels"],
            (self.grid, self.grid),
            with_text=False,
            chunk_rows=self.chunk_rows,
        )
        losses.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    @property
    def flops(self) -> int:
        """Of forward and backward."""
        images, length = self.batch["input_ids"].shape
        shape = self.run.architecture
        layers = shape.layer_flops(images * length, images * length**2)
        return TRAINING_PASSES * (layers + shape.head_flops(images * self.run.codes * LAYOUT.codebook_size))

    @property
    def computed_bytes(self) -> float:
        """Above weights, gradients and optimizer state."""
        return memory(self.run)["activations"] + logits_bytes(self.run)


def make_steps(settings: argparse.Namespace) -> dict[str, TrainingStep]:
    """All sizes, by width and codes of an image."""
    steps = {}
    for width in settings.widths:
        config = Qwen2Config(
            hidden_size=width,
            intermediate_size=width * 11 // 2,
            num_hidden_layers=LAYERS,
            num_attention_heads=width // HEAD_SIZE,
            num_key_value_heads=KEY_HEADS,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            vocab_size=LAYOUT.vocab_size,
        )
        model = LanguageModel(Qwen2ForCausalLM(config), LAYOUT).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        for grid in settings.grids:
            steps[f"{width}, {grid * grid}"] = TrainingStep(model, optimizer, grid, settings)
    return steps


def fitted(flops: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """a and b of seconds = a + b × FLOPs by least squares, and R²."""
    slope, constant = np.polyfit(flops, seconds, 1)
    residuals = np.array(seconds) - constant - slope * np.array(flops)
    return float(constant), float(slope), float(1 - residuals.var() / np.var(seconds))


def summary(steps: dict[str, TrainingStep], runs: Runs, machine_flops: float) -> dict[str, Any]:
    """By size what was measured and what arithmetic says; the law."""
    sizes = {
        name: {
            "width": step.run.architecture.hidden_size,
            "codes": step.run.codes,
            "seconds": median(runs[name]),
            "flops": step.flops,
            "mib": median(runs[name], "peak_bytes") / MIB,
            "computed_mib": step.computed_bytes / MIB,
        }
        for name, step in steps.items()
    }
    constant, slope, r_squared = fitted(*([size[key] for size in sizes.values()] for key in ("flops", "seconds")))
    law = {"a_seconds": constant, "b_seconds_a_tflop": slope * 1e12, "r_squared": r_squared}
    return {"sizes": sizes, "law": law, "matrix_product_tflops": machine_flops / 1e12}


def plot(details: dict[str, Any], path: Path) -> None:
    """Seconds by FLOPs beside the law and the matrix product; memory by length beside what is computed."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    sizes = list(details["sizes"].values())
    widths = sorted({size["width"] for size in sizes})
    for number, width in enumerate(widths):
        color = f"C{number}"
        mine = [size for size in sizes if size["width"] == width]
        codes = [size["codes"] for size in mine]
        left.plot([size["flops"] for size in mine], [size["seconds"] for size in mine], "o", color=color)
        right.plot(codes, [size["mib"] for size in mine], "o", color=color, label=f"width {width}")
        right.plot(codes, [size["computed_mib"] for size in mine], "--", color=color)
    flops = np.sort([size["flops"] for size in sizes])
    law = details["law"]
    label = f"a + b · FLOPs, R² = {law['r_squared']:.3f}"
    left.plot(flops, law["a_seconds"] + law["b_seconds_a_tflop"] * flops / 1e12, color="black", label=label)
    left.plot(flops, flops / details["matrix_product_tflops"] / 1e12, "--", color="grey", label="at a product's FLOP/s")
    left.set(xscale="log", yscale="log", xlabel="FLOPs a step", ylabel="seconds a step", title="Time")
    right.set(xscale="log", yscale="log", xlabel="codes an image", ylabel="MiB", title="Memory; dashed: computed")
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    settings = arguments(argv)
    torch.manual_seed(0)
    steps = make_steps(settings)
    for step in steps.values():
        step()  # optimizers make their state
    _, machine_flops = measured_machine(torch.device("cpu"), torch.float32)
    runs = alternate(steps, settings.rounds, "training_cost", memory=True)
    details = summary(steps, runs, machine_flops)
    sizes, law = list(details["sizes"].values()), details["law"]
    claims = [
        claim(f"R² of seconds = a + b · FLOPs over {len(sizes)} sizes", [law["r_squared"]]),
        claim(
            "seconds measured over that law, by size",
            [size["seconds"] / (law["a_seconds"] + law["b_seconds_a_tflop"] * size["flops"] / 1e12) for size in sizes],
        ),
        claim(
            "FLOP/s of a step (1 / b) over a plain matrix product's", [1e12 / law["b_seconds_a_tflop"] / machine_flops]
        ),
        claim("peak memory measured over computed, by size", [size["mib"] / size["computed_mib"] for size in sizes]),
    ]
    publish("training_cost", settings, claims, details)
    if (out := result_file("training_cost", settings)) is not None:
        plot(details, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
