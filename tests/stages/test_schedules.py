"""Any class of schedule: lengths below 1 are refused, resuming goes on, and a plateau gets its metric."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.utils.data import DataLoader

from simplear.errors import UserError
from simplear.stages import CosineWithWarmup
from simplear.stages.optimized import OptimizedModule, make_schedule
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
        (functools.partial(lr_scheduler.StepLR, step_size=0), "step_size of StepLR is 0"),
        (functools.partial(CosineWithWarmup, total_steps=-1), "total_steps -1"),
        (lambda optimizer: lr_scheduler.PolynomialLR(optimizer, -1), "total_iters of PolynomialLR is -1"),
    ],
)
def test_what_has_no_length_is_refused(schedule: Factory, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_schedule(schedule, SGD([torch.zeros(1, requires_grad=True)], lr=LR))


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
    if name not in ("cyclic", "sequence"):  # which keep their arguments elsewhere
        with pytest.raises(UserError, match="the run to resume has a schedule"):
            fit(Toy(SCHEDULES[name](11)), tmp_path, 8, resume=state)


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
        ("loss", {}, "monitor 'loss' is not logged: .* its monitor: validation/loss"),
        ("validation/loss", {"limit_val_batches": 0}, "there is none: give --data.init_args.validation_paths"),
    ],
)
def test_a_plateau_without_its_metric_is_refused(
    tmp_path: Path, monitor: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fit(Toy(functools.partial(ReduceLROnPlateau, monitor=monitor)), tmp_path, 4, **options)


def test_a_rate_that_is_configured_anew_goes_before_the_saved_one(tmp_path: Path) -> None:
    """Without a schedule it is trained with; with one, which began at the old rate, it is refused."""
    state = tmp_path / "state.ckpt"
    faster = functools.partial(AdamW, lr=2 * LR, weight_decay=0.3)
    fit(Toy(), tmp_path, 2).save_checkpoint(state)
    trainer = fit(resumed := Toy(optimizer=faster), tmp_path, 4, resume=state)
    assert resumed.rates == [2 * LR] * 2
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0.3, 0.0]
    schedule = SCHEDULES["polynomial"](8)
    fit(Toy(schedule), tmp_path, 2).save_checkpoint(state)
    with pytest.raises(UserError, match=r"a schedule with base_lrs = \[0\.02, 0\.02\], now \[0\.04, 0\.04\]"):
        fit(Toy(schedule, faster), tmp_path, 4, resume=state)
