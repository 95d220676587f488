"""Tables 5 and 6 of the paper, and beyond: every engine against `kv-cache`, on the demo's checkpoint and at 0.5B.

    python benchmarks/inference.py               # after make demo; half an hour on two cores
    python benchmarks/inference.py --rounds 3 --images 12 --shape-rounds 3    # twelve minutes
    python benchmarks/inference.py --grid 64 --device cuda --dtype bfloat16 --only shape   # 1024 px on a GPU

On the demo's checkpoint the captions are the evaluation's, with guidance 2 at temperature 1 and no truncation. The 0.5B
shape has random weights, so it tells what passes cost and not how many drafts are right; beside it stands what memory
and processor allow, measured in the same run. vLLM joins in from its own environment (`make vllm-env`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, Qwen2Config

from bounds import MACHINES, Shape, image_bytes, image_seconds, measured_machine, plain_image_bytes
from measure import Runs, alternate, claim, markdown_table, median, parser, publish, ratios, result_file
from simplear.generation import (
    CachedEngine,
    CompiledEngine,
    Engine,
    FusedEngine,
    GenerationStats,
    JacobiEngine,
    SamplingSettings,
    SimpleARPipeline,
    make_engine,
    pil_images,
)
from simplear.generation.engine import DrawRequest
from simplear.language_model import LanguageModel, LanguageModelConfig
from simplear.scenes import detect, evaluation_prompts, judge
from simplear.sequence import TokenLayout, encode_captions, prompt_sequence

CHECKPOINT = "checkpoints/demo/sft"
VLLM_PYTHON = Path(".venv-vllm/bin/python")
SAMPLING = SamplingSettings(guidance_scale=2.0)
GENERATE = "transformers.generate"
NO_DRAFTS, WIDEST = "fused", "jacobi, W = 16"
COMPILED = {f"jacobi, W = {window}, compiled": window for window in (3, 7)}
WINDOWS = (1, 3, 7, 15, 16)
FIXED = {NO_DRAFTS: 0, **{f"jacobi, W = {window}": window for window in WINDOWS}}
QWEN_05B = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
TEXT_IDS, CODEBOOK, PROMPT_TOKENS = 151_672, 64_000, 16
PAPER_CODES = 4096
Draw = Callable[[int, int], tuple[Tensor, GenerationStats]]
"""Codes and statistics of so many images from a first one on."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "inference")
    made.add_argument("--checkpoint", default=CHECKPOINT)
    made.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 8, 32])
    made.add_argument("--images", type=int, default=24, help="timed in each round, or one batch")
    made.add_argument("--judged", type=int, default=50, help="captions of each category, drawn with and without drafts")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--shape-rounds", type=int, default=5)
    made.add_argument("--grid", type=int, default=4, help="rows and columns of codes at the 0.5B shape; 64 is 1024 px")
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", default="float32", help="at the 0.5B shape")
    made.add_argument("--only", choices=("demo", "shape"))
    chosen = made.parse_args(argv)
    if chosen.quick:
        chosen.batch_sizes, chosen.images, chosen.judged, chosen.rounds, chosen.shape_rounds = [1, 2], 1, 1, 2, 2
        chosen.grid = 2
    return chosen


class Demo:
    """Engines over the demo's checkpoint, and what they draw.

    Args:
        settings: the script's arguments.
    """

    def __init__(self, settings: argparse.Namespace) -> None:
        if not Path(settings.checkpoint).exists():
            raise FileNotFoundError(f"no checkpoint at {settings.checkpoint}: run make demo, or give --checkpoint.")
        self.settings = settings
        self.pipeline = SimpleARPipeline.from_pretrained(settings.checkpoint, device=settings.device)
        self.model, self.grid = self.pipeline.model, self.pipeline.settings.grid
        self.asked = evaluation_prompts(settings.judged)
        captions = encode_captions(self.pipeline.tokenizer, [*(row["prompt"] for row in self.asked), ""])
        *self.prompts, self.empty = [prompt_sequence(ids, self.model.layout) for ids in captions]
        self.order = np.random.default_rng(0).permutation(len(self.prompts))  # categories mixed, as users ask

    def chosen(self, first: int, count: int) -> tuple[list[Tensor], list[int]]:
        """Prompts, and their numbers."""
        numbers = [int(self.order[number % len(self.order)]) for number in range(first, first + count)]
        return [self.prompts[number] for number in numbers], numbers

    def draw(self, engine: Engine, grid: tuple[int, int] | None = None) -> Draw:
        def drawn(first: int, count: int) -> tuple[Tensor, GenerationStats]:
            part, chosen = self.chosen(first, count)
            return engine.generate(part, [self.empty] * count, grid or self.grid, SAMPLING, chosen)

        return drawn

    def engines(self) -> dict[str, Draw]:
        made: dict[str, Engine] = {"cached": CachedEngine(self.model)}
        if not self.settings.quick:  # a minute of compiling
            made["compiled"] = CompiledEngine(self.model)
            made |= {name: JacobiEngine(self.model, window, compiled=True) for name, window in COMPILED.items()}
        made |= {name: JacobiEngine(self.model, window) for name, window in FIXED.items()}
        return {name: self.draw(engine) for name, engine in made.items()}


