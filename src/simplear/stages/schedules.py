"""Learning-rate schedules: that of the paper's released GRPO runs, and what holds for any class of schedule.

A schedule is stepped once an optimizer step; one that waits for a metric to improve, once a validation.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

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


def make_schedule(factory: Callable[[Optimizer], Any], optimizer: Optimizer, remedy: str) -> Any:
    """The schedule that a factory makes.

    Args:
        factory: of any class; jsonargparse's, a partial call, is looked into.
        optimizer: whose rate is scheduled.
        remedy: for a length that is missing.

    Raises UserError for arguments that the class refuses, and for lengths with which torch's classes would stay where
    they begin, or swing.
    """
    try:
        scheduler = factory(optimizer)
    except ValueError as error:
        raise UserError(f"--model.init_args.lr_scheduler: {str(error).rstrip('.')}. {remedy}") from error
    name = type(scheduler).__name__
    arguments = getattr(factory, "keywords", {})
    for key, value in {**arguments, **schedule_settings(scheduler)}.items():
        least = 1 if key.rpartition(".")[2] in LENGTHS else 0
        numbers = value if isinstance(value, list) else [value]
        if key != "last_epoch" and any(type(number) is int and number < least for number in numbers):
            raise UserError(f"--model.init_args.lr_scheduler: {key} of {name} is {value}. {remedy}")
    if isinstance(scheduler, ReduceLROnPlateau) and not hasattr(scheduler, "monitor"):
        raise UserError(
            f"{name} of torch is not told which metric to watch: name lightning.pytorch.cli.ReduceLROnPlateau and its "
            "monitor."
        )
    return scheduler


def schedule_settings(scheduler: Any) -> dict[str, Any]:
    """Numbers and words that a schedule, and those inside it, were made with, by the names of the arguments."""
    settings: dict[str, Any] = {}
    classes = [class_ for class_ in type(scheduler).__mro__ if "__init__" in vars(class_)]
    for name in {name: None for class_ in classes for name in inspect.signature(vars(class_)["__init__"]).parameters}:
        value = vars(scheduler).get(name, vars(scheduler).get(f"_{name}", ...))
        if isinstance(value, list | tuple | Mapping):
            members = list(value)
            for number, member in enumerate(members):
                if isinstance(member, LRScheduler):
                    inner = schedule_settings(member)
                    settings |= {f"{name}[{number}].{key}": setting for key, setting in inner.items()}
            value = members if all(isinstance(member, int | float) for member in members) else ...
        if name != "last_epoch" and isinstance(value, int | float | str | list | None):
            settings[name] = value
    return settings


def require_same_schedule(scheduler: Any, configured: dict[str, Any]) -> None:
    """Raises UserError where a restored schedule is not the configured one: its state would silently go first."""
    restored = schedule_settings(scheduler)
    for key, value in configured.items():
        if restored.get(key) != value:
            raise UserError(
                f"the run to resume has a schedule with {key} = {restored.get(key)}, now {value} is configured: set it "
                "back, or start a new run from the exported checkpoint."
            )


class PlateauSteps(Callback):
    """Steps a ReduceLROnPlateau once a validation, before the states of that validation are saved.

    Lightning counts epochs for it, which a training of so many steps need not have, or optimizer steps.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises UserError where no validation will ever step it."""
        without = getattr(getattr(trainer, "datamodule", None), "validation", ...) is None
        if _plateau(trainer) and (without or not trainer.enable_validation):
            raise UserError(
                "ReduceLROnPlateau lowers the rate by what a validation finds, and there is none: give "
                "--data.init_args.validation_paths, and leave --trainer.limit_val_batches above 0."
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scheduler = _plateau(trainer)
        if scheduler is None or trainer.sanity_checking:
            return
        value: Any = trainer.callback_metrics.get(scheduler.monitor)
        if value is None:
            raise UserError(
                f"ReduceLROnPlateau's monitor {scheduler.monitor!r} is not logged; these are: "
                f"{', '.join(sorted(trainer.callback_metrics))}."
            )
        scheduler.step(trainer.strategy.reduce(value, reduce_op="mean"))


def _plateau(trainer: Trainer) -> Any:
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return next((scheduler for scheduler in schedulers if isinstance(scheduler, ReduceLROnPlateau)), None)
