"""Every stage, on one process and on two, is killed at moments of all kinds and ends in the bytes of the training that
never was: start-up, steps, writing a state, between the two names of a state, the export; and it is asked to stop.

Ranks are forked by `faults.processes` here, which plays the launcher; Lightning's own has tests at the end.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from faults.processes import PATIENCE, Run, finish, logged_steps, start
from simplear.atomic import is_running
from simplear.callbacks.preemption import RESUME_ME
from simplear.states import LIGHTNING_METADATA, damage
from toys import make_shards, write_grpo, write_pretraining, write_sft, write_visual_tokenizer_training

pytestmark = pytest.mark.long

STEPS, SAVE_EVERY = 24, 4
CASES = [
    (stage, strategy)
    for stage in ("visual_tokenizer", "pretrain", "sft", "grpo")
    for strategy in ("one", "ddp", "fsdp2")
    if (stage, strategy) != ("visual_tokenizer", "fsdp2")  # a small convolutional network, which is not sharded
]
FIRST = ("writing", "naming", "anywhere")
LAST = ("exporting", "starting", "naming", "writing", "anywhere")
"""Moments of the kill before the signal to stop, and of that after it; the cases take them in turn."""
assert len(CASES) * 2 >= 20
MOST_ATTEMPTS = 30
"""Of a case. What came when the training had ended already does not count, and another training is begun."""
LOOK_EVERY = 0.001
"""Seconds."""


@dataclass
class Training:
    """A training that writes to `root`, and what can be seen of it from outside."""

    command: list[str]
    root: Path
    ranks: int
    log: Path

    def words(self) -> list[str]:
        return [*self.command, "--trainer.default_root_dir", str(self.root)]

    def start(self) -> Run:
        return start(self.words(), self.log, self.ranks)

    def stepped(self) -> int:
        return logged_steps(self.root)

    def is_named(self) -> bool:
        return (self.root / "states" / "last.ckpt").exists()

    def unfinished(self, pattern: str) -> set[tuple[str, int]]:
        """Half-written files by name and time."""
        found = set()
        for path in self.root.glob(pattern):
            try:
                found.add((path.name, path.stat().st_mtime_ns))
            except FileNotFoundError:
                continue
        return found

    def step(self) -> int:
        """Of the last state; 0 if there is none."""
        state = self.root / "states" / "last.ckpt"
        if not state.exists():
            return 0
        state = state / LIGHTNING_METADATA if state.is_dir() else state
        return int(torch.load(state)["global_step"])


def wait_for(moment: str, training: Training, run: Run, seconds: float, chance: float) -> None:
    """Return at a moment of this kind, or when the run has ended.

    Args:
        seconds: that the undisturbed training took.
        chance: in [0, 1], where within the moments of this kind.
    """
    if moment in ("starting", "anywhere"):
        time.sleep(chance * seconds * (0.3 if moment == "starting" else 1.0))
        return
    stepped, pattern = training.stepped(), "states/.*" if moment == "writing" else ".model.*"
    before, named = training.unfinished(pattern), False
    while run.is_alive():
        if moment == "stopping" and training.stepped() > stepped:
            time.sleep(chance * 0.1)
            return
        if moment == "naming":
            if named and not training.is_named():
                return
            named = training.is_named()
        if moment in ("writing", "exporting") and training.unfinished(pattern) - before:
            time.sleep(chance * 0.1)
            return
        time.sleep(LOOK_EVERY * (20 if moment == "stopping" else 1))


def assert_states_are_whole(training: Training) -> None:
    """Whatever a kill leaves under the name of a state."""
    for state in training.root.glob("states/[!.]*.ckpt"):
        assert damage(state) is None, state


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def assert_equal(one: Any, other: Any, place: str) -> None:
    """Bit for bit, in any nesting."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_equal(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{place}/{number}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), place
    else:
        assert one == other, place


def assert_same(whole: Path, disturbed: Path) -> None:
    """The exported model, and all of the final state but counts of what was done since the last start, and paths."""
    assert content(whole / "model").keys() == content(disturbed / "model").keys()
    for name, expected in content(whole / "model").items():
        assert content(disturbed / "model")[name] == expected, name
    states = [root / "states" / "last.ckpt" for root in (whole, disturbed)]
    if states[0].is_dir():
        shards = [{path.name: path.read_bytes() for path in state.glob("*.distcp")} for state in states]
        assert len(shards[0]) == 2 and shards[0] == shards[1]
        states = [state / LIGHTNING_METADATA for state in states]
    one, other = (torch.load(state, weights_only=True) for state in states)
    for state in (one, other):
        state.pop("callbacks")
        state.pop("loops")
    assert_equal(one, other, "")
    assert not [path.name for path in disturbed.glob("states/.*")]
    assert not [path.name for path in disturbed.glob(".*")]


