"""What GRPO's policy draws: the best and the worst image of a group, with caption and score, into the loggers."""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from simplear.errors import UserError
from simplear.evaluation import Cell, image_grid
from simplear.generation import pil_images
from simplear.stages.picture_loggers import log_picture


class RolloutImages(Callback):
    """Shows the first groups of a rollout, as ``rollouts``.

    Args:
        every_n_steps: training steps between pictures.
        groups: captions shown.
        image_size: pixels of an image as shown.
    """

    def __init__(self, every_n_steps: int, groups: int = 4, image_size: int = 128) -> None:
        if every_n_steps < 1 or groups < 1:
            raise UserError(f"every_n_steps {every_n_steps} and groups {groups} must be at least 1.")
        self.every_n_steps, self.groups, self.image_size = every_n_steps, groups, image_size

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises TypeError for a stage without rollouts."""
        if not hasattr(pl_module, "last_rollout"):
            raise TypeError(f"RolloutImages shows rollouts, and {type(pl_module).__name__} has none: use SampleImages.")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.rollouts_done % self.every_n_steps or not trainer.is_global_zero:
            return
        rollout, size = pl_module.last_rollout, pl_module.group_size
        cells = []
        for start in range(0, min(self.groups * size, len(rollout.captions)), size):
            scores = rollout.scores[start : start + size]
            places = {"best": int(scores.argmax()), "worst": int(scores.argmin())}
            images = tuple(pil_images(rollout.images[[start + place for place in places.values()]].float().cpu()))
            labels = tuple(f"{name} {float(scores[place]):.2f}" for name, place in places.items())
            cells.append(Cell(rollout.captions[start], images, labels=labels))
        log_picture(trainer, "rollouts", np.asarray(image_grid({"": cells}, image_size=self.image_size)))
