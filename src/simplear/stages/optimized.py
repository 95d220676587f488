"""Base of the stages: optimizer and schedule by class_path, and what happens to their settings on resuming.

A schedule is stepped once an optimizer step; one that waits for a metric to improve, once a validation.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from simplear.device import limit_threads
from simplear.errors import UserError
from simplear.stages.averaging import averaged_weights, check_averaging
from simplear.stages.optimizers import parameter_groups

logger = logging.getLogger(__name__)

KERNEL_SETTINGS = {"fused", "foreach"}
"""Of an optimizer: its restored state fits to the kernels that wrote it."""
LENGTHS = ("total_iters", "total_steps", "T_max", "step_size")
"""Arguments of torch's schedules that are a number of steps, at least 1; no number of any schedule is below 0."""


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


class CosineWithWarmup(LambdaLR):
    """Linear warm-up from 0, then half a cosine down to a share of the configured rate.

    Args:
        optimizer: its groups' learning rates are the highest.
        total_steps: optimizer steps in all; afterwards the rate stays at the end.
        warmup: share of the steps that warm up, in [0, 1).
        end: share of the rate at the end, in [0, 1].
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.1, end: float = 0.1) -> None:
        if total_steps < 1 or not 0 <= warmup < 1 or not 0 <= end <= 1:
            raise UserError(f"total_steps {total_steps}, warmup {warmup}, end {end}: need ≥ 1, [0, 1) and [0, 1].")
        self.total_steps, self.warmup, self.end = total_steps, warmup, end
        super().__init__(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        warm = self.warmup * self.total_steps
        if step < warm:
            return (step + 1) / (math.ceil(warm) + 1)
        progress = min((step - warm) / max(self.total_steps - warm, 1), 1.0)
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * progress)) / 2


def make_schedule(factory: Callable[[Optimizer], Any], optimizer: Optimizer) -> Any:
    """The schedule that a factory makes.

    Raises UserError for arguments that the class refuses, and for lengths with which torch's classes would stay at
    their first rate, or swing.
    """
    remedy = "It counts optimizer steps: give their number; ${trainer.max_steps} is -1 where epochs limit the training."
    try:
        scheduler = factory(optimizer)
    except ValueError as error:
        raise UserError(f"--model.init_args.lr_scheduler: {str(error).rstrip('.')}. {remedy}") from error
    for name, value in schedule_settings(scheduler).items():
        if type(value) is int and value < (1 if name in LENGTHS else 0):
            kind = type(scheduler).__name__
            raise UserError(f"--model.init_args.lr_scheduler: {name} of {kind} is {value}. {remedy}")
    return scheduler


def schedule_settings(scheduler: Any) -> dict[str, Any]:
    """Numbers, words and base rates that a schedule was made with, by the names of the arguments."""
    classes = type(scheduler).__mro__[:-1]
    names = {name for class_ in classes for name in inspect.signature(class_).parameters} | {"base_lrs"}
    attributes = {name.removeprefix("_"): value for name, value in vars(scheduler).items()}
    settings = {name: attributes.get(name) for name in names - {"last_epoch"}}
    return {
        name: value for name, value in settings.items() if isinstance(value, int | float | str) or name == "base_lrs"
    }


def require_same_schedule(scheduler: Any, configured: dict[str, Any]) -> None:
    """Raises UserError where a restored schedule is not the configured one, which its state has overwritten."""
    restored = schedule_settings(scheduler)
    for name, value in configured.items():
        if restored.get(name) != value:
            raise UserError(
                f"the run to resume has a schedule with {name} = {restored.get(name)}, now {value} is configured: set "
                "it back, or start a new run from the exported checkpoint."
            )


class PlateauSteps(Callback):
    """Steps a ReduceLROnPlateau once a validation, before the states of that validation are saved.

    Lightning would count epochs for it, which a training of a number of steps need not have, or optimizer steps.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises UserError if there is no validation."""
        without = getattr(getattr(trainer, "datamodule", None), "validation", ...) is None
        if _plateaus(trainer) and (without or not trainer.enable_validation):
            raise UserError(
                "ReduceLROnPlateau lowers the rate by a metric of the validation, and there is none: give "
                "--data.init_args.validation_paths, and leave --trainer.limit_val_batches above 0."
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for scheduler in [] if trainer.sanity_checking else _plateaus(trainer):
            monitor = getattr(scheduler, "monitor", None)
            value: Any = trainer.callback_metrics.get(str(monitor))
            if value is None:
                raise UserError(
                    f"ReduceLROnPlateau's monitor {monitor!r} is not logged: take "
                    "lightning.pytorch.cli.ReduceLROnPlateau, with one of these as its monitor: "
                    f"{', '.join(sorted(trainer.callback_metrics))}."
                )
            scheduler.step(trainer.strategy.reduce(value, reduce_op="mean"))


def _plateaus(trainer: Trainer) -> list[Any]:
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return [scheduler for scheduler in schedulers if isinstance(scheduler, ReduceLROnPlateau)]


class GradientNorm(Callback):
    """Logs ``train/gradient_norm``; every stage with automatic optimization has it, and GRPO measures its own."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Lightning clips after this."""
        pl_module.log("train/gradient_norm", gradient_norm(optimizer))


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """Euclidean norm over all gradients, scalar, shards of all ranks included; all ranks call together."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm: Any = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
