"""The bar counts optimizer steps of the whole training, on a terminal and off it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest
from lightning.pytorch import Trainer

from simplear.callbacks import StageProgressBar

from .conftest import ToyStage, batches

MakeTrainer = Callable[..., Trainer]


def test_without_a_terminal_a_line_for_each_tenth(
    stage: ToyStage, make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = StageProgressBar()
    make_trainer(bar, max_steps=20, enable_progress_bar=True).fit(stage, batches(8))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ToyStage")]
    assert [re.findall(r"step (\d+) of 20", line) for line in lines] == [[str(step)] for step in range(2, 21, 2)]
    assert all(re.search(r"\d+:\d\d gone, \d+:\d\d left, loss \d+\.\d{3}$", line) for line in lines)
    assert "(100%), " in lines[-1] and "00:00 left" in lines[-1]


def test_accumulated_batches_count_once_and_epochs_do_not_begin_anew(
    stage: ToyStage, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    bar = StageProgressBar(stage="pretrain")
    make_trainer(bar, max_steps=7, accumulate_grad_batches=2, enable_progress_bar=True).fit(stage, batches(4))
    shown = capsys.readouterr().out
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (7, 7)
    counted = [int(n) for n in re.findall(r"pretrain:[^\r]* (\d+)/7 ", shown)]
    assert counted == sorted(counted) and set(counted) == set(range(1, 8))


def test_a_resumed_training_goes_on_counting(stage: ToyStage, make_trainer: MakeTrainer, tmp_path: object) -> None:
    make_trainer(max_steps=4).fit(stage, batches(4))
    trainer = make_trainer(max_steps=4)
    trainer.fit(stage, batches(4))
    trainer.save_checkpoint(f"{tmp_path}/state.ckpt")
    bar = StageProgressBar()
    make_trainer(bar, max_steps=8, enable_progress_bar=True).fit(stage, batches(4), ckpt_path=f"{tmp_path}/state.ckpt")
    assert (bar._first_step, bar._total, bar._lines) == (4, 8, 10)
