"""Processor time that a code takes where arithmetic takes next to none: what a GPU would wait for.

24 layers as in the paper's 0.5B, but 56 wide: nearly all of the time goes into launching operations, not into them. One
picture with guidance, so 2 rows, by `cached`, `fused` and `compiled`, in float32 and under bf16 autocast. What is
measured is the processor time of one thread, which neighbours change less than seconds.

    OMP_NUM_THREADS=1 python benchmarks/host_time.py     # five minutes, most of them compiling
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from tqdm import tqdm

from measure import Run, Runs, claim, median, parser, publish, ratios
from simplear.generation import SamplingSettings, make_engine
from simplear.language_model import LanguageModel, LanguageModelConfig
from simplear.sequence import TokenLayout

LAYOUT = TokenLayout(text_to_image_id=0, start_of_image_id=1, image_token_offset=60, codebook_size=50)
ARCHITECTURE = {
    "hidden_size": 56,
    "intermediate_size": 152,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SAMPLING = SamplingSettings(guidance_scale=3.0)
PRECISIONS = ("float32", "bf16 autocast")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "host_time")
    made.add_argument("--layers", type=int, default=24)
    made.add_argument("--grid", type=int, nargs=2, default=[8, 12], help="rows and columns of codes")
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument(
        "--engines", nargs="+", default=["cached", "fused", "compiled"], help="the first is the reference"
    )
    chosen = made.parse_args(argv)
    if chosen.quick:
        chosen.layers, chosen.grid, chosen.rounds, chosen.engines = 2, [2, 2], 2, ["cached", "fused"]
    return chosen


def timed(settings: argparse.Namespace, precision: str) -> Runs:
    """Processor seconds a code of each engine, all of them in each round, every other round backwards."""
    torch.manual_seed(0)
    config = LanguageModelConfig(
        "", LAYOUT.codebook_size, architecture={**ARCHITECTURE, "num_hidden_layers": settings.layers}
    )
    model = LanguageModel(config.random_decoder(LAYOUT.vocab_size).eval(), LAYOUT)
    engines = {name: make_engine(name, model) for name in settings.engines}
    prompt, negative, grid = torch.arange(2, 11), torch.arange(2, 6), tuple(settings.grid)
    runs: Runs = {name: [] for name in engines}
    for number in tqdm(range(-1, settings.rounds), desc=precision):  # the first round compiles
        for name in list(engines)[:: -1 if number % 2 else 1]:
            with torch.autocast("cpu", torch.bfloat16) if precision == PRECISIONS[1] else nullcontext():
                begin = time.process_time()
                _, stats = engines[name].generate([prompt], [negative], grid, SAMPLING, [number + 1])
            if number >= 0:
                runs[name].append(Run((time.process_time() - begin) / stats.tokens))
    return runs


def main(argv: Sequence[str] | None = None) -> None:
    settings = arguments(argv)
    torch.set_num_threads(1)
    claims, details = [], {}
    for precision in PRECISIONS:
        runs, reference = timed(settings, precision), settings.engines[0]
        details[precision] = {name: 1e3 * median(found) for name, found in runs.items()}
        for name in settings.engines[1:]:
            what = f"{name} over {reference}, {precision}: processor time a code"
            claims.append(claim(what, ratios(runs, name, reference)))
    publish("host_time", settings, claims, {"milliseconds_a_code": details})


if __name__ == "__main__":
    main()
