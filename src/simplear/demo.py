"""`make demo`: the paper's story in small, on two CPU cores and offline, from nothing to a measured model.

Every step is a verb that you can run by itself with the same configuration file under ``configs/demo``; this module
only runs them in order, says how long is left, and skips what is already there. A step's result appears under its final
name only once it is complete, so you can stop the demo and run it again: training resumes from its last state,
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
WHERE_TO_LOOK = f"""
images       {CHECKPOINTS / "scenes" / "sft.png"}  (and sft.html, all with their verdicts)
             {CHECKPOINTS / "scenes" / "grpo.png"}  (and grpo.html)
report       {REPORT}
checkpoints  {CHECKPOINTS / "sft"}, {CHECKPOINTS / "grpo"}
draw         make generate ARGS='--prompt "a photo of a red circle"'
curves       make tensorboard"""


@dataclass(frozen=True)
class Step:
    """One verb of the story.

    Args:
        title: what it does.
        command: the command line of `simplear`.
        result: exists once the step is complete.
        seconds: measured on two cores, for the time left.
        run: of the report that an evaluation writes; it is complete when the report has it.
    """

    title: str
    command: str
    result: Path
    seconds: int
    run: str = ""

    def complete(self) -> bool:
        """Whether there is nothing left to do."""
        return self.result.exists() and (not self.run or self.run in read_report(self.result)["runs"])


def _fit(stage: str, title: str, seconds: int, config: str) -> Step:
    return Step(title, f"fit --config configs/demo/{config}.yaml", CHECKPOINTS / stage, seconds)


def _tokenize(part: str, title: str, seconds: int) -> Step:
    command = f"tokenize --config configs/demo/tokenize-{part}.yaml"
    return Step(title, command, DATA / f"tokens-{part}" / "manifest.json", seconds)


def _evaluate(stage: str, title: str, seconds: int, run: str, options: str = "") -> Step:
    command = f"evaluate scenes {CHECKPOINTS / stage} --out {CHECKPOINTS} --run {run} {options}"
    return Step(title, command, REPORT, seconds, run)


STEPS = (
    Step(
        "text tokenizer",
        "train-text-tokenizer --config configs/demo/text_tokenizer.yaml",
        DATA / "text_tokenizer",
        10,
    ),
    _fit("visual_tokenizer", "visual tokenizer: pictures to codes and back", 155, "visual_tokenizer"),
    _tokenize("pretrain", "token shards of 32-pixel scenes", 20),
    _tokenize("pretrain-validation", "token shards of 32-pixel scenes, held out", 5),
    _tokenize("sft", "token shards of 64-pixel scenes", 25),
    _tokenize("sft-validation", "token shards of 64-pixel scenes, held out", 5),
    _fit("pretrain", "pretraining at 32 pixels", 185, "pretrain"),
    _fit("sft", "supervised fine-tuning at 64 pixels", 380, "sft"),
    _fit("grpo", "reinforcement learning against the exact detector", 345, "grpo-scene"),
    _evaluate("pretrain", "evaluation of pretraining", 20, "pretrain"),
    _evaluate(
        "sft",
        "evaluation of fine-tuning",
        40,
        "sft",
        "--blind_prompts 100 --tokenizer_ceiling true --strict true",
    ),
    _evaluate("grpo", "evaluation of reinforcement learning", 45, "grpo", "--strict true"),
    _evaluate("sft", "the same without guidance", 25, "sft-unguided", "--guidance_scale 1"),
    _evaluate("grpo", "the same without guidance", 25, "grpo-unguided", "--guidance_scale 1"),
)
"""In the order of the paper's section 3.2; each needs results of the ones before."""


def demo() -> None:
    """Train everything small from nothing, evaluate it, and say where to look. Run again, it resumes."""
    if not Path("configs/demo").is_dir():
        raise MissingFileError("configs/demo is not here: run the demo in the project's root (make demo).")
    left = [step for step in STEPS if not step.complete()]
    begin = time.monotonic()
    for number, step in enumerate(left):
        remaining = _duration(sum(later.seconds for later in left[number:]))
        print(f"\n[{STEPS.index(step) + 1}/{len(STEPS)}] {step.title} (about {remaining} left in all)", flush=True)
        has_state = any((CHECKPOINTS / "states" / step.result.name).glob("*.ckpt"))
        main([*step.command.split(), *(["--ckpt_path", "last"] if has_state else [])])
    if left:
        print(f"\nThe demo took {_duration(time.monotonic() - begin)}.")
    print(f"\n{markdown_table(read_report(REPORT))}\n{WHERE_TO_LOOK}")


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
