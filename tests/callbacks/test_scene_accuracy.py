"""Accuracy during training is the evaluation's own, of the same weights."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from simplear.callbacks import SceneAccuracy
from simplear.evaluation import draw_and_judge, scene_result
from simplear.generation import SimpleARPipeline
from simplear.scenes import CATEGORIES, evaluation_prompts

from .conftest import ToyStage, batches

MakeTrainer = Callable[..., Trainer]


def test_logs_each_category_and_the_overall(
    stage: ToyStage, make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The toy draws no shapes that a detector finds; which pixels it draws decides instead.
    monkeypatch.setattr("simplear.evaluation.scenes.verdict", lambda prompt, brightness: _bright(brightness))
    monkeypatch.setattr("simplear.evaluation.scenes.detect", lambda image: image.mean())
    callback = SceneAccuracy(every_n_steps=2, prompts_per_category=2, guidance_scale=1.5, seed=3, batch_size=5)
    logger = CSVLogger(tmp_path, name="", version="log")
    make_trainer(callback, max_steps=3, logger=logger).fit(stage, batches())
    with (tmp_path / "log" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["scenes/overall"]]
    assert [int(row["step"]) for row in rows] == [2, 3]
    settings = stage.checkpoint_settings()
    pipeline = SimpleARPipeline(stage.language_model.eval(), stage.text_tokenizer, settings, settings.visual_tokenizer)
    judged = draw_and_judge(pipeline, evaluation_prompts(2, 3), seed=3, guidance_scale=1.5, batch_size=5)
    expected = scene_result(judged)
    assert expected.keys() == {"overall", *CATEGORIES}
    assert {name: float(rows[-1][f"scenes/{name}"]) for name in expected} == pytest.approx(
        {name: entry["accuracy"] for name, entry in expected.items()}
    )
    assert 0 < expected["overall"]["accuracy"] < 1


def _bright(mean: float) -> object:
    from simplear.scenes import Verdict

    return Verdict(int(mean * 1000) % 2 == 0, "")
