"""A progress bar over the optimizer steps of a whole training, with the time left.

Lightning's own bar starts over in each epoch. Without a terminal it is a line every few seconds.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from simplear.progress import progress_bar


class StageProgressBar(ProgressBar):
    """Counts optimizer steps to the last one.

    Args:
        stage: name shown at the left; the module's class name without "Module" if empty.
        metric: logged value to show, if there is one of that name.
    """

    def __init__(self, stage: str = "", metric: str = "train/loss") -> None:
        super().__init__()
        self.stage, self.metric = stage, metric
        self._shown = True

    def disable(self) -> None:
        self._shown = False

    def enable(self) -> None:
        self._shown = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        title = self.stage or type(pl_module).__name__.removesuffix("Module")
        self._bar = progress_bar(last_step(trainer), title, " steps", self._shown, initial=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        drawn = self._bar.update(trainer.global_step - self._bar.n)
        value = trainer.callback_metrics.get(self.metric)
        if drawn and value is not None:  # reading it waits for the device
            self._bar.set_postfix({self.metric.rpartition("/")[2]: f"{float(value):.3f}"})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_bar"):
            self._bar.close()


def last_step(trainer: Trainer) -> int | None:
    """The last optimizer step of the whole training, if it has one.

    `trainer.estimated_stepping_batches` may reload the data and lose its position.
    """
    epochs = trainer.max_epochs or -1
    in_epochs = int(trainer.num_training_batches // trainer.accumulate_grad_batches * epochs)
    return min((steps for steps in (trainer.max_steps, in_epochs) if steps >= 0), default=None)
