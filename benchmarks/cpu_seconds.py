"""A callback that logs the processor time that training takes, evaluation and checkpoints left out."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class CPUSeconds(Callback):
    """Logs ``cpu_seconds``, summed over all threads of this process and over all runs of a training.

    Other processes on the machine change it far less than they change the time of day, but not by nothing: threads that
    wait for each other are busy while they wait.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._begin = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begin = time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds += time.process_time() - self._begin
        for logger in trainer.loggers:
            logger.log_metrics({"cpu_seconds": self.seconds}, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]
