"""Base of the stages: optimizer and schedule by class_path, and what happens to their settings on resuming."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from simplear.errors import UserError
from simplear.stages.optimizers import (
    apply_settings,
    group_settings,
    parameter_groups,
    require_same_schedule,
    schedule_settings,
)

logger = logging.getLogger(__name__)


class OptimizedModule(LightningModule):
    """A stage that trains one module.

    Args:
        optimizer: makes an optimizer from parameter groups.
        lr_scheduler: makes a schedule, stepped every optimizer step, from an optimizer; None keeps the rate constant.
    """

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler

    @property
    def trained_module(self) -> nn.Module:
        """What the optimizer updates."""
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        """The optimizer over `parameter_groups`, and the schedule if there is one."""
        optimizer: Any = self.optimizer(parameter_groups(self.trained_module))  # type: ignore[arg-type]
        # Lightning clips no gradients for fused optimizers under bf16-mixed, since they could undo a scaling by
        # themselves; there is none, and where there is one the scaler undoes it first for those that say they cannot.
        optimizer._step_supports_amp_scaling = False
        self._optimizer_settings = group_settings(optimizer)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        self._schedule_settings = schedule_settings(scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError, naming the file, for the state of another model. A sharded one is loaded before this."""
        saved = {name: tuple(weight.shape) for name, weight in checkpoint.get("state_dict", {}).items()}
        own = {name: tuple(weight.shape) for name, weight in self.state_dict().items()}
        others = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
        if saved and others:
            name = others[0]
            raise UserError(
                f"{self.trainer.ckpt_path} is the state of another model: {len(others)} weights differ, such as "
                f"{name}: {saved.get(name, 'absent')} there, {own.get(name, 'absent')} here. Use the configuration "
                "that it was trained with, or begin anew: without --ckpt_path, in another --trainer.default_root_dir."
            )

    def on_train_start(self) -> None:
        """After resuming, what is configured goes before what the optimizer's state remembers."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        if self.lr_scheduler is not None:
            require_same_schedule(self.lr_schedulers(), self._schedule_settings)
        for change in apply_settings(optimizer, self._optimizer_settings, scheduled=self.lr_scheduler is not None):
            if self.trainer.is_global_zero:
                logger.info("optimizer as configured, not as saved: %s", change)
