"""A signal ends training at a step boundary with its state saved, never in a step, and the exit code says so."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from torch import Tensor

from callbacks.conftest import ToyStage, batches
from simplear.callbacks import AtomicCheckpoint, Preemption
from simplear.callbacks.preemption import RESUME_ME, Preempted
from toys import make_trainer

STEPS = 6


class Signalled(ToyStage):
    """Gets a signal in the middle of a micro-batch."""

    at, number = 3, signal.SIGTERM

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == self.at:
            os.kill(os.getpid(), self.number)
        return super().training_step(batch, batch_idx)


def fit(directory: Path, tokenizers: tuple[str, str], *, at: int, accumulate: int = 1, **options: Any) -> Trainer:
    torch.manual_seed(0)
    stage = Signalled(*tokenizers)
    stage.at, stage.number = at, options.pop("number", signal.SIGTERM)
    callbacks = [Preemption(), AtomicCheckpoint(dirpath=directory / "states", every_n_train_steps=100)]
    trainer = make_trainer(
        directory,
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        enable_checkpointing=True,
        **options,
    )
    trainer.fit(stage, batches(STEPS * accumulate), ckpt_path="last")
    return trainer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(("at", "accumulate", "steps"), [(2, 1, 3), (2, 2, 2), (3, 2, 2)])
def test_saved_at_the_next_boundary(
    tmp_path: Path, tokenizers: tuple[str, str], number: int, at: int, accumulate: int, steps: int
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Preempted) as ended:
        fit(tmp_path, tokenizers, at=at, accumulate=accumulate, number=number)
    assert ended.value.code == RESUME_ME == os.EX_TEMPFAIL
    assert torch.load(tmp_path / "states" / "last.ckpt", weights_only=False)["global_step"] == steps
    assert signal.getsignal(number) is before


def test_after_the_last_step_there_is_nothing_to_resume(
    tmp_path: Path, tokenizers: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while the trained model is written; then the signal is again whose it was."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Signalled, "on_fit_end", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    trainer = fit(tmp_path, tokenizers, at=STEPS - 1)
    assert trainer.global_step == STEPS
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start"])
def test_a_signal_before_the_first_step_waits_for_it(
    tmp_path: Path, tokenizers: tuple[str, str], monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    monkeypatch.setattr(Signalled, hook, lambda self, **stage: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted):
        fit(tmp_path, tokenizers, at=STEPS)
    assert torch.load(tmp_path / "states" / "last.ckpt", weights_only=False)["global_step"] == 1


def test_without_a_state_to_save_it_is_refused(tmp_path: Path, tokenizers: tuple[str, str]) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[Preemption()])
    with pytest.raises(ValueError, match="AtomicCheckpoint, with save_last: true"):
        trainer.fit(ToyStage(*tokenizers), batches())


def slurm_job(monkeypatch: pytest.MonkeyPatch, directory: Path) -> Path:
    """The variables of a SLURM job of one task, and a `scontrol` that notes what it is asked."""
    asked = directory / "asked"
    command = directory / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "17", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_NAME", "training")
    return asked


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR2, True), (signal.SIGTERM, False)])
def test_slurms_requeue_signal_requeues_once(
    tmp_path: Path, tokenizers: tuple[str, str], monkeypatch: pytest.MonkeyPatch, number: signal.Signals, requeued: bool
) -> None:
    asked = slurm_job(monkeypatch, tmp_path)
    plugins = [SLURMEnvironment(requeue_signal=signal.SIGUSR2)]
    with pytest.raises(Preempted):
        fit(tmp_path, tokenizers, at=2, number=number, plugins=plugins)
    assert (asked.read_text() if asked.exists() else "") == ("requeue 17\n" if requeued else "")
    assert not list(tmp_path.rglob("hpc_ckpt*")), "Lightning's own state would go before --ckpt_path ever after"


def test_the_requeue_signal_goes_before_the_sigterm_that_follows_it() -> None:
    for numbers in ([signal.SIGUSR1, signal.SIGTERM], [signal.SIGTERM, signal.SIGUSR1]):
        callback = Preemption()
        for number in numbers:
            callback._note(number, None)
        assert callback.received == signal.SIGUSR1


def test_a_process_that_lightning_started_exits_with_0(tmp_path: Path) -> None:
    """Lightning kills the first process, whose exit code counts, when one that it started exits with another."""
    trainer = make_trainer(tmp_path)
    elsewhere: Any = SimpleNamespace(
        is_global_zero=False, local_rank=1, _accelerator_connector=trainer._accelerator_connector
    )
    with pytest.raises(Preempted) as ended:
        Preemption()._exit(elsewhere)
    assert ended.value.code == 0