@pytest.fixture
def make_command(
    tmp_path: Path, tiny_text_tokenizer: str, tiny_visual_tokenizer: str, tiny_shards: str, tiny_checkpoint: Path
) -> Callable[[str, str], list[str]]:
    """`simplear fit` of a stage. Epochs are a few steps; pretraining mixes two sets, and two stages accumulate."""

    def make(stage: str, strategy: str) -> list[str]:
        options = {"max_steps": f"{STEPS}"}
        if strategy != "one":
            options |= {"devices": "2", "strategy": strategy}
        more: dict[str, Any] = {}
        if stage == "grpo":
            config = write_grpo(tmp_path, str(tiny_checkpoint), tiny_visual_tokenizer, SAVE_EVERY)
        elif stage == "visual_tokenizer":
            config = write_visual_tokenizer_training(tmp_path, SAVE_EVERY)
        elif stage == "sft":
            config = write_sft(tmp_path, str(tiny_checkpoint), tiny_visual_tokenizer, tiny_shards, SAVE_EVERY)
            options["accumulate_grad_batches"] = "2"
        else:
            config = write_pretraining(tmp_path, tiny_text_tokenizer, tiny_visual_tokenizer, tiny_shards, SAVE_EVERY)
            others = make_shards(tmp_path / "others", tiny_visual_tokenizer, (2, 2), rows=14)
            schedule = {"class_path": "simplear.stages.CosineWithWarmup", "init_args": {"total_steps": STEPS}}
            more["model"] = {"init_args": {"lr_scheduler": schedule}}
            more["data"] = {"init_args": {"paths": [tiny_shards, others], "weights": [3, 1]}}
            options["accumulate_grad_batches"] = "2"
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text(yaml.safe_dump(more))
        command = ["fit", "--config", str(config), "--config", str(overlay), "--ckpt_path", "last"]
        command += [word for name, value in options.items() for word in (f"--trainer.{name}", value)]
        return [*command, "--trainer.callbacks+", "simplear.callbacks.Preemption"]

    return make


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The process to fork from has loaded its libraries, so that it does not count as the training's time."""
    finish(["--version"], tmp_path_factory.mktemp("warm") / "log")


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(("stage", "strategy"), CASES)
def test_disturbed_training_is_bit_identical(
    make_command: Callable[[str, str], list[str]], tmp_path: Path, stage: str, strategy: str
) -> None:
    command, ranks, log = make_command(stage, strategy), 1 if strategy == "one" else 2, tmp_path / "log"
    whole = Training(command, tmp_path / "whole", ranks, log)
    began = time.monotonic()
    finish(whole.words(), log, ranks)
    seconds = time.monotonic() - began

    number = CASES.index((stage, strategy))
    chances = random.Random(number)
    left = [FIRST[number % len(FIRST)], "stopping", LAST[number % len(LAST)]]
    roots = (tmp_path / f"disturbed{number}" for number in itertools.count())
    disturbed = Training(command, next(roots), ranks, log)
    for _ in range(MOST_ATTEMPTS):
        if not left:
            break
        before = disturbed.step()
        run = disturbed.start()
        wait_for(left[0], disturbed, run, seconds, chances.random())
        rank = chances.choice([None, *range(ranks)]) if ranks > 1 else None
        if left[0] == "stopping":
            run.ranks[rank or 0].terminate()  # whichever it is, all of them stop
            codes = run.wait()
            assert codes in ([0] * ranks, [RESUME_ME] * ranks), run.printed()
            assert codes[0] == 0 or ("resume me" in run.printed() and disturbed.step() > before)
            assert codes[0] == 0 or stage != "grpo" or disturbed.step() % 2 == 0, "between two updates of a rollout"
        else:
            codes = run.kill(rank)
            # A rank that sees another one vanish ends by itself, with 1, if it is not killed before.
            assert codes == [0] * ranks or -signal.SIGKILL in codes, run.printed()
        print(stage, strategy, left[0], "rank", rank, codes, disturbed.step())
        assert_states_are_whole(disturbed)
        if codes == [0] * ranks:
            assert_same(whole.root, disturbed.root)
            disturbed = Training(command, next(roots), ranks, log)
        else:
            left.pop(0)
    assert not left, "the training is too short to be disturbed"
    finish(disturbed.words(), log, ranks)
    assert_same(whole.root, disturbed.root)


def other_ranks(first: subprocess.Popen[bytes]) -> list[int]:
    """Numbers of the processes that Lightning started from it, among others that libraries start to look around."""
    found = []
    for file in Path(f"/proc/{first.pid}/task/{first.pid}").glob("children"):
        for number in file.read_text().split():
            with contextlib.suppress(OSError):
                if b"\0LOCAL_RANK=1\0" in Path(f"/proc/{number}/environ").read_bytes():
                    found.append(int(number))
    return found


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_that_lightning_started_end_together(
    make_command: Callable[[str, str], list[str]], tmp_path: Path, strategy: str
) -> None:
    """The first one killed before it met the other, either one killed in a step, and the first one asked to stop."""
    log, command = tmp_path / "log", make_command("pretrain", strategy)
    whole, disturbed = (Training(command, tmp_path / name, 2, log) for name in ("whole", "disturbed"))
    finish(whole.words(), log, 2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for kind in ("first rank at start-up", "other rank", "first rank", "stop", "end"):
        stepped = disturbed.stepped()
        with log.open("ab") as out:
            words = [sys.executable, "-m", "simplear.cli", *disturbed.words()]
            first = subprocess.Popen(words, stdout=out, stderr=out, env=environment)
        while not (others := other_ranks(first)) and first.poll() is None:
            time.sleep(0.01)
        if kind != "first rank at start-up":
            while first.poll() is None and disturbed.stepped() == stepped:
                time.sleep(0.01)
        assert first.poll() is None, log.read_text()[-3000:]
        began = time.monotonic()
        if kind == "other rank":
            os.kill(others[0], signal.SIGKILL)
        elif kind != "end":
            first.send_signal(signal.SIGTERM if kind == "stop" else signal.SIGKILL)
        code = first.wait(PATIENCE)
        while any(map(is_running, others)) and time.monotonic() < began + PATIENCE:
            time.sleep(0.05)
        print(strategy, kind, code, f"{time.monotonic() - began:.1f} s", disturbed.step())
        assert not any(map(is_running, others)), f"{kind}: a rank is left over"
        assert code == {"end": 0, "stop": RESUME_ME}.get(kind, code) and (code != 0 or kind == "end")
    assert_same(whole.root, disturbed.root)
