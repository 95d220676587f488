"""`make demo`: the paper's story in small, on two CPU cores and offline, from nothing to a measured model.

Every step is a verb that anyone can run by itself with the same configuration file under ``configs/demo``; this module
only runs them in order, says how long is left, and skips what is already there. A step's result appears under its
final name only once it is complete, so a demo that was stopped goes on where it was: training from its last state,
tokenizing at the first missing shard.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from simplear.cli import main
from simplear.errors import MissingFileError
from simplear.evaluation import markdown_table, read_report

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
    run: str = ""
    """Run of the report that the step writes; it is complete when the report has it."""
    states: Path | None = None
    """Directory of training states, to go on from the newest."""

    def complete(self) -> bool:
        """Whether there is nothing left to do."""
        return self.result.exists() and (not self.run or self.run in read_report(self.result)["runs"])


def _fit(stage: str, title: str, seconds: int, config: str | None = None) -> Step:
    arguments = ("fit", "--config", f"configs/demo/{config or stage}.yaml")
    return Step(title, arguments, CHECKPOINTS / stage, seconds, states=CHECKPOINTS / "states" / stage)


def _tokenize(part: str, title: str, seconds: int) -> Step:
    arguments = ("tokenize", "--config", f"configs/demo/tokenize-{part}.yaml")
    return Step(title, arguments, DATA / f"tokens-{part}" / "manifest.json", seconds)


def _evaluate(stage: str, title: str, seconds: int, *options: str, guided: bool = True) -> Step:
    checkpoint, run = str(CHECKPOINTS / stage), stage if guided else f"{stage}-unguided"
    arguments = ("evaluate", "scenes", checkpoint, "--out", str(CHECKPOINTS), "--run", run, *options)
    return Step(title, arguments if guided else (*arguments, "--guidance_scale", "1"), REPORT, seconds, run=run)


STEPS = (
    Step(
        "text tokenizer",
        ("train-text-tokenizer", "--config", "configs/demo/text_tokenizer.yaml"),
        DATA / "text_tokenizer",
        10,
    ),
    _fit("visual_tokenizer", "visual tokenizer: pictures to codes and back", 155),
    _tokenize("pretrain", "token shards of 32-pixel scenes", 20),
    _tokenize("pretrain-validation", "token shards of 32-pixel scenes, held out", 5),
    _tokenize("sft", "token shards of 64-pixel scenes", 25),
    _tokenize("sft-validation", "token shards of 64-pixel scenes, held out", 5),
    _fit("pretrain", "pretraining at 32 pixels", 185),
    _fit("sft", "supervised fine-tuning at 64 pixels", 380),
    _fit("grpo", "reinforcement learning against the exact detector", 345, config="grpo-scene"),
    _evaluate("pretrain", "evaluation of pretraining", 20),
    _evaluate(
        "sft",
        "evaluation of fine-tuning",
        40,
        *("--blind_prompts", "100", "--tokenizer_ceiling", "true", "--strict", "true"),
    ),
    _evaluate("grpo", "evaluation of reinforcement learning", 45, "--strict", "true"),
    _evaluate("sft", "the same without guidance", 25, guided=False),
    _evaluate("grpo", "the same without guidance", 25, guided=False),
)
"""In the order of the paper's section 3.2; each needs results of the ones before."""


def demo() -> None:
    """Train everything small from nothing, evaluate it, and say where to look. Run again, it goes on where it was."""
    if not Path("configs/demo").is_dir():
        raise MissingFileError("configs/demo is not here: run the demo in the project's root (make demo).")
    left = [step for step in STEPS if not step.complete()]
    begin = time.monotonic()
    for number, step in enumerate(left):
        remaining = sum(later.seconds for later in left[number:])
        print(
            f"\n[{STEPS.index(step) + 1}/{len(STEPS)}] {step.title} (about {_duration(remaining)} left in all)",
            flush=True,
        )
        resume = ("--ckpt_path", "last") if step.states is not None and any(step.states.glob("*.ckpt")) else ()
        main((*step.arguments, *resume))
    if left:
        print(f"\nThe demo took {_duration(time.monotonic() - begin)}.")
    print(_summary())


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def _summary() -> str:
    return "\n".join(
        [
            "",
            markdown_table(read_report(REPORT)),
            "",
            f"images       {CHECKPOINTS / 'scenes' / 'sft.png'}  (and sft.html, all with their verdicts)",
            f"             {CHECKPOINTS / 'scenes' / 'grpo.png'}  (and grpo.html)",
            f"report       {REPORT}",
            f"checkpoints  {CHECKPOINTS / 'sft'}, {CHECKPOINTS / 'grpo'}",
            "draw         make generate ARGS='--prompt \"a photo of a red circle\"'",
            "curves       make tensorboard",
        ]
    )
