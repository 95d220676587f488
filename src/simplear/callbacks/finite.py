"""A loss or gradient that is not finite stops the training, or its step is left out, and the batch is named.

The gradient's norm is checked, which all ranks share: if one rank's loss is not finite, the reduced gradient is not
finite on any. So all stop, or leave the step out, together. Each rank with such a loss names the keys of its batch.
Checking takes one synchronisation with the device an optimizer step.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from simplear.errors import UserError
from simplear.stages.optimized import GradientNorm, gradient_norm

logger = logging.getLogger(__name__)

MOST_SKIPPED = 10
"""Consecutive steps that may be skipped; one more stops."""


class FiniteGradients(GradientNorm):
    """Checks each gradient before the optimizer steps, and logs its norm.

    Args:
        on_failure: ``stop`` raises, naming keys; ``skip`` leaves the optimizer step out, counts it in the curve
            ``train/skipped_steps``, and continues, up to `MOST_SKIPPED` times in a row. A skipped step counts as a
            step, and its schedule moves on.
    """

    def __init__(self, on_failure: Literal["stop", "skip"] = "stop") -> None:
        self.on_failure = on_failure
        self.skipped = 0
        """Steps left out since this process began."""
        self._consecutive = 0
        self._batches: list[tuple[list[Any], Tensor]] = []
        """Keys and loss of the micro-batches of this optimizer step."""
        self._keys: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises ValueError under loss scaling, which produces gradients that are not finite on purpose."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise UserError(
                "FiniteGradients does not go with loss scaling (--trainer.precision 16-mixed), which finds and leaves "
                "out such steps itself: remove it, or take bf16-mixed."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._keys = list((batch.get("keys") if isinstance(batch, dict) else None) or [])

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._batches.append((self._keys, loss.detach()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        norm = float(gradient_norm(optimizer))
        batches, self._batches = self._batches, []
        if math.isfinite(norm):
            self._consecutive = 0
            pl_module.log("train/gradient_norm", norm)
        else:
            self._fail(trainer, batches)
            # Without gradients no optimizer changes anything, its moments and its weight decay included.
            optimizer.zero_grad(set_to_none=True)
        if self.on_failure == "skip":
            pl_module.log("train/skipped_steps", float(self.skipped))

    def _fail(self, trainer: Trainer, batches: list[tuple[list[Any], Tensor]]) -> None:
        at_fault = [keys for keys, loss in batches if not loss.isfinite()]
        known: Any = trainer.strategy.reduce_boolean_decision(bool(at_fault), all=False)
        if at_fault or not known:  # with finite losses on all ranks it may be any batch
            keys = ", ".join(str(key) for part in at_fault or [keys for keys, _ in batches] for key in part)
            where = f"in this rank's batch of {keys}"
        else:
            where = "in another rank's batch, whose message names it"
        self.skipped += 1
        self._consecutive += 1
        message = f"the loss or gradient of step {trainer.global_step} is not finite, {where}"
        if self.on_failure == "stop" or self._consecutive > MOST_SKIPPED:
            raise UserError(
                f"{message}. Look at these rows, lower the learning rate and resume from the last state, or leave such "
                "steps out (on_failure: skip of simplear.callbacks.FiniteGradients)."
            )
        logger.warning("%s; the step is left out, %d so far", message, self.skipped)
