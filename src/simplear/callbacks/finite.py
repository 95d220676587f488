"""A loss or gradient that is no number stops the training, or its step is left out, and the batch is named.

The gradient's norm is looked at, which all ranks share: where one rank's loss is not finite, the reduced gradient is
not on any. So all stop, or leave the step out, together. Each rank that has such a loss writes the keys of its batch to
a file of its own. Looking takes one synchronisation with the device an optimizer step.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from simplear.atomic import whole_file
from simplear.errors import UserError
from simplear.stages.gradient_norm import GradientNorm, gradient_norm

logger = logging.getLogger(__name__)

KEYS_IN_MESSAGE = 4


class FiniteGradients(GradientNorm):
    """Looks at each gradient before the optimizer does, beside logging its norm.

    Args:
        on_failure: ``stop`` raises, naming keys; ``skip`` leaves the optimizer step out, counts it in the curve
            ``train/skipped_steps``, and goes on. A skipped step counts as a step, and its schedule moves on.
        most_skipped: consecutive steps that may be skipped; one more stops.
    """

    def __init__(self, on_failure: Literal["stop", "skip"] = "stop", most_skipped: int = 10) -> None:
        if on_failure not in ("stop", "skip"):
            raise UserError(f"on_failure {on_failure!r} must be 'stop' or 'skip'.")
        if most_skipped < 1:
            raise UserError(f"most_skipped {most_skipped} must be at least 1.")
        self.on_failure, self.most_skipped = on_failure, most_skipped
        self.skipped = 0
        """Steps left out over all runs of this training."""
        self._in_turn = 0
        self._keys: list[list[Any]] = []
        """Of the micro-batches of this optimizer step."""
        self._losses: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises ValueError under loss scaling, where gradients that are not finite are the rule."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise UserError(
                "FiniteGradients does not go with loss scaling (--trainer.precision 16-mixed), which finds and leaves "
                "out such steps itself: remove it, or take bf16-mixed."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        keys = batch.get("keys") if isinstance(batch, dict) else None
        self._keys.append(list(keys or []))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.fit_loop._should_accumulate():
            self._keys, self._losses = [], []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        norm = float(gradient_norm(optimizer))
        if math.isfinite(norm):
            self._in_turn = 0
            pl_module.log("train/gradient_norm", norm)
        else:
            self._fail(trainer, norm)
            # Without gradients no optimizer changes anything, its moments and its weight decay included.
            optimizer.zero_grad(set_to_none=True)
        if self.on_failure == "skip":
            pl_module.log("train/skipped_steps", float(self.skipped))

    def _fail(self, trainer: Trainer, norm: float) -> None:
        losses = [float(loss) for loss in self._losses]
        at_fault = [place for place, loss in enumerate(losses) if not math.isfinite(loss)]
        file = Path(trainer.default_root_dir) / f"not-finite-step{trainer.global_step}-rank{trainer.global_rank}.json"
        keys = self._keys
        # With every loss finite on all ranks it was in the backward pass, and may be of any batch.
        named = keys if len(keys) != len(losses) or not at_fault else [keys[place] for place in at_fault]
        known: Any = trainer.strategy.reduce_boolean_decision(bool(at_fault), all=False)
        if at_fault or not known:
            found = {"step": trainer.global_step, "rank": trainer.global_rank, "gradient_norm": str(norm)}
            report = {**found, "losses": [str(loss) for loss in losses], "keys": named}
            with whole_file(file) as partial:
                partial.write_text(json.dumps(report, indent=1))
            first = ", ".join(str(key) for part in named for key in part[:KEYS_IN_MESSAGE])
            where = f"in this rank's batch of {first}… (all of its keys: {file})"
        else:
            where = "in another rank's batch, whose message names it"
        self.skipped += 1
        self._in_turn += 1
        message = f"the loss or gradient of step {trainer.global_step} is not finite, {where}"
        if self.on_failure == "stop" or self._in_turn > self.most_skipped:
            raise UserError(
                f"{message}. Look at these rows, lower the learning rate and resume from the last state, or leave such "
                "steps out (on_failure: skip of simplear.callbacks.FiniteGradients)."
            )
        logger.warning("%s; the step is left out, %d so far", message, self.skipped)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps left out."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped = state_dict["skipped"]
