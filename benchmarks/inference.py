"""Drawing with each engine against `kv-cache`, on the demo's checkpoint: images a second, passes, and accuracy.

    python benchmarks/inference.py               # after make demo; some minutes on two cores

The captions are the evaluation's, with guidance 2 at temperature 1 and no truncation. The speculative engine is asked
too whether what it draws is as right as what the others draw: it has their distribution, and other pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from measure import alternate, claim, median, parser, publish, ratios
from simplear.evaluation import clustered_interval
from simplear.generation import (
    Engine,
    GenerationStats,
    JacobiEngine,
    SamplingSettings,
    SimpleARPipeline,
    make_engine,
    pil_images,
)
from simplear.scenes import detect, evaluation_prompts, judge
from simplear.sequence import encode_captions, prompt_sequence

CHECKPOINT = "checkpoints/demo/sft"
WINDOWS = (2, 4, 8, 16)
JUDGED_AT_ONCE = 50
SAMPLING = SamplingSettings(guidance_scale=2.0)
Draw = Callable[[int, int], tuple[Tensor, GenerationStats]]
"""Codes and statistics of so many captions from a first one on."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "inference")
    made.add_argument("--checkpoint", default=CHECKPOINT)
    made.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    made.add_argument("--images", type=int, default=8, help="timed in each round, in batches")
    made.add_argument("--judged", type=int, default=50, help="captions of each category, drawn with and without drafts")
    made.add_argument("--rounds", type=int, default=7)
    chosen = made.parse_args(argv)
    if chosen.quick:
        chosen.batch_sizes, chosen.images, chosen.judged, chosen.rounds = [1, 2], 2, 2, 2
    return chosen


def drawing(engine: Engine, pipeline: SimpleARPipeline, prompts: Sequence[Tensor], empty: Tensor) -> Draw:
    def draw(first: int, count: int) -> tuple[Tensor, GenerationStats]:
        part = [prompts[number % len(prompts)] for number in range(first, first + count)]
        seeds = list(range(first, first + count))
        return engine.generate(part, [empty] * count, pipeline.settings.grid, SAMPLING, seeds)

    return draw


def in_batches(draw: Draw, images: int, size: int) -> Callable[[], object]:
    return lambda: [draw(first, end - first) for first, end in pairwise([*range(0, images, size), images])]


def verdicts(draw: Draw, pipeline: SimpleARPipeline, asked: Sequence[dict[str, Any]]) -> list[float]:
    """Of each caption whether its picture is right."""
    found: list[float] = []
    for first in range(0, len(asked), JUDGED_AT_ONCE):
        part = asked[first : first + JUDGED_AT_ONCE]
        images = pil_images(pipeline.decode(draw(first, len(part))[0]))
        found += [float(judge(row, detect(np.asarray(image)))) for row, image in zip(part, images, strict=True)]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    settings = arguments(argv)
    torch.set_flush_denormal(True)
    if not Path(settings.checkpoint).exists():
        raise FileNotFoundError(f"no checkpoint at {settings.checkpoint}: run make demo first, or give --checkpoint.")
    pipeline = SimpleARPipeline.from_pretrained(settings.checkpoint)
    asked = evaluation_prompts(settings.judged)
    grid = pipeline.settings.grid
    model = pipeline.model
    captions = encode_captions(pipeline.tokenizer, [*(row["prompt"] for row in asked), ""])
    *prompts, empty = [prompt_sequence(ids, model.layout) for ids in captions]
    engines: dict[str, Engine] = {name: make_engine(name, model) for name in ("baseline", "kv-cache", "cached")}
    engines |= {f"jacobi, W = {window}": JacobiEngine(model, window) for window in WINDOWS}
    draws = {name: drawing(engine, pipeline, prompts, empty) for name, engine in engines.items()}
    claims = []
    details: dict[str, Any] = {"images_a_second": {}, "passes": {}}
    for size in settings.batch_sizes:
        images = max(size, settings.images)
        variants = {name: in_batches(draw, images, size) for name, draw in draws.items()}
        runs = alternate(variants, settings.rounds, f"batch {size}")
        details["images_a_second"][str(size)] = {name: images / median(found) for name, found in runs.items()}
        ours = [name for name in engines if name not in ("baseline", "kv-cache")]
        fastest = min(ours, key=lambda name: median(runs[name]))
        jacobi = min((name for name in ours if name.startswith("jacobi")), key=lambda name: median(runs[name]))
        bar = (">=", 3.0) if size == 1 else None
        claims.append(
            claim(f"batch {size}: images a second, {fastest} over kv-cache", ratios(runs, "kv-cache", fastest), bar)
        )
        claims.append(claim(f"batch {size}: cached over kv-cache", ratios(runs, "kv-cache", "cached")))
        claims.append(claim(f"batch {size}: kv-cache over baseline", ratios(runs, "baseline", "kv-cache")))
        bar = (">=", 1.5) if size == 1 else None
        claims.append(claim(f"batch {size}: {jacobi} over cached", ratios(runs, "cached", jacobi), bar))
    codes = grid[0] * grid[1]
    for name in (name for name in engines if name.startswith("jacobi")):
        passes = [draws[name](number, 1)[1].steps for number in range(min(len(asked), 100))]
        details["passes"][name] = sum(passes) / len(passes)
    widest = f"jacobi, W = {WINDOWS[-1]}"
    claims.append(
        claim(f"codes over passes, {widest}", [codes / details["passes"][widest]], (">=", 2.5), f"{codes} codes")
    )
    right = {name: verdicts(draws[name], pipeline, asked) for name in ("cached", widest)}
    strata: dict[str, list[float]] = {}
    for row, one, other in zip(asked, right[widest], right["cached"], strict=True):
        strata.setdefault(row["tag"], []).append(one - other)
    difference, low, high = clustered_interval(list(strata.values()))
    details["accuracy"] = {name: sum(found) / len(found) for name, found in right.items()}
    claims.append(
        claim(
            "scene accuracy, jacobi less cached, on the same captions",
            [difference],
            note=f"95 % interval {low:+.3f} to {high:+.3f}, {len(asked)} captions",
        )
    )
    publish("inference", settings, claims, details)


if __name__ == "__main__":
    main()
