"""Any class of schedule: what has no length is refused, what is resumed goes on, what waits for a metric gets it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.utils.data import DataLoader

from simplear.errors import UserError
from simplear.stages import CosineWithWarmup, MuonWithAdamW
from simplear.stages.optimized import OptimizedModule
from simplear.stages.schedules import make_schedule
from toys import make_trainer

Factory = Callable[[Optimizer], Any]
LR = 0.02
DATA: Any = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


def warm_up_then_polynomial(optimizer: Optimizer, steps: int) -> lr_scheduler.SequentialLR:
    parts = [lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.PolynomialLR(optimizer, total_iters=steps)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (functools.partial(lr_scheduler.PolynomialLR, total_iters=-1), "total_iters of PolynomialLR is -1"),
        (functools.partial(lr_scheduler.PolynomialLR, total_iters=0), "total_iters of PolynomialLR is 0"),
        (functools.partial(lr_scheduler.LinearLR, total_iters=-1), "total_iters of LinearLR is -1"),
        (functools.partial(lr_scheduler.ConstantLR, total_iters=-3), "total_iters of ConstantLR is -3"),
        (functools.partial(lr_scheduler.CosineAnnealingLR, T_max=-1), "T_max of CosineAnnealingLR is -1"),
        (functools.partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=-1), "T_0, but got -1"),
        (functools.partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=-1), "total_steps, but got -1"),
        (functools.partial(lr_scheduler.OneCycleLR, max_lr=1.0), "total_steps OR"),
        (
            functools.partial(lr_scheduler.CyclicLR, base_lr=0.1, max_lr=1.0, step_size_up=-1),
            "step_size_up of CyclicLR",
        ),
        (functools.partial(lr_scheduler.StepLR, step_size=0), "step_size of StepLR is 0"),
        (functools.partial(lr_scheduler.MultiStepLR, milestones=[2, -1]), r"milestones of MultiStepLR is \[2, -1\]"),
        (functools.partial(CosineWithWarmup, total_steps=-1), "total_steps -1"),
        (functools.partial(warm_up_then_polynomial, steps=-1), "steps of SequentialLR is -1"),
        (
            lambda optimizer: warm_up_then_polynomial(optimizer, -1),
            r"schedulers\[1\]\.total_iters of SequentialLR is -1",
        ),
        (lambda optimizer: lr_scheduler.PolynomialLR(optimizer, -1), "total_iters of PolynomialLR is -1"),
        (lr_scheduler.ReduceLROnPlateau, r"lightning\.pytorch\.cli\.ReduceLROnPlateau and its monitor"),
    ],
)
def test_what_has_no_length_or_metric_is_refused(schedule: Factory, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_schedule(schedule, SGD([torch.zeros(1, requires_grad=True)], lr=LR), "How many?")


class Toy(OptimizedModule):
    """A linear layer, and the rate of each step."""

    def __init__(self, schedule: Factory | None = None, optimizer: Any = None) -> None:
        super().__init__(optimizer or functools.partial(AdamW, lr=LR), schedule)
        self.layer = nn.Linear(32, 2)
        self.rates: list[float] = []

    @property
    def trained_module(self) -> nn.Module:
        return self.layer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("validation/loss", 1.0 + (self.global_step // 2) % 3)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(DATA, batch_size=2)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(DATA[:4], batch_size=2)


def fit(module: Toy, directory: Path, steps: int, resume: Path | None = None, **options: Any) -> Trainer:
    options = {"max_epochs": -1, "val_check_interval": 2, "check_val_every_n_epoch": None, **options}
    trainer = make_trainer(directory, max_steps=steps, num_sanity_val_steps=2, **options)
    trainer.fit(module, ckpt_path=resume)
    return trainer


SCHEDULES: dict[str, Callable[[int], Factory]] = {
    "polynomial": lambda n: functools.partial(lr_scheduler.PolynomialLR, total_iters=n),
    "cosine": lambda n: functools.partial(lr_scheduler.CosineAnnealingLR, T_max=n),
    "restarts": lambda n: functools.partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=n),
    "one cycle": lambda n: functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=2 * n),
    "cyclic": lambda n: functools.partial(
        lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1 * n, step_size_up=3, cycle_momentum=False
    ),
    "warm-up": lambda n: functools.partial(CosineWithWarmup, total_steps=n),
    "sequence": lambda n: functools.partial(warm_up_then_polynomial, steps=n),
    "plateau": lambda n: functools.partial(ReduceLROnPlateau, monitor="validation/loss", patience=n % 2),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_schedule_goes_on_and_another_one_is_refused(tmp_path: Path, name: str) -> None:
    whole, first, rest = (Toy(SCHEDULES[name](8)) for _ in range(3))
    fit(whole, tmp_path, 8)
    state = tmp_path / "state.ckpt"
    fit(first, tmp_path, 4).save_checkpoint(state)
    fit(rest, tmp_path, 8, resume=state)
    assert first.rates + rest.rates == whole.rates and len(set(whole.rates)) > 1
    if name != "cyclic":  # which keeps no argument but in the optimizer
        with pytest.raises(UserError, match="the run to resume has a schedule"):
            fit(Toy(SCHEDULES[name](11)), tmp_path, 8, resume=state)


def test_steps_at_a_rate_of_zero_are_not_silent(tmp_path: Path) -> None:
    """Neither in a training that outlasts its schedule nor in a longer one after its end; a cycle passes through 0."""
    ended = functools.partial(lr_scheduler.PolynomialLR, total_iters=4)
    state = tmp_path / "state.ckpt"
    fit(Toy(ended), tmp_path, 4).save_checkpoint(state)
    for resume in (state, None):
        with pytest.warns(UserWarning, match="rate is 0 from optimizer step 4 on, so nothing is trained"):
            fit(Toy(ended), tmp_path, 8, resume=resume)
    cycle = Toy(functools.partial(lr_scheduler.CosineAnnealingLR, T_max=4))
    fit(Toy(cycle.lr_scheduler), tmp_path, 4).save_checkpoint(state)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rate is 0")
        fit(cycle, tmp_path, 8, resume=state)
    assert cycle.rates[0] == 0 and max(cycle.rates) > 0


def test_a_plateau_is_stepped_once_a_validation(tmp_path: Path) -> None:
    """As torch's class by hand, whatever the epochs are; the sanity check is no validation."""
    module = Toy(functools.partial(ReduceLROnPlateau, monitor="validation/loss", patience=0))
    fit(module, tmp_path, 12)
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    by_hand = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    expected = []
    for step in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        if (step + 1) % 2 == 0:
            by_hand.step(1.0 + ((step + 1) // 2) % 3)
    assert module.rates == expected and len(set(expected)) > 2


@pytest.mark.parametrize(
    ("monitor", "options", "message"),
    [
        ("loss", {}, "monitor 'loss' is not logged; these are: validation/loss"),
        ("validation/loss", {"limit_val_batches": 0}, "there is none: give --data.init_args.validation_paths"),
    ],
)
def test_a_plateau_without_its_metric_is_refused(
    tmp_path: Path, monitor: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fit(Toy(functools.partial(ReduceLROnPlateau, monitor=monitor)), tmp_path, 4, **options)


@pytest.mark.parametrize("schedule", [None, *(SCHEDULES[name](6) for name in ("polynomial", "warm-up"))])
def test_a_found_rate_trains_as_one_that_is_configured(tmp_path: Path, schedule: Factory | None) -> None:
    """The finder's steps leave no trace but the rate, from which the schedule begins too."""
    found = Toy(schedule)
    torch.manual_seed(0)
    found.layer.reset_parameters()
    fit(found, tmp_path, 6, callbacks=[LearningRateFinder(num_training_steps=30, max_lr=0.1)])
    configured = Toy(schedule, functools.partial(AdamW, lr=found.lr))
    torch.manual_seed(0)
    configured.layer.reset_parameters()
    fit(configured, tmp_path, 6)
    assert found.lr != LR and found.rates[-6:] == configured.rates
    assert torch.equal(found.layer.weight, configured.layer.weight)


def test_where_no_rate_can_be_found_the_finder_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.ckpt"
    fit(Toy(), tmp_path, 2).save_checkpoint(state)
    with pytest.raises(UserError, match="leave it out and configure the rate that it found"):
        fit(Toy(), tmp_path, 4, resume=state, callbacks=[LearningRateFinder()])
    with pytest.raises(UserError, match="MuonWithAdamW has several"):
        fit(Toy(optimizer=MuonWithAdamW), tmp_path, 4, callbacks=[LearningRateFinder()])
