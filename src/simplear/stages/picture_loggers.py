"""Pictures of a training, for every logger that takes some: TensorBoard, and any with W&B's ``log_image``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger


def picture_loggers(trainer: Trainer) -> list[Any]:
    """The trainer's loggers that take pictures; the same number on every rank."""
    return [each for each in trainer.loggers if isinstance(each, TensorBoardLogger) or hasattr(each, "log_image")]


def log_picture(trainer: Trainer, name: str, picture: npt.NDArray[np.uint8]) -> None:
    """Give a picture (H, W, 3) of this step to all of them, from the first rank."""
    for logger in picture_loggers(trainer) if trainer.is_global_zero else []:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, trainer.global_step, dataformats="HWC")
        else:
            logger.log_image(name, [picture], step=trainer.global_step)
