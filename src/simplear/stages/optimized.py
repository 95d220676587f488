"""Base of the stages: optimizer and schedule by class_path, and what happens to their settings on resuming."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from simplear.device import limit_threads
from simplear.errors import UserError
from simplear.stages.averaging import averaged_weights, check_averaging
from simplear.stages.gradient_norm import GradientNorm
from simplear.stages.optimizers import parameter_groups
from simplear.stages.schedules import PlateauSteps, make_schedule, require_same_schedule, schedule_settings

logger = logging.getLogger(__name__)

KERNEL_SETTINGS = {"fused", "foreach"}
"""Of an optimizer: its restored state fits to the kernels that wrote it."""


class OptimizedModule(LightningModule):
    """A stage that trains one module.

    Args:
        optimizer: makes an optimizer from parameter groups.
        lr_scheduler: makes a schedule, stepped every optimizer step, from an optimizer; None keeps the rate constant.
        export_dir: where `export` writes the trained module when training ends; None writes nothing.
    """

    def __init__(
        self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None, export_dir: str | None = None
    ) -> None:
        super().__init__()
        self.export_dir = export_dir
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self._schedule: Any = None
        self._schedule_settings: dict[str, Any] = {}
        self._configured_groups: list[dict[str, Any]] = []
        """Settings of each parameter group that the schedule does not change."""

    @property
    def trained_module(self) -> nn.Module:
        """What the optimizer updates."""
        raise NotImplementedError

    def export(self, directory: str) -> None:
        """Write what was trained; of stages with an ``export_dir``."""
        raise NotImplementedError

    def on_fit_end(self) -> None:
        """Export; also when a training is started again that had only this left to do."""
        trained = self.global_step and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.export_dir is not None and self.trainer.is_global_zero and trained:
            with averaged_weights(self.trainer):
                self.export(self.export_dir)

    def configure_callbacks(self) -> list[Callback]:
        """Steps of schedules that wait for a metric and, where there is a logger, curves of rate and gradient norm."""
        present: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(each, LearningRateFinder) for each in present):
            raise UserError("LearningRateFinder is not supported: configure a rate (--model.init_args.optimizer).")
        check_averaging(self.trainer)
        curves = [LearningRateMonitor(), *([GradientNorm()] if self.automatic_optimization else [])]
        absent = [curve for curve in curves if not any(isinstance(each, type(curve)) for each in present)]
        return [PlateauSteps(), *(absent if self.trainer.loggers else [])]

    def configure_optimizers(self) -> Any:
        """The optimizer over `parameter_groups`, and the schedule if there is one."""
        try:
            optimizer: Any = self.optimizer(parameter_groups(self.trained_module))  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"--model.init_args.optimizer: {error}") from error
        # Lightning clips no gradients for fused optimizers under bf16-mixed, since they could undo a loss scaling by
        # themselves; bf16 has none, and under 16-mixed the scaler undoes it for optimizers that say they cannot.
        optimizer._step_supports_amp_scaling = False
        if self._trainer is not None and self.trainer.strategy.root_device.type == "cpu":
            limit_threads(sum(weight.numel() for group in optimizer.param_groups for weight in group["params"]))
        self._configured_groups = _group_settings(optimizer)
        if self.lr_scheduler is None:
            return optimizer
        self._schedule = make_schedule(self.lr_scheduler, optimizer)
        self._schedule_settings = schedule_settings(self._schedule)
        self._configured_groups = [
            {name: value for name, value in before.items() if name != "lr" and after[name] == value}
            for before, after in zip(self._configured_groups, _group_settings(optimizer), strict=True)
        ]
        scheduler = {"scheduler": self._schedule, "interval": "step"}
        if self.automatic_optimization:
            scheduler["reduce_on_plateau"] = False  # `PlateauSteps` does it
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a schedule; see `PlateauSteps` for those that wait for a metric."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError, naming the file, for the state of another model. A sharded one is loaded before this."""
        if self.trainer.state.fn == "fit" and "state_dict" in checkpoint and "optimizer_states" not in checkpoint:
            raise UserError(
                f"{self.trainer.ckpt_path} holds weights alone (save_weights_only), from which no training can be "
                "resumed: start a new one from the checkpoint directory beside it."
            )
        saved = {name: tuple(weight.shape) for name, weight in checkpoint.get("state_dict", {}).items()}
        own = {name: tuple(weight.shape) for name, weight in self.state_dict().items()}
        others = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
        if saved and others:
            name = others[0]
            raise UserError(
                f"{self.trainer.ckpt_path} is the state of another model: {len(others)} weights differ, such as "
                f"{name}: {saved.get(name, 'absent')} there, {own.get(name, 'absent')} here. Use the configuration "
                "that it was trained with, or start again: without --ckpt_path, in another --trainer.default_root_dir."
            )

    def on_train_start(self) -> None:
        """After resuming, configured settings take precedence over those in the optimizer's state."""
        if self._schedule is not None:
            require_same_schedule(self._schedule, self._schedule_settings)
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        log = rank_zero_only(logger.info)
        for group, configured in zip(optimizer.param_groups, self._configured_groups, strict=True):
            for name, value in configured.items():
                if group.get(name) != value:
                    log("optimizer as configured, not as saved: %s %s → %s", name, group.get(name), value)
                    group[name] = value


def _group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    left_out = KERNEL_SETTINGS | {"params"}
    return [{name: value for name, value in group.items() if name not in left_out} for group in optimizer.param_groups]
