"""What GRPO's callback shows: the best and the worst of a group."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simplear.callbacks import RolloutImages
from toys import PictureLogger


def test_best_and_worst_of_each_group_are_shown(tmp_path: Path) -> None:
    logger, pictures = TensorBoardLogger(tmp_path, name="", version=""), PictureLogger()
    scores = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.2, 0.8])
    images = scores[:, None, None, None].expand(6, 3, 16, 16)
    rollout = SimpleNamespace(captions=["one"] * 3 + ["two"] * 3, images=images, scores=scores)
    module: Any = SimpleNamespace(last_rollout=rollout, group_size=3, rollouts_done=2)
    trainer: Any = SimpleNamespace(loggers=[logger, pictures], is_global_zero=True, global_step=2)
    shown = RolloutImages(every_n_steps=2, groups=2, image_size=32)
    shown.on_train_batch_end(trainer, module, None, None, 0)
    module.rollouts_done = 3
    shown.on_train_batch_end(trainer, module, None, None, 1)
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    [event] = events.Images("rollouts")
    (tmp_path / "grid.png").write_bytes(event.encoded_image_string)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    [(key, step, same)] = pictures.pictures
    assert (key, step) == ("rollouts", 2) and (same == pixels).all()
    for score in (0.9, 0.1, 0.8, 0.2):
        assert (pixels == round(score * 255)).all(axis=2).sum() > 500
    for score in (0.5, 0.3):
        assert (pixels == round(score * 255)).all(axis=2).sum() < 30
