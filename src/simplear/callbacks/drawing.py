"""What callbacks share that draw images during training: when, with which pipeline, and without leaving a trace.

Drawing changes nothing of the training: the engines take their randomness from seeds of their own, and the global
generators, which building a visual tokenizer would use, are put back as they were, as is each module's mode. All ranks
draw, because sharded weights are gathered by all of them together; what becomes of the images is for rank zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from simplear.errors import UserError
from simplear.generation import SimpleARPipeline
from simplear.stages.averaging import averaged_weights
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
        """Draw with the model as it is; runs on every rank."""
        raise NotImplementedError

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises ValueError when there is no visual tokenizer to draw with."""
        if getattr(pl_module, "visual_tokenizer_path", None) is None:
            raise UserError(
                f"{type(self).__name__} draws images, which takes a visual tokenizer: name its directory "
                "(--model.init_args.visual_tokenizer), or remove the callback."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed training has drawn at the step that it goes on from.
        self._drawn_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._draw_once(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw_once(trainer, pl_module)

    def _draw_once(self, trainer: Trainer, module: Any) -> None:
        """Draw, unless that was done at this step: with accumulation several batches make one."""
        if trainer.global_step == self._drawn_at:
            return
        self._drawn_at = trainer.global_step
        with isolate_rng(), averaged_weights(trainer), _evaluation_mode(module):
            if self._visual_tokenizer is None:
                self._visual_tokenizer = load_visual_tokenizer(str(module.visual_tokenizer_path), module.device)
            pipeline = SimpleARPipeline(
                module.language_model, module.text_tokenizer, module.checkpoint_settings(), self._visual_tokenizer
            )
            self.draw(trainer, pipeline)


@contextmanager
def _evaluation_mode(module: LightningModule) -> Iterator[None]:
    """Evaluation mode inside; afterwards each submodule has the mode that it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
