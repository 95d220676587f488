"""A progress bar for a whole training, with the time left; without a terminal, a line for every tenth of it.

A training without a last step (``max_time`` alone) has a line whenever the number of steps has doubled.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

LINES = 10
"""Lines in all where there is no terminal."""


class StageProgressBar(TQDMProgressBar):
    """Counts optimizer steps to the trainer's ``max_steps``; Lightning's own bar begins anew each epoch.

    Args:
        stage: name shown at the left; the module's class name without "Module" if empty.
        metric: logged value to show, if there is one of that name.
    """

    def __init__(self, stage: str = "", metric: str = "train/loss") -> None:
        super().__init__()
        self.stage, self.metric = stage, metric
        self._total: int | None = None
        self._first_step = 0
        self._started = 0.0
        self._lines = 0

    @property
    def is_disabled(self) -> bool:
        return not (self.is_enabled and sys.stdout.isatty())

    @property
    def train_description(self) -> str:
        return self.stage

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.total, bar.initial, bar.n = self._total, self._first_step, self._first_step
        return bar

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # type: ignore[override]
        self.stage = self.stage or type(pl_module).__name__.removesuffix("Module")
        self._total = _optimizer_steps(trainer)
        self._first_step = trainer.global_step
        self._started = time.monotonic()
        self._lines = self._lines_by(self._first_step)
        self.train_progress_bar = self.init_train_tqdm()

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """An epoch is nothing to the bar."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch is nothing to the bar."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        bar = self.train_progress_bar
        if not bar.disable:
            if step != bar.n:
                bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
                bar.n = step
                bar.refresh()
        elif self.is_enabled and self._lines_by(step) > self._lines:
            self._lines = self._lines_by(step)
            print(self._text(trainer, pl_module, step), flush=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:  # type: ignore[override]
        """The metric, if it has been logged; Lightning would also show a version number."""
        value = trainer.callback_metrics.get(self.metric)
        return {} if value is None else {self.metric.rpartition("/")[2]: f"{float(value):.3f}"}

    def _lines_by(self, step: int) -> int:
        return step.bit_length() if self._total is None else LINES * step // self._total

    def _text(self, trainer: Trainer, module: LightningModule, step: int) -> str:
        elapsed = time.monotonic() - self._started
        metrics = "".join(f", {name} {value}" for name, value in self.get_metrics(trainer, module).items())
        if self._total is None:
            return f"{self.stage}: step {step}, {Tqdm.format_interval(elapsed)} gone{metrics}"
        left = elapsed * (self._total - step) / (step - self._first_step)
        times = f"{Tqdm.format_interval(elapsed)} gone, {Tqdm.format_interval(left)} left"
        return f"{self.stage}: step {step} of {self._total} ({step / self._total:.0%}), {times}{metrics}"


def _optimizer_steps(trainer: Trainer) -> int | None:
    """Of the whole fit, if it has a last step. Not `trainer.estimated_stepping_batches`, which may reload the data and
    lose its position.
    """
    epochs = trainer.max_epochs or -1
    in_epochs = int(trainer.num_training_batches // trainer.accumulate_grad_batches * epochs)
    return min((steps for steps in (trainer.max_steps, in_epochs) if steps >= 0), default=None)