def transformers_generate(demo: Demo) -> Draw:
    """As transformers' documentation has it: a batch padded on the left, its own guidance, codes alone."""
    model, layout, (height, width) = demo.model, demo.model.layout, demo.grid
    forbidden = torch.ones(layout.vocab_size, dtype=torch.bool, device=model.decoder.device)
    forbidden[layout.image_token_offset :][: layout.codebook_size] = False
    codes_alone = LogitsProcessorList([lambda ids, scores: scores.masked_fill(forbidden, float("-inf"))])

    def padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        ids = pad_sequence(list(prompts), True, layout.padding_id, padding_side="left").to(model.decoder.device)
        mask = pad_sequence([torch.ones_like(each) for each in prompts], True, 0, padding_side="left")
        return ids, mask.to(ids.device)

    @torch.inference_mode()
    def drawn(first: int, count: int) -> tuple[Tensor, GenerationStats]:
        ids, mask = padded(demo.chosen(first, count)[0])
        negative, negative_mask = padded([demo.empty] * count)
        found = model.decoder.generate(
            ids,
            attention_mask=mask,
            negative_prompt_ids=negative,
            negative_prompt_attention_mask=negative_mask,
            guidance_scale=SAMPLING.guidance_scale,
            logits_processor=codes_alone,
            do_sample=True,
            top_k=0,
            min_new_tokens=height * width,
            max_new_tokens=height * width,
            pad_token_id=layout.padding_id,
        )
        codes = found[:, ids.shape[1] :] - layout.image_token_offset
        return codes.view(count, height, width), GenerationStats("transformers")

    return drawn


