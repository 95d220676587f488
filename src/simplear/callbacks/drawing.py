"""Callbacks that show images during training: fixed prompts, the accuracy of scenes, and GRPO's rollouts.

Drawing does not change the training: the engines have their own seeds, and the global random generators, which
building a visual tokenizer would use, are restored, as is each module's mode. All ranks draw, because they gather
sharded weights together; only rank zero logs the images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import _ModuleMode
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from simplear.errors import UserError
from simplear.evaluation import Cell, draw_and_judge, image_grid, scene_result
from simplear.generation import SimpleARPipeline, pil_images
from simplear.scenes import evaluation_prompts
from simplear.stages.averaging import averaged_weights
from simplear.stages.picture_loggers import log_picture, picture_loggers
from simplear.visual_tokenizer import VisualTokenizer, load_visual_tokenizer


class DrawingCallback(Callback):
    """Calls `draw` every ``every_n_steps`` optimizer steps and at the end of training.

    Works with any module that has ``language_model``, ``text_tokenizer``, ``checkpoint_settings()`` and
    ``visual_tokenizer_path``.

    Args:
        every_n_steps: optimizer steps between drawings.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise UserError(f"every_n_steps {every_n_steps} must be at least 1.")
        self.every_n_steps = every_n_steps
        self._drawn_at = 0
        self._visual_tokenizer: VisualTokenizer | None = None

    def draw(self, trainer: Trainer, pipeline: SimpleARPipeline) -> None:
        """Draw with the current model; runs on every rank."""
        raise NotImplementedError

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises ValueError if there is no visual tokenizer to draw with."""
        if getattr(pl_module, "visual_tokenizer_path", None) is None:
            raise UserError(
                f"{type(self).__name__} draws images, which takes a visual tokenizer: name its directory "
                "(--model.init_args.visual_tokenizer), or remove the callback."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed training has already drawn at this step.
        self._drawn_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._draw_once(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw_once(trainer, pl_module)

    def _draw_once(self, trainer: Trainer, module: Any) -> None:
        """Draw, unless that was done at this step: with accumulation, several batches make one step."""
        if trainer.global_step == self._drawn_at:
            return
        self._drawn_at = trainer.global_step
        mode = _ModuleMode()
        mode.capture(module)
        with isolate_rng(), averaged_weights(trainer):
            module.eval()
            if self._visual_tokenizer is None:
                self._visual_tokenizer = load_visual_tokenizer(str(module.visual_tokenizer_path), module.device)
            pipeline = SimpleARPipeline(
                module.language_model, module.text_tokenizer, module.checkpoint_settings(), self._visual_tokenizer
            )
            self.draw(trainer, pipeline)
        mode.restore(module)


class SampleImages(DrawingCallback):
    """Draws the same prompts from the same seeds each time, into the loggers as ``samples``.

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
        self.prompts, self.guidance_scale, self.seed, self.image_size = prompts, guidance_scale, seed, image_size

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As `DrawingCallback`; warns if no logger takes pictures."""
        super().on_fit_start(trainer, pl_module)
        if not picture_loggers(trainer):
            rank_zero_warn(
                "SampleImages draws nothing: the trainer has no TensorBoardLogger, WandbLogger or other logger that "
                "takes pictures (--trainer.logger)."
            )

    def draw(self, trainer: Trainer, pipeline: SimpleARPipeline) -> None:
        # Loggers are the same on every rank, so either all ranks return here or none.
        if not picture_loggers(trainer):
            return
        seeds = [self.seed + number for number in range(len(self.prompts))]
        images: Any = pipeline(self.prompts, guidance_scale=self.guidance_scale, seed=seeds).images
        cells = [Cell(prompt, (image,)) for prompt, image in zip(self.prompts, images, strict=True)]
        log_picture(trainer, "samples", np.asarray(image_grid({"": cells}, image_size=self.image_size)))


class SceneAccuracy(DrawingCallback):
    """Logs ``scenes/overall`` and ``scenes/`` each category; the intervals are those of `simplear evaluate scenes`.

    Args:
        every_n_steps: optimizer steps between evaluations; the end of training evaluates too.
        prompts_per_category: prompts of each of the six categories.
        guidance_scale: classifier-free guidance; None takes the default that the checkpoint will have.
        seed: of prompts and images; with the evaluation's own, prompts and images are the evaluation's.
        batch_size: images drawn at a time.
    """

    def __init__(
        self,
        every_n_steps: int,
        prompts_per_category: int = 10,
        guidance_scale: float | None = None,
        seed: int = 0,
        batch_size: int = 60,
    ) -> None:
        super().__init__(every_n_steps)
        self.prompts = evaluation_prompts(prompts_per_category, seed)
        self.guidance_scale, self.seed, self.batch_size = guidance_scale, seed, batch_size

    def draw(self, trainer: Trainer, pipeline: SimpleARPipeline) -> None:
        judged = draw_and_judge(
            pipeline,
            self.prompts,
            seed=self.seed,
            guidance_scale=self.guidance_scale,
            batch_size=self.batch_size,
        )
        values = {f"scenes/{category}": entry["accuracy"] for category, entry in scene_result(judged).items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)


class RolloutImages(Callback):
    """Logs the best and the worst image of the first groups of a GRPO rollout, as ``rollouts``.

    Args:
        every_n_steps: training steps between pictures.
        groups: captions shown.
        image_size: pixels of an image as shown.
    """

    def __init__(self, every_n_steps: int, groups: int = 4, image_size: int = 128) -> None:
        if every_n_steps < 1 or groups < 1:
            raise UserError(f"every_n_steps {every_n_steps} and groups {groups} must be at least 1.")
        self.every_n_steps, self.groups, self.image_size = every_n_steps, groups, image_size

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
