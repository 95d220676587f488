"""`make demo`: the paper's story in small, on two CPU cores and offline, from nothing to a measured model.

Every step is a verb that anyone can run by itself with the same configuration file under ``configs/demo``; this module
only runs them in order, says how long is left, and skips what is already there. A step's result appears under its
final name only once it is complete, so a demo that was stopped goes on where it was: training from its last state,
tokenizing at the first missing shard.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHECKPOINTS = Path("checkpoints/demo")
DATA = Path("data/demo")
REPORT = CHECKPOINTS / "report.json"


@dataclass(frozen=True)
class Step:
    """One verb of the story."""

    title: str
    arguments: tuple[str, ...]
    """Command line of `simplear`."""
    result: Path
    """Exists once the step is complete."""
    seconds: int
    """Measured on two cores; only for the time left."""
    done: Callable[[Path], bool] = Path.exists


def _fit(name: str, title: str, result: str, seconds: int) -> Step:
    arguments = ("fit", "--config", f"configs/demo/{name}.yaml", "--ckpt_path", "last")
    return Step(title, arguments, CHECKPOINTS / result, seconds)


def _tokenize(name: str, title: str, seconds: int) -> Step:
    arguments = ("tokenize", "--config", f"configs/demo/tokenize-{name}.yaml")
    return Step(title, arguments, DATA / f"tokens-{name}" / "manifest.json", seconds)


def _evaluate(run: str, checkpoint: str, title: str, seconds: int, *options: str) -> Step:
    arguments = ("evaluate", "scenes", str(CHECKPOINTS / checkpoint), "--out", str(CHECKPOINTS), "--run", run, *options)
    return Step(title, arguments, REPORT, seconds, done=lambda path: run in _runs(path))


def _runs(report: Path) -> set[str]:
    return set(json.loads(report.read_text())["runs"]) if report.exists() else set()


STEPS = (
    Step(
        "text tokenizer",
        ("train-text-tokenizer", "--config", "configs/demo/text_tokenizer.yaml"),
        DATA / "text_tokenizer",
        5,
    ),
    _fit("visual_tokenizer", "visual tokenizer: pictures to codes and back", "visual_tokenizer", 120),
    _tokenize("pretrain", "token shards at 32 px", 30),
    _tokenize("pretrain-validation", "token shards at 32 px, held-out", 2),
    _tokenize("sft", "token shards at 64 px", 60),
    _tokenize("sft-validation", "token shards at 64 px, held-out", 2),
    _fit("pretrain", "pretraining at 32 px", "pretrain", 200),
    _fit("sft", "supervised fine-tuning at 64 px", "sft", 420),
    _evaluate("pretrain", "pretrain", "evaluation of pretraining", 20),
    _evaluate("sft", "sft", "evaluation of fine-tuning", 40, "--blind_prompts", "100", "--tokenizer_ceiling", "true"),
)


def demo() -> None:
    """Train everything small from nothing, evaluate it, and say where to look. Run it again to go on or to see again."""
    from simplear.cli import main

    if not Path("configs/demo").is_dir():
        raise FileNotFoundError("configs/demo is not here: run the demo in the project's root (make demo).")
    left = [step for step in STEPS if not step.done(step.result)]
    begin = time.monotonic()
    for step in left:
        remaining = sum(later.seconds for later in left[left.index(step) :])
        print(f"\n[{STEPS.index(step) + 1}/{len(STEPS)}] {step.title} — about {_minutes(remaining)} left", flush=True)
        main(list(step.arguments))
    if left:
        print(f"\nfinished in {_minutes(time.monotonic() - begin)}")
    print(_summary())


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _summary() -> str:
    return ""
