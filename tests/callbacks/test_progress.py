"""The bar counts optimizer steps of the whole training."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from lightning.pytorch import Trainer

from simplear.callbacks import StageProgressBar

from .conftest import ToyStage, batches

MakeTrainer = Callable[..., Trainer]


def test_accumulated_batches_count_once_and_epochs_do_not_start_over(
    stage: ToyStage, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("simplear.progress.SECONDS_BETWEEN_LINES", 0)
    bar = StageProgressBar(stage="pretrain")
    make_trainer(bar, max_steps=7, accumulate_grad_batches=2, enable_progress_bar=True).fit(stage, batches(4))
    shown = capsys.readouterr().err
    counted = [int(n) for n in re.findall(r"pretrain:[^\r]* (\d+)/7 ", shown)]
    assert counted == sorted(counted) and set(counted) == set(range(8))
    assert re.search(r"7/7 .*loss=\d+\.\d{3}", shown)


def test_a_resumed_training_goes_on_counting(stage: ToyStage, make_trainer: MakeTrainer, tmp_path: object) -> None:
    trainer = make_trainer(max_steps=4)
    trainer.fit(stage, batches(4))
    trainer.save_checkpoint(f"{tmp_path}/state.ckpt")
    bar = StageProgressBar()
    make_trainer(bar, max_steps=8, enable_progress_bar=True).fit(stage, batches(4), ckpt_path=f"{tmp_path}/state.ckpt")
    assert (bar._bar.initial, bar._bar.n, bar._bar.total, bar._bar.desc) == (4, 8, 8, "ToyStage")
