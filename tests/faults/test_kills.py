"""A training that is killed again and again ends in the weights of one that never was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from toys import write_pretraining

KILLS = 12
STEPS = 1500
LONGEST_WAIT = 1.5
"""Seconds from the first sign of training to a kill, at most; the whole training takes several times as long."""


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "simplear.cli", *command], stdout=out, stderr=out, env=environment
        )


def states(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.glob("states/*.ckpt")}


@pytest.mark.long
def test_killed_pretraining_is_bit_identical(
    tmp_path: Path, tiny_text_tokenizer: str, tiny_shards: str, tiny_visual_tokenizer: str
) -> None:
    config = write_pretraining(tmp_path, tiny_text_tokenizer, tiny_visual_tokenizer, tiny_shards, save_every=7)
    command = ["fit", "--config", str(config), "--trainer.max_steps", str(STEPS), "--ckpt_path", "last"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start([*command, "--trainer.default_root_dir", str(whole)], tmp_path / "whole.log").wait() == 0
    moments = random.Random(0)
    kills = 0
    for _ in range(KILLS):
        before = states(killed)
        process = start([*command, "--trainer.default_root_dir", str(killed)], tmp_path / "killed.log")
        while process.poll() is None and states(killed) == before:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, LONGEST_WAIT))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= KILLS // 2, "the training is too short to be killed often"
    assert start([*command, "--trainer.default_root_dir", str(killed)], tmp_path / "killed.log").wait() == 0
    one, other = (
        torch.load(root / "states" / "last.ckpt", weights_only=True)["state_dict"] for root in (whole, killed)
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (killed / "model" / "simplear.json").exists()
