"""Base of the stages: optimizer and schedule by class_path, and what happens to their settings on resuming.

Lightning's LearningRateFinder asks for an attribute ``lr``, which is that of the optimizer here: it sets all groups to
the rate that it found, and the schedule is made from that rate.
"""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from simplear.data.training.ordered_data import OrderedDataModule
from simplear.device import limit_threads
from simplear.errors import UserError
from simplear.stages.averaging import check_averaging
from simplear.stages.gradient_norm import GradientNorm
from simplear.stages.optimizers import apply_settings, group_settings, parameter_groups
from simplear.stages.schedules import PlateauSteps, make_schedule, require_same_schedule, schedule_settings

logger = logging.getLogger(__name__)


class OptimizedModule(LightningModule):
    """A stage that trains one module.

    Args:
        optimizer: makes an optimizer from parameter groups.
        lr_scheduler: makes a schedule, stepped every optimizer step, from an optimizer; None keeps the rate constant.
    """

    inner_updates = 1
    """Optimizer steps on each batch of the data."""

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self._schedule: Any = None
        self._configured: list[dict[str, Any]] | None = None
        """Settings of each parameter group that are no schedule's; None before there is an optimizer."""
        self._scheduled: list[dict[str, Any]] = []
        """What the schedule adds to them when it is made."""
        self._lr, self._found_lr = 0.0, False
        self._zero_since: int | None = None
        """Optimizer step since which the schedule's rate is 0; None while it is not."""

    @property
    def trained_module(self) -> nn.Module:
        """What the optimizer updates."""
        raise NotImplementedError

    @property
    def lr(self) -> float:
        """Learning rate that is configured, of the first parameter group; set by a finder, of all."""
        return self._lr

    @lr.setter
    def lr(self, rate: float) -> None:
        self._lr, self._found_lr = rate, True

    def configure_callbacks(self) -> list[Callback]:
        """Steps of schedules that wait for a metric, and where there is a logger, curves of rate and gradient norm.

        Refuses what cannot work before anything is built.
        """
        if self._finder is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise UserError(
                "LearningRateFinder does not go with FSDP2, under which a state cannot be taken back while training: "
                "find the rate with a smaller model on one device (--trainer.strategy auto)."
            )
        check_averaging(self.trainer)
        curves = [LearningRateMonitor(), *([GradientNorm()] if self.automatic_optimization else [])]
        present: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        absent = [curve for curve in curves if not any(isinstance(each, type(curve)) for each in present)]
        return [PlateauSteps(), *(absent if self.trainer.loggers else [])]

    def configure_optimizers(self) -> Any:
        """The optimizer over `parameter_groups`, and the schedule if there is one."""
        try:
            optimizer: Any = self.optimizer(parameter_groups(self.trained_module))  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"--model.init_args.optimizer: {error}") from error
        # Lightning clips no gradients for fused optimizers under bf16-mixed, since they could undo a scaling by
        # themselves; there is none, and where there is one the scaler undoes it first for those that say they cannot.
        optimizer._step_supports_amp_scaling = False
        self._lr = optimizer.param_groups[0]["lr"]
        if self._trainer is not None and self.trainer.strategy.root_device.type == "cpu":
            limit_threads(sum(weight.numel() for group in optimizer.param_groups for weight in group["params"]))
        if self._finder is not None and len({group["lr"] for group in optimizer.param_groups}) > 1:
            raise UserError(
                f"LearningRateFinder finds one rate, and {type(optimizer).__name__} has several: leave it out, or use "
                "torch.optim.AdamW."
            )
        self._make_schedule(optimizer)
        if self._schedule is None:
            return optimizer
        scheduler = {"scheduler": self._schedule, "interval": "step"}
        if self.automatic_optimization:
            scheduler["reduce_on_plateau"] = False  # a matter of `PlateauSteps`
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _make_schedule(self, optimizer: Any) -> None:
        """Make the schedule, if there is one, and note what is configured by whom."""
        before = group_settings(optimizer)
        self._configured, self._scheduled = before, [{} for _ in before]
        if self.lr_scheduler is None:
            return
        self._schedule = make_schedule(self.lr_scheduler, optimizer, self._steps_remedy())
        self._schedule_settings = schedule_settings(self._schedule)
        after = group_settings(optimizer)
        self._configured = [
            {key: value for key, value in old.items() if key != "lr" and new[key] == value}
            for old, new in zip(before, after, strict=True)
        ]
        self._scheduled = [
            {key: value for key, value in new.items() if key not in old} for old, new in zip(before, after, strict=True)
        ]

    def _steps_remedy(self) -> str:
        """How to give a schedule its number of steps."""
        trainer = self._trainer
        if trainer is None or trainer.max_steps >= 0:
            return "It counts optimizer steps: give their number."
        data = getattr(trainer, "datamodule", None)
        number, epochs = "their number", trainer.max_epochs or 0
        if isinstance(data, OrderedDataModule) and epochs > 0:
            steps = data.steps_per_epoch * self.inner_updates
            number = f"here {epochs} epochs × {steps} steps = {epochs * steps}"
        return (
            f"It counts optimizer steps, and --trainer.max_steps is {trainer.max_steps}: set that, or the schedule's "
            f"length, to the number of steps ({number})."
        )

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a schedule; see `PlateauSteps` for those that wait for a metric."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    @property
    def _finder(self) -> LearningRateFinder | None:
        callbacks = [] if self._trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, LearningRateFinder)), None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError, naming the file, for the state of another model. A sharded one is loaded before this."""
        # The finder's own state, which it loads when it is done, comes when there is an optimizer.
        if self._finder is not None and self._configured is None and self.trainer.state.fn == "fit":
            raise UserError(
                "LearningRateFinder finds the rate of a new training: to go on with one, leave it out and configure "
                "the rate that it found."
            )
        if self.trainer.state.fn == "fit" and "state_dict" in checkpoint and "optimizer_states" not in checkpoint:
            raise UserError(
                f"{self.trainer.ckpt_path} holds weights alone (save_weights_only), from which no training goes on: "
                "start a new one from the checkpoint directory beside it."
            )
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
        schedules = self.trainer.lr_scheduler_configs
        if [config.scheduler for config in schedules] != [self._schedule] * len(schedules):
            return  # a LearningRateFinder is at work
        self._zero_since = None
        if self._found_lr:
            for group, added in zip(optimizer.param_groups, self._scheduled, strict=True):
                group["lr"] = self.lr
                for key in added:
                    del group[key]
            self._make_schedule(optimizer)
            self._found_lr = False
            for config in schedules:
                config.scheduler = self._schedule
        if self._schedule is not None:
            require_same_schedule(self._schedule, self._schedule_settings)
        assert self._configured is not None
        for change in apply_settings(optimizer, self._configured, self._scheduled):
            if self.trainer.is_global_zero:
                logger.info("optimizer as configured, not as saved: %s", change)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Say where a schedule is over: a rate that is 0 for one step may be a cycle's or a warm-up's, for two not."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        if self._schedule is None or any(group["lr"] > 0 for group in optimizer.param_groups):
            self._zero_since = None
        elif self._zero_since is None:
            self._zero_since = self.global_step
        elif self._zero_since < self.global_step <= self._zero_since + self.inner_updates:
            rank_zero_warn(
                f"the schedule's learning rate is 0 from optimizer step {self._zero_since} on, so nothing is trained: "
                "end there (--trainer.max_steps), or start a new run with a longer schedule from the export"
            )