class VLLM:
    """vLLM in its own environment, drawing when it is told to.

    Args:
        checkpoint: directory.
        demo: whose prompts it gets.
    """

    def __init__(self, checkpoint: str, demo: Demo) -> None:
        script = Path(__file__).with_name("inference_vllm.py")
        self.process = subprocess.Popen(
            [VLLM_PYTHON, script, checkpoint], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        prompts = [prompt.tolist() for prompt in (*demo.prompts, demo.empty)]
        self._say({"prompts": prompts, "grid": demo.grid, "guidance_scale": SAMPLING.guidance_scale})
        self.demo = demo

    def draw(self, first: int, count: int) -> tuple[Tensor, GenerationStats]:
        order = self.demo.order
        codes = self._say({"images": [int(order[number % len(order)]) for number in range(first, first + count)]})
        return torch.tensor(codes), GenerationStats("vllm")

    def _say(self, message: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(message), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def time_demo(demo: Demo, claims: list[dict[str, Any]], details: dict[str, Any]) -> None:
    """Images a second by engine and batch, and memory."""
    settings, oracle = demo.settings, demo.draw(make_engine("kv-cache", demo.model))
    draws = demo.engines()
    if demo.model.rope == "1d":
        draws[GENERATE] = transformers_generate(demo)
    if VLLM_PYTHON.exists() and not settings.quick:
        draws["vllm"] = VLLM(settings.checkpoint, demo).draw
    details["over_kv_cache"], details["memory"] = {}, {}
    baseline = demo.draw(make_engine("baseline", demo.model))
    for size in settings.batch_sizes:
        rounds = -(-settings.images // size)  # as long at each size, or a neighbour's load passes short runs by
        variants: dict[str, Callable[[], object]] = {"kv-cache": lambda: oracle(0, 1)}
        if size == 1:
            variants["baseline"] = lambda: baseline(0, 1)
        for name, draw in draws.items():
            variants[name] = repeated(draw, size, rounds)
            variants[name]()  # compiles
        runs = alternate(variants, settings.rounds, f"demo, batch {size}", memory=settings.device == "cpu")
        scale = {name: 1 if name in ("kv-cache", "baseline") else rounds * size for name in variants}
        speed = {
            name: [scale[name] * ratio for ratio in ratios(runs, "kv-cache", name)]
            for name in variants
            if name != "kv-cache"
        }
        details["over_kv_cache"][str(size)] = {name: statistics.median(found) for name, found in speed.items()}
        if settings.device == "cpu":
            details["memory"][str(size)] = {
                name: median(found, "peak_bytes") / scale[name] / 2**20
                for name, found in runs.items()
                if name != "vllm"
            }
        claims += demo_claims(size, runs, speed)


def repeated(draw: Draw, size: int, batches: int) -> Callable[[], object]:
    return lambda: [draw(number * size, size) for number in range(batches)]


def demo_claims(size: int, runs: Runs, speed: dict[str, list[float]]) -> list[dict[str, Any]]:
    if size not in (1, 8):
        return []
    fastest = max(speed, key=lambda name: statistics.median(speed[name]))
    drafts = [name for name in speed if name.startswith("jacobi")]
    best = max(drafts, key=lambda name: statistics.median(speed[name]))
    others = [name for name in speed if not name.startswith("jacobi")]
    other = max(others, key=lambda name: statistics.median(speed[name]))
    first = size == 1
    found = [claim(f"demo, batch {size}: {fastest} over kv-cache", speed[fastest], (">=", 3.0) if first else None)]
    if GENERATE in speed:
        gain = [mine / its for mine, its in zip(speed[fastest], speed[GENERATE], strict=True)]
        found.append(claim(f"demo, batch {size}: {fastest} over {GENERATE}", gain, None if first else (">=", 5.0)))
    if fastest != "cached":
        found.append(claim(f"demo, batch {size}: cached over kv-cache", speed["cached"]))
    found.append(
        claim(f"demo, batch {size}: {best} over {other}", ratios(runs, other, best), (">=", 1.5) if first else None)
    )
    return found


def count_passes(demo: Demo, claims: list[dict[str, Any]], details: dict[str, Any]) -> None:
    """Passes an image by window, and whether the pictures are those drawn without drafts."""
    codes, images = demo.grid[0] * demo.grid[1], len(demo.prompts)
    passes = {}
    for name, window in FIXED.items():
        draw = demo.draw(JacobiEngine(demo.model, window))
        passes[name] = [draw(number, 1)[1].steps for number in range(min(100, images))]
    details["passes"] = {name: statistics.mean(found) for name, found in passes.items()}
    widest = [codes / statistics.mean(passes[WIDEST])]
    claims.append(
        claim(f"codes over passes, {WIDEST}", widest, (">=", 2.5), f"{codes} codes, {len(passes[WIDEST])} images")
    )
    drawn = {
        name: [demo.draw(engine)(first, min(50, images - first)) for first in range(0, images, 50)]
        for name, engine in (("cached", CachedEngine(demo.model)), (WIDEST, JacobiEngine(demo.model, 16)))
    }
    pictures = {name: torch.cat([part[0] for part in parts]) for name, parts in drawn.items()}
    rows = [demo.asked[int(demo.order[number % len(demo.order)])] for number in range(len(pictures["cached"]))]
    right = {
        name: [
            judge(row, detect(np.asarray(image)))
            for row, image in zip(rows, pil_images(demo.pipeline.decode(codes)), strict=True)
        ]
        for name, codes in pictures.items()
    }
    same = (pictures["cached"] == pictures[WIDEST]).flatten(1).all(dim=1)
    details["accuracy"] = {name: statistics.mean(map(float, found)) for name, found in right.items()}
    details["same_pictures"] = {"same": int(same.sum()), "of": len(same)}
    claims.append(
        claim(
            f"pictures of {WIDEST} that are cached's, code by code",
            [float(same.double().mean())],
            note=f"{int(same.sum())} of {len(same)}, float32",
        )
    )


def grow_grid(demo: Demo, details: dict[str, Any]) -> None:
    """Seconds an image against its number of codes, with the demo's sizes and random weights."""
    sides = (2, 3) if demo.settings.quick else (8, 12, 16, 24, 32)
    config = {**demo.model.decoder.config.to_dict(), "max_position_embeddings": max(sides) ** 2 + 64}
    keys = [*QWEN_05B.keys() - {"tie_word_embeddings"}]
    layout = demo.model.layout
    model = random_model({key: config[key] for key in keys}, layout).to(demo.settings.device)
    engine = JacobiEngine(model, 0)
    variants = {
        str(side**2): (lambda side=side: engine.generate(demo.prompts[:1], [demo.empty], (side, side), SAMPLING, [0]))
        for side in sides
    }
    runs = alternate(variants, 3, "grid size")
    details["grid_seconds"] = {codes: median(found) for codes, found in runs.items()}
    shape = Shape.of(model.decoder.config, layout.codebook_size)
    details["grid_bytes"] = {codes: image_bytes(shape, int(codes), 1, 4) for codes in variants}


def random_model(architecture: dict[str, Any], layout: TokenLayout) -> LanguageModel:
    torch.manual_seed(0)
    config = LanguageModelConfig("", layout.codebook_size, architecture=architecture)
    return LanguageModel(config.random_decoder(layout.vocab_size).eval(), layout)


def time_shape(settings: argparse.Namespace, claims: list[dict[str, Any]], details: dict[str, Any]) -> None:
    """The 0.5B shape, or a tiny one of the same vocabulary in a quick run."""
    text, codebook = (1000, 500) if settings.quick else (TEXT_IDS, CODEBOOK)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4}
    layout = TokenLayout(0, 1, text, codebook)
    dtype, device = cast(torch.dtype, getattr(torch, settings.dtype)), torch.device(settings.device)
    model = random_model({**QWEN_05B, **(small if settings.quick else {})}, layout).to(device, dtype)
    shape = Shape.of(model.decoder.config, codebook)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, text, (PROMPT_TOKENS,), generator=generator) for _ in range(8)]
    empty, codes = torch.tensor([0, 1]), settings.grid**2

    def draw(engine: Engine, count: int) -> Callable[[], object]:
        return lambda: engine.generate(
            prompts[:count], [empty] * count, (settings.grid,) * 2, SAMPLING, list(range(count))
        )

    machine = measured_machine(device, dtype)
    engines: dict[str, Engine] = {"cached": CachedEngine(model), NO_DRAFTS: FusedEngine(model)}
    if not settings.quick:
        engines["compiled"] = CompiledEngine(model)
    plain = draw(make_engine("kv-cache", model), 1)
    number_bytes, found = dtype.itemsize, {}
    for size in (1, 8):
        variants = {"kv-cache": plain, **{name: draw(engine, size) for name, engine in engines.items()}}
        for name in engines:
            variants[name]()
        runs = alternate(variants, settings.shape_rounds, f"0.5B, batch {size}")
        found[str(size)] = {name: median(each) / (1 if name == "kv-cache" else size) for name, each in runs.items()}
        fastest = min(engines, key=lambda name: median(runs[name]))
        gain = [size * ratio for ratio in ratios(runs, "kv-cache", fastest)]
        bound = plain_image_bytes(shape, codes, number_bytes) / image_bytes(shape, codes, size, number_bytes)
        note = f"bytes allow {bound:.3g}" if size == 1 else "images a second, of one by one"
        bar = (">=", 1.8 if size == 1 else 9.0)
        claims.append(claim(f"0.5B shape, batch {size}: {fastest} over kv-cache", gain, bar, note))
        if size == 1:
            claims.append(claim("the same over what bytes allow", [ratio / bound for ratio in gain]))
    widths = {str(width): one_pass(model, prompts[0], empty, width) for width in (1, 2, 4, 8, 16)}
    passes = alternate(widths, settings.shape_rounds, "0.5B, tokens a pass")
    seconds = {name: median(each) for name, each in passes.items()}
    details["shape"] = {
        "seconds_an_image": found,
        "codes": codes,
        "pass_seconds_by_tokens_a_row": seconds,
        "codes_a_pass_to_break_even": {name: each / seconds["1"] for name, each in seconds.items()},
        "bytes_a_second": machine[0],
        "operations_a_second": machine[1],
        "bound_seconds_an_image": {
            size: image_seconds(shape, codes, int(size), number_bytes, machine) for size in found
        },
        "bound_seconds_4096_codes": {
            size: image_seconds(shape, PAPER_CODES, int(size), number_bytes, machine) for size in found
        },
    }


