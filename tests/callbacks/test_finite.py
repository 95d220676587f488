"""A gradient that is no number changes no weight: training stops, or that step is as if it had not been."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from simplear.callbacks import FiniteGradients
from simplear.stages import MuonWithAdamW, parameter_groups
from simplear.stages.optimized import GradientNorm
from toys import make_trainer

SCRIPT = Path(__file__).with_name("fit_not_finite.py")
WAIT = 600


class Line(LightningModule):
    """Least squares on rows whose keys are their numbers; some of them are not finite."""

    def __init__(self, optimizer: str = "AdamW") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 2)
        self.optimizer = optimizer
        self.seen: list[Tensor] = []

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        return self.layer(batch["x"]).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(self.layer.weight.detach().clone())

    def configure_optimizers(self) -> Any:
        if self.optimizer == "Muon":
            return MuonWithAdamW(parameter_groups(self), lr=0.1)
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)


def rows(faulty: set[int], count: int = 24) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    made = [{"x": torch.randn(3, generator=generator), "keys": f"row{n}"} for n in range(count)]
    for number in faulty:
        made[number]["x"][1] = math.nan
    return DataLoader(made, batch_size=2)  # type: ignore[arg-type]


def test_stop_names_the_keys(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=4, accumulate_grad_batches=2, callbacks=[FiniteGradients()])
    line = Line()
    with pytest.raises(ValueError, match=r"step 1 is not finite, in this rank's batch of row6, row7\."):
        trainer.fit(line, rows({7}))
    assert torch.isfinite(line.layer.weight).all()


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_a_skipped_step_changes_nothing(tmp_path: Path, optimizer: str) -> None:
    """Weights and moments go on as if the batch had not been in the data."""
    callback, line, without = FiniteGradients("skip"), Line(optimizer), Line(optimizer)
    trainer = make_trainer(
        tmp_path, max_steps=12, callbacks=[callback], logger=CSVLogger(tmp_path), log_every_n_steps=1
    )
    trainer.fit(line, rows({6, 17}))
    assert callback.skipped == 2 and trainer.logged_metrics["train/skipped_steps"] == 2
    assert torch.equal(line.seen[3], line.seen[2]) and not torch.equal(line.seen[4], line.seen[3])
    clean = rows(set())
    kept = [n for n in range(24) if n // 2 not in (3, 8)]
    others = DataLoader([clean.dataset[n] for n in kept], batch_size=2)
    make_trainer(tmp_path / "without", max_steps=10).fit(without, others)
    assert torch.equal(line.layer.weight, without.layer.weight)


def test_too_many_in_turn_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simplear.callbacks.finite.MOST_SKIPPED", 2)
    trainer = make_trainer(tmp_path, max_steps=12, callbacks=[FiniteGradients("skip")])
    with pytest.raises(ValueError, match="step 5 is not finite"):
        trainer.fit(Line(), rows({6, 8, 10}))


@pytest.mark.parametrize("callback", [FiniteGradients, GradientNorm])
def test_the_norm_is_that_before_clipping(tmp_path: Path, callback: Any) -> None:
    logged = []
    for clip in (None, 1e-3):
        trainer = make_trainer(
            tmp_path,
            max_steps=1,
            callbacks=[callback()],
            gradient_clip_val=clip,
            logger=CSVLogger(tmp_path),
            log_every_n_steps=1,
        )
        line = Line()
        weights = [weight.detach().clone().requires_grad_() for weight in line.layer.parameters()]
        trainer.fit(line, rows(set()))
        logged.append(float(trainer.logged_metrics["train/gradient_norm"]))
    x = torch.stack([rows(set()).dataset[n]["x"] for n in range(2)])
    torch.nn.functional.linear(x, *weights).square().mean().backward()
    expected = math.sqrt(sum(float(weight.grad.square().sum()) for weight in weights))
    assert logged == pytest.approx([expected, expected], rel=1e-6)


def test_loss_scaling_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[FiniteGradients()])
    trainer.strategy.precision_plugin.scaler = object()
    with pytest.raises(ValueError, match="bf16-mixed"):
        trainer.fit(Line(), rows(set()))


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("on_failure", ["stop", "skip"])
def test_all_ranks_agree(tmp_path: Path, strategy: str, on_failure: str) -> None:
    """The row that is not finite is on rank 1 alone."""
    command = [sys.executable, str(SCRIPT), str(tmp_path), strategy, on_failure]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=WAIT)
    assert finished.stderr.count("in this rank's batch of row9, row11") == 1
    if on_failure == "stop":
        assert finished.returncode != 0
        assert finished.stderr.count("UserError: the loss or gradient of step 2") == 2
    else:
        assert finished.returncode == 0, finished.stderr[-2000:]
        assert [(tmp_path / f"skipped{rank}").read_text() for rank in range(2)] == ["1", "1"]
