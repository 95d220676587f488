"""Work that is killed again and again, at any moment, ends in the same bytes as work that never was.

All stages on one process and on two: `test_survival.py`.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.processes import finish, logged_steps, start
from simplear.atomic import TEMPORARY_MARK
from simplear.callbacks.preemption import RESUME_ME
from simplear.data import TokenShards
from simplear.data.shards import MANIFEST_FILE
from simplear.data.shards.drops import DROPS_FILE
from simplear.language_model import load_checkpoint
from simplear.states import damage
from toys import write_grpo, write_pretraining


def kill_often(
    arguments: Sequence[str], log: Path, kills: int, longest: float, written: Callable[[], Any]
) -> list[Any]:
    """Start the work again and again and kill it, up to `longest` seconds after it first wrote something.

    Every fourth time while it is still starting. Returns what was there after each kill; the work may end before.
    """
    moments, left = random.Random(0), []
    for attempt in range(kills):
        before = written()
        run = start(arguments, log)
        while run.is_alive() and written() == before and attempt % 4 != 3:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, longest))
        (code,) = run.kill()
        if code == 0:
            break
        assert code == -signal.SIGKILL, run.printed()
        left.append(written())
    return left


def kill_at(arguments: Sequence[str], log: Path, moments: Sequence[int]) -> None:
    """Start the work once for each of the moments, numbers of fsyncs and renames, after which it is killed."""
    for moment in moments:
        run = start(arguments, log, dies_at=moment)
        assert run.wait() == [-signal.SIGKILL], run.printed()


def final_weights(root: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(root / "states" / "last.ckpt")["state_dict"]
    return weights


def test_training_killed_a_few_times_is_bit_identical(
    tmp_path: Path, tiny_text_tokenizer: str, tiny_visual_tokenizer: str, tiny_shards: str
) -> None:
    config = write_pretraining(tmp_path, tiny_text_tokenizer, tiny_visual_tokenizer, tiny_shards, save_every=3)
    command = ["fit", "--config", str(config), "--trainer.max_steps", "24", "--ckpt_path", "last"]
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    finish([*command, "--trainer.default_root_dir", str(whole)], log)
    command += ["--trainer.default_root_dir", str(killed)]
    # A save takes some 20 of them: between the two names of a state, in the next save but one, and in the first.
    kill_at(command, log, [36, 31, 12])
    assert all(damage(state) is None for state in killed.glob("states/[!.]*.ckpt"))
    finish(command, log)
    one, other = final_weights(whole), final_weights(killed)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    exports = [load_checkpoint(root / "model").model.state_dict() for root in (whole, killed)]
    assert all(torch.equal(exports[0][name], exports[1][name]) for name in exports[0])
    assert not [path.name for path in killed.glob("states/.*")]


@pytest.mark.long
@pytest.mark.parametrize(("stage", "ranks", "signals"), [("pretrain", 1, 5), ("grpo", 2, 3)])
def test_training_terminated_again_and_again_is_bit_identical(
    tmp_path: Path,
    tiny_text_tokenizer: str,
    tiny_visual_tokenizer: str,
    tiny_shards: str,
    tiny_checkpoint: Path,
    stage: str,
    ranks: int,
    signals: int,
) -> None:
    """With no states but those that the signals leave: each resumes where the one before stopped, in GRPO between two
    rollouts of two updates each. Of two ranks the first alone gets the signal.
    """
    if stage == "grpo":
        config = write_grpo(tmp_path, str(tiny_checkpoint), tiny_visual_tokenizer, save_every=100_000)
    else:
        config = write_pretraining(tmp_path, tiny_text_tokenizer, tiny_visual_tokenizer, tiny_shards, 100_000)
    steps = 200 if ranks == 1 else 40
    command = ["fit", "--config", str(config), "--trainer.max_steps", str(steps), "--ckpt_path", "last"]
    command += ["--trainer.callbacks+", "simplear.callbacks.Preemption", "--trainer.devices", str(ranks)]
    command += ["--trainer.strategy", "ddp"] if ranks > 1 else []
    whole, stopped, log = tmp_path / "whole", tmp_path / "stopped", tmp_path / "log"

    finish([*command, "--trainer.default_root_dir", str(whole)], log, ranks)
    command += ["--trainer.default_root_dir", str(stopped)]
    moments, found = random.Random(0), []
    for _ in range(signals):
        before = logged_steps(stopped)
        run = start(command, log, ranks)
        while run.is_alive() and logged_steps(stopped) == before:
            time.sleep(0.02)  # looking more often would keep a processor busy
        time.sleep(moments.uniform(0, 0.05))
        run.ranks[0].terminate()
        assert run.wait() == [RESUME_ME] * ranks, run.printed()
        state = torch.load(stopped / "states" / "last.ckpt", weights_only=False)
        assert stage != "grpo" or state["global_step"] == 2 * state["rollouts_done"]
        found.append(state["global_step"])
    assert found == sorted(set(found)) and found[-1] < steps, found
    finish(command, log, ranks)
    states = [torch.load(root / "states" / "last.ckpt", weights_only=False) for root in (whole, stopped)]
    assert [state["global_step"] for state in states] == [steps, steps]
    one, other = final_weights(whole), final_weights(stopped)
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
