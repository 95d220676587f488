"""Scene accuracy during training, to see when a model begins to follow its captions."""

from __future__ import annotations

from lightning.pytorch import Trainer

from simplear.callbacks.drawing import DrawingCallback
from simplear.evaluation import draw_and_judge, scene_result
from simplear.generation import SimpleARPipeline
from simplear.scenes import evaluation_prompts


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
        self.guidance_scale = guidance_scale
        self.seed = seed
        self.batch_size = batch_size

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
