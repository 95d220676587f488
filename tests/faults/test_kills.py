"""Work that is killed again and again, at any moment, ends in the same bytes as work that never was."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from simplear.callbacks.preemption import RESUME_ME
from simplear.data import TokenShards
from simplear.data.drops import DROPS_FILE
from simplear.data.shards import MANIFEST_FILE, TEMPORARY_MARK
from simplear.language_model import load_checkpoint
from simplear.states import damage
from simplear.visual_tokenizer import load_visual_tokenizer
from toys import write_grpo, write_pretraining, write_sft, write_visual_tokenizer_training

PROCESSES = multiprocessing.get_context("forkserver")
"""Each piece of work is a process of its own, forked from one that has the libraries loaded and has run nothing."""
PROCESSES.set_forkserver_preload(["simplear.cli", "simplear.callbacks", "simplear.stages", "lightning.pytorch.cli"])

STAGES = ("visual_tokenizer", "pretrain", "sft")
SLOW_SYNC = 0.01
"""Seconds of an fsync, as of a real disk: on one in memory a kill would hardly ever fall into a write."""


def work(arguments: Sequence[str], log: Path) -> None:
    """One `simplear` command, in a child process."""
    from simplear.cli import main

    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: time.sleep(SLOW_SYNC)
    main(arguments)


def start(arguments: Sequence[str], log: Path) -> BaseProcess:
    process = PROCESSES.Process(target=work, args=(list(arguments), log))
    process.start()
    return process


def finish(arguments: Sequence[str], log: Path) -> None:
    process = start(arguments, log)
    process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]


def kill_often(
    arguments: Sequence[str], log: Path, kills: int, longest: float, written: Callable[[], Any]
) -> list[Any]:
    """Start the work again and again and kill it, up to `longest` seconds after it first wrote something.

    Every fourth time while it is still starting. Returns what was there after each kill; the work may end before.
    """
    moments, left = random.Random(0), []
    for attempt in range(kills):
        before = written()
        process = start(arguments, log)
        while process.is_alive() and written() == before and attempt % 4 != 3:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, longest))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, log.read_text()[-3000:]
        left.append(written())
    return left


def assert_trained_alike(
    config: Path, directory: Path, stage: str, steps: int, kills: int, at_least: int, longest: float
) -> None:
    """Also: whatever a kill leaves under the name of a state is whole."""
    command = ["fit", "--config", str(config), "--trainer.max_steps", str(steps), "--ckpt_path", "last"]
    whole, killed, log = directory / "whole", directory / "killed", directory / "log"
    finish([*command, "--trainer.default_root_dir", str(whole)], log)
    command += ["--trainer.default_root_dir", str(killed)]

    def is_whole(state: Path) -> bool:
        """By a name of our own, for training goes on and renames its states while they are read."""
        held = directory / "held.ckpt"
        held.unlink(missing_ok=True)
        try:
            os.link(state, held)
        except FileNotFoundError:
            return True  # renamed since it was listed
        return damage(held) is None

    def states() -> dict[str, int]:
        assert all(is_whole(state) for state in killed.glob("states/[!.]*.ckpt"))
        try:
            return {"last.ckpt": (killed / "states" / "last.ckpt").stat().st_mtime_ns}
        except FileNotFoundError:
            return {}

    left = kill_often(command, log, kills, longest, states)
    assert len(left) >= at_least, "the training is too short to be killed often"
    finish(command, log)
    one, other = (torch.load(root / "states" / "last.ckpt")["state_dict"] for root in (whole, killed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    if stage == "visual_tokenizer":
        exports = [load_visual_tokenizer(root / "model").state_dict() for root in (whole, killed)]
    else:
        exports = [load_checkpoint(root / "model").model.state_dict() for root in (whole, killed)]
    assert all(torch.equal(exports[0][name], exports[1][name]) for name in exports[0])
    assert not [path.name for path in killed.glob("states/.*")]


@pytest.fixture
def make_config(
    tmp_path: Path, tiny_text_tokenizer: str, tiny_visual_tokenizer: str, tiny_shards: str, tiny_checkpoint: Path
) -> Callable[[str, int], Path]:
    def make(stage: str, save_every: int) -> Path:
        if stage == "grpo":
            return write_grpo(tmp_path, str(tiny_checkpoint), tiny_visual_tokenizer, save_every)
        if stage == "visual_tokenizer":
            return write_visual_tokenizer_training(tmp_path, save_every)
        if stage == "sft":
            return write_sft(tmp_path, str(tiny_checkpoint), tiny_visual_tokenizer, tiny_shards, save_every)
        return write_pretraining(tmp_path, tiny_text_tokenizer, tiny_visual_tokenizer, tiny_shards, save_every)

    return make


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_killed_training_is_bit_identical(make_config: Callable[[str, int], Path], tmp_path: Path, stage: str) -> None:
    """With states of every third step, so that many kills fall into saving one."""
    assert_trained_alike(make_config(stage, 3), tmp_path, stage, steps=400, kills=16, at_least=12, longest=1.0)


def test_training_killed_a_few_times_is_bit_identical(make_config: Callable[[str, int], Path], tmp_path: Path) -> None:
    assert_trained_alike(make_config("pretrain", 3), tmp_path, "pretrain", steps=60, kills=2, at_least=2, longest=0.2)


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", ["pretrain", "sft", "grpo"])
def test_terminated_training_is_bit_identical(
    make_config: Callable[[str, int], Path], tmp_path: Path, stage: str, processes: int
) -> None:
    """Five times on one process, twice on two, of which the first alone gets the signal. No state but those that the
    signals leave: each resumes where the one before stopped, in GRPO between two rollouts of two updates each.
    """
    steps, signals = (40, 2) if processes == 2 else (200, 5)
    command = ["fit", "--config", str(make_config(stage, 100_000)), "--trainer.max_steps", str(steps)]
    command += ["--ckpt_path", "last", "--trainer.devices", str(processes)]
    command += ["--trainer.strategy", "ddp"] if processes == 2 else []
    whole, stopped, log = tmp_path / "whole", tmp_path / "stopped", tmp_path / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def begin(root: Path) -> subprocess.Popen[bytes]:
        words = [*command, "--trainer.default_root_dir", str(root)]
        words += ["--trainer.callbacks+", "simplear.callbacks.Preemption"]
        with log.open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "simplear.cli", *words], stdout=out, stderr=out, env=environment
            )

    def stepped(root: Path) -> int:
        """Lines in all tables of curves: one a logged step."""
        return sum(len(file.read_text().splitlines()) for file in root.rglob("metrics.csv"))

    assert begin(whole).wait() == 0, log.read_text()[-3000:]
    moments, found = random.Random(0), []
    for _ in range(signals):
        before = stepped(stopped)
        process = begin(stopped)
        while process.poll() is None and stepped(stopped) == before:
            time.sleep(0.02)  # looking more often would keep a processor busy
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGTERM)
        assert process.wait() == RESUME_ME, log.read_text()[-3000:]
        state = torch.load(stopped / "states" / "last.ckpt", weights_only=False)
        assert stage != "grpo" or state["global_step"] == 2 * state["rollouts_done"]
        found.append(state["global_step"])
    assert found == sorted(set(found)) and found[-1] < steps, found
    assert begin(stopped).wait() == 0, log.read_text()[-3000:]
    states = [torch.load(root / "states" / "last.ckpt", weights_only=False) for root in (whole, stopped)]
    assert [state["global_step"] for state in states] == [steps, steps]
    one, other = (state["state_dict"] for state in states)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.long
def test_tokenization_killed_while_writing_ends_in_the_same_hashes(tmp_path: Path, tiny_visual_tokenizer: str) -> None:
    source = ["--source", "ScenesSource", "--source.count", "300", "--source.resolution", "16"]
    command = ["tokenize", *source, "--source.rows_per_unit", "3", "--visual-tokenizer", tiny_visual_tokenizer]
    command += ["--filters", "[{class_path: simplear.data.Column, init_args: {column: tag, equals: counting}}]"]
    log, whole, out = tmp_path / "log", tmp_path / "whole", tmp_path / "killed"
    finish([*command, "--out", str(whole)], log)
    command += ["--out", str(out)]
    left = kill_often(command, log, 32, 0.15, lambda: {path.name for path in out.glob("*")})
    assert len(left) >= 20, "the work is too short to be killed often"
    assert any(TEMPORARY_MARK in name for names in left for name in names), "no kill fell into a write"
    finish(command, log)
    manifests = [json.loads((directory / MANIFEST_FILE).read_text()) for directory in (whole, out)]
    assert manifests[0] == manifests[1] and len(manifests[0]["shards"]) == 100
    assert (whole / DROPS_FILE).read_bytes() == (out / DROPS_FILE).read_bytes()
    TokenShards(out).verify()
    assert not list(out.rglob(f".*{TEMPORARY_MARK}*"))
