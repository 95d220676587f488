"""Fixed prompts drawn during training, to watch a model learn."""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from simplear.callbacks.drawing import DrawingCallback
from simplear.errors import UserError
from simplear.evaluation import Cell, image_grid
from simplear.generation import SimpleARPipeline
from simplear.stages.picture_loggers import log_picture, picture_loggers


class SampleImages(DrawingCallback):
    """Draws the same prompts from the same seeds again and again, into the loggers as ``samples``.

    Args:
        prompts: captions to draw.
        every_n_steps: optimizer steps between drawings; the end of training draws too.
        guidance_scale: classifier-free guidance; None takes the default that the checkpoint will have.
        seed: of the first prompt; the k-th further one has this plus k.
        image_size: pixels of an image as shown.
    """

    def __init__(
        self,
        prompts: list[str],
        every_n_steps: int,
        guidance_scale: float | None = None,
        seed: int = 0,
        image_size: int = 128,
    ) -> None:
        super().__init__(every_n_steps)
        if not prompts:
            raise UserError("SampleImages has no prompts to draw.")
        self.prompts = prompts
        self.guidance_scale = guidance_scale
        self.seed = seed
        self.image_size = image_size

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As `DrawingCallback`, and says so when no logger takes pictures."""
        super().on_fit_start(trainer, pl_module)
        if not picture_loggers(trainer):
            rank_zero_warn(
                "SampleImages draws nothing: the trainer has no TensorBoardLogger, WandbLogger or other logger that "
                "takes pictures (--trainer.logger)."
            )

    def draw(self, trainer: Trainer, pipeline: SimpleARPipeline) -> None:
        # Loggers are the same on every rank, so all of them leave here or none.
        if not picture_loggers(trainer):
            return
        seeds = [self.seed + number for number in range(len(self.prompts))]
        images: Any = pipeline(self.prompts, guidance_scale=self.guidance_scale, seed=seeds).images
        cells = [Cell(prompt, (image,)) for prompt, image in zip(self.prompts, images, strict=True)]
        log_picture(trainer, "samples", np.asarray(image_grid({"": cells}, image_size=self.image_size)))
