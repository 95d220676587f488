"""Averaged weights: with Lightning's WeightAveraging, such as its EMA, what a training exports is the average.

Lightning's callback itself validates with the average, keeps both in its states, and ends with the average.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy

from simplear.errors import UserError


def _averaging(trainer: Trainer) -> list[WeightAveraging]:
    return [each for each in trainer.callbacks if isinstance(each, WeightAveraging)]  # type: ignore[attr-defined]


def check_averaging(trainer: Trainer) -> None:
    """Raises UserError where weights are to be averaged and sharded."""
    if _averaging(trainer) and isinstance(trainer.strategy, ModelParallelStrategy):
        raise UserError(
            "WeightAveraging (EMAWeightAveraging) copies the whole model, which FSDP2 shards: leave it out, or use "
            "--trainer.strategy ddp."
        )
    # It is said of every model that is built in configure_model, and no other strategy here shards.
    warnings.filterwarnings("ignore", "You're using the WeightAveraging callback with a model that overrides.*")


@contextmanager
def averaged_weights(trainer: Trainer) -> Iterator[None]:
    """Inside, the module has the averaged weights, if there are any; then its own again. Not while validating."""
    active = [each for each in _averaging(trainer) if each._average_model is not None]
    for callback in active:
        callback._swap_models(trainer.lightning_module)
    try:
        yield
    finally:
        for callback in active:
            callback._swap_models(trainer.lightning_module)
