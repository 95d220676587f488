"""Learning-rate schedules: that of the paper's released GRPO runs, and checks for any class of schedule.

A schedule is stepped once an optimizer step; one that waits for a metric to improve, once a validation.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from simplear.errors import UserError

LENGTHS = ("total_iters", "total_steps", "T_max", "step_size")
"""Arguments of torch's schedules that are a number of steps, at least 1; no number of any schedule is below 0."""


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