def one_pass(model: LanguageModel, prompt: Tensor, negative: Tensor, width: int) -> Callable[[], object]:
    """A pass over so many tokens of an image's two rows."""
    engine = FusedEngine(model, window=width - 1)
    engine.refresh()
    request = DrawRequest([prompt], [negative], (8, 8), SAMPLING, [0], None, None)

    @torch.inference_mode()
    def draw() -> None:
        state.final_counts.fill_(1)
        state.advance()

    with torch.inference_mode():
        state, _, _ = engine.prefill(request)
    return draw


def crossover(demo_passes: dict[str, float], codes: int) -> dict[str, Any]:
    """Computed time of each window over that of none for 0.5B at 1024 px with the demo's codes a pass."""
    shape = Shape.of(Qwen2Config(**QWEN_05B, vocab_size=TEXT_IDS + CODEBOOK), CODEBOOK)
    found: dict[str, Any] = {}
    for name, machine in MACHINES.items():
        found[name] = {}
        for batch in (1, 8, 32, 128, 512):
            plain = image_seconds(shape, PAPER_CODES, batch, 2, machine)
            found[name][str(batch)] = {
                label: image_seconds(shape, PAPER_CODES, batch, 2, machine, FIXED[label] + 1) * passes / codes / plain
                for label, passes in demo_passes.items()
            }
    return found


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed by batch and engine; speed by window and batch; seconds by number of codes."""
    import matplotlib.pyplot as plt

    details = result["details"]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    sizes = [int(size) for size in details["over_kv_cache"]]
    for name in ("cached", "compiled", NO_DRAFTS, *COMPILED, "vllm"):
        values = [details["over_kv_cache"][str(size)].get(name) for size in sizes]
        if all(values):
            axes[0].plot(sizes, values, marker="o", label=name)
    axes[0].set(xscale="log", yscale="log", xlabel="images a batch", ylabel="images a second over kv-cache")
    axes[0].set_title("Demo checkpoint: engines")
    for size in sizes:
        speed = details["over_kv_cache"][str(size)]
        axes[1].plot(
            list(FIXED.values()), [speed[name] / speed[NO_DRAFTS] for name in FIXED], marker="o", label=f"batch {size}"
        )
    axes[1].axhline(1, color="grey", linewidth=0.8)
    axes[1].set(xlabel="W, drafts in a pass", ylabel="images a second over W = 0", title="Where drafts pay")
    codes = [int(name) for name in details["grid_seconds"]]
    axes[2].plot(codes, list(details["grid_seconds"].values()), marker="o", label="measured, one image")
    scale = details["grid_seconds"][str(codes[0])] / details["grid_bytes"][str(codes[0])]
    axes[2].plot(codes, [each * scale for each in details["grid_bytes"].values()], "--", label="in proportion to bytes")
    axes[2].set(
        xscale="log", yscale="log", xlabel="codes an image", ylabel="seconds", title="Demo's sizes, longer images"
    )
    for axis in axes:
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def tables(result: dict[str, Any]) -> str:
    """The paper's Tables 5 and 6 as ratios, then the claims."""
    details, lines = result["details"], []
    if "over_kv_cache" in details:
        speed, shape = details["over_kv_cache"], details.get("shape", {}).get("seconds_an_image", {})
        sizes = list(speed)
        heads = [*(f"demo, batch {size}" for size in sizes), *(f"0.5B, batch {size}" for size in shape)]
        lines += ["Images a second over `kv-cache` (the paper's Table 5):", ""]
        lines += [f"| engine | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
        for name in ("baseline", "kv-cache", GENERATE, "cached", "compiled", NO_DRAFTS, *COMPILED, "vllm"):
            cells = [1.0 if name == "kv-cache" else speed[size].get(name) for size in sizes]
            cells += [shape[size]["kv-cache"] / shape[size][name] if name in shape[size] else None for size in shape]
            if any(cells):
                lines.append(f"| {name} | {' | '.join('' if cell is None else f'{cell:.3g}' for cell in cells)} |")
        lines += ["", "Drafts (the paper's Table 6), time over that of W = 0 on the demo's checkpoint:", ""]
        lines += ["| W | passes an image | " + " | ".join(f"batch {size}" for size in sizes) + " |"]
        lines += ["|---:|" + "---:|" * (1 + len(sizes))]
        for name, window in FIXED.items():
            cells = [speed[size][NO_DRAFTS] / speed[size][name] for size in sizes]
            passes = details["passes"][name]
            lines.append(f"| {window} | {passes:.1f} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
        lines.append("")
    return "\n".join([*lines, markdown_table(result)])


def main(argv: Sequence[str] | None = None) -> None:
    settings = arguments(argv)
    torch.set_flush_denormal(True)
    claims: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    if settings.only != "shape":
        demo = Demo(settings)
        count_passes(demo, claims, details)
        time_demo(demo, claims, details)
        grow_grid(demo, details)
        details["crossover_0.5B_1024px_computed"] = crossover(details["passes"], demo.grid[0] * demo.grid[1])
    if settings.only != "demo":
        time_shape(settings, claims, details)
    publish("inference", settings, claims, details)
    if (out := result_file("inference", settings)) is not None and "grid_seconds" in details:
        plot({"details": details}, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
