"""What both DataModules share: loaders in the pure order, and the position in the data.

The position is the number of global batches consumed, and the DataModule's own state in a Lightning checkpoint. Each
micro-batch carries its running number, noted when a training step receives it; so prefetching workers do not matter,
and neither does `trainer.global_step`. Loaders begin at the position and never end by themselves: Lightning counts the
micro-batches of an epoch, and after a restart it goes on counting from where it was, with a fresh iterator. So epochs
that `limit_train_batches` cuts short take up the data one after another, and see all of it in turn; `overfit_batches`
repeats the first ones.

Resuming under another accumulation works too: Lightning's count of micro-batches within the epoch is put into the new
unit. A stage must not read `trainer.estimated_stepping_batches`: under sharded strategies that builds the loaders
before the position is restored.
"""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any

import lightning
import torch
from lightning.pytorch.loops.progress import _ProcessedTracker
from torch.utils.data import DataLoader, Dataset

from simplear.data.sample import as_made
from simplear.data.training.order import DataOrder, MicroBatch, MicroBatchSampler, Order
from simplear.errors import UserError

logger = logging.getLogger(__name__)

NAMED = 20
"""Samples that were replaced, of which each has a line of its own."""


class BatchDataset(Dataset[dict[str, Any]], ABC):
    """Rows in buckets that makes whole micro-batches, so that work on a batch is done once and not row by row."""

    bucket_sizes: tuple[int, ...]
    """Rows of each bucket; rows of one bucket have one shape."""

    def order(self, global_batch_size: int, seed: int, shuffle: bool, noun: str) -> Order:
        """All global batches; arguments as those of `DataOrder`."""
        return DataOrder(self.bucket_sizes, global_batch_size, seed, shuffle, noun)

    def order_settings(self) -> dict[str, Any]:
        """What the order is made of beside seed, batch size and shuffling; JSON values."""
        return {"rows": list(self.bucket_sizes)}

    @abstractmethod
    def make_batch(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """The batch of these positions; ``replaced`` has a text for each sample that another took the place of."""

    def __getitem__(self, micro_batch: MicroBatch) -> dict[str, Any]:
        return {**self.make_batch(micro_batch), "number": micro_batch.number}


class OrderedDataModule(lightning.LightningDataModule):
    """Base of the DataModules; subclasses set `training` and `validation` in ``setup``."""

    def __init__(self, global_batch_size: int, seed: int, num_workers: int, shuffle: bool) -> None:
        super().__init__()
        for name, value, least in (("global_batch_size", global_batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise UserError(f"--data.init_args.{name} {value} must be at least {least}.")
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.shuffle = shuffle
        self.training: BatchDataset | None = None
        self.validation: BatchDataset | None = None
        self._next_micro_batch = 0
        self._accumulation = 1
        self._restored: dict[str, Any] | None = None
        self.replaced: Counter[str] = Counter()
        """Samples that another took the place of on this rank, by key and reason."""

    def setup(self, stage: str | None = None) -> None:
        """Begin at the first batch; Lightning restores a saved position after this."""
        self._next_micro_batch = 0

    @property
    def global_batches_consumed(self) -> int:
        """Position in the data: global batches whose training step has ended, over all epochs."""
        in_flight = 0
        if self.trainer is not None:
            progress = _progress(self.trainer)
            in_flight = int(self.trainer.training and progress.ready > progress.processed)
        return (self._next_micro_batch - in_flight) // self._accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch, as the Trainer limits it; after setup."""
        assert self.training is not None and self.trainer is not None
        order = self.training.order(self.global_batch_size, self.seed, self.shuffle, "training rows")
        accumulation = self.trainer.accumulate_grad_batches
        return _limited(self.trainer, order.batches_per_epoch * accumulation) // accumulation

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {
            "global_batches": self.global_batches_consumed,
            "accumulate_grad_batches": self._accumulation,
            **self._order_settings(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position; it is compared with the configuration when training begins."""
        self._restored = state_dict
        self._accumulation = state_dict["accumulate_grad_batches"]
        self._next_micro_batch = state_dict["global_batches"] * self._accumulation

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Micro-batches of this rank, beginning at the position.

        Raises ValueError when the global batch does not divide over ranks and accumulation, and when the run being
        resumed had another order (seed, global batch size, rows).
        """
        assert self.training is not None, "setup() comes first."
        accumulation = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        sampler = self._sampler(self.training, self.shuffle, accumulation, endless=self.trainer is not None)
        if self.trainer is not None:
            self._check_limits(self.trainer, sampler)
            if self.trainer.overfit_batches:  # type: ignore[attr-defined]
                sampler.period = self.steps_per_epoch
        sampler.start = lambda: self.global_batches_consumed
        if self._restored is not None:
            self._require_same_order(self._restored)
            self._recount_micro_batches(self._restored["accumulate_grad_batches"], accumulation)
            self._restored = None
            # Lightning knows of resumable loaders alone, not of this position.
            warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
        consumed = self.global_batches_consumed
        self._accumulation = accumulation
        self._next_micro_batch = consumed * accumulation
        return self._loader(self.training, sampler)

    def val_dataloader(self) -> Any:
        """Micro-batches of this rank in the order of the files, the same at each validation; none without data."""
        if self.validation is None:
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero.*")
            return []
        accumulation = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return self._loader(self.validation, self._sampler(self.validation, False, accumulation, endless=False))

    def test_dataloader(self) -> Any:
        """The validation data."""
        return self.val_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the tensors; captions and metadata need no walk through them."""
        return {
            key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Note the position and take the running number out of the batch; say which samples were replaced."""
        number = batch.pop("number")
        for reason in batch.pop("replaced", ()):
            if reason not in self.replaced and len(self.replaced) < NAMED:
                logger.warning("%s: another takes its place", reason)
            self.replaced[reason] += 1
        if self.trainer is not None and self.trainer.training:
            self._next_micro_batch = number + 1
        return batch

    def teardown(self, stage: str) -> None:
        """Say how many samples were replaced."""
        if self.replaced:
            logger.warning("%d times in this run a sample took the place of another", self.replaced.total())

    def _order_settings(self) -> dict[str, Any]:
        rows = {"rows": []} if self.training is None else self.training.order_settings()
        settings = {"seed": self.seed, "global_batch_size": self.global_batch_size, "shuffle": self.shuffle, **rows}
        if self.trainer is not None and (overfit := self.trainer.overfit_batches):  # type: ignore[attr-defined]
            settings["overfit_batches"] = overfit
        return settings

    def _require_same_order(self, restored: dict[str, Any]) -> None:
        settings = self._order_settings()
        others = {key: restored.get(key) for key in (*settings, "weights", "overfit_batches")}
        for key, value in others.items():
            if value != (now := settings.get(key)):
                raise UserError(
                    f"the run to resume had {key} = {value}, now it is {now}, so its position in the data "
                    f"means nothing: set it back, or start a new run from the exported checkpoint."
                )

    def _recount_micro_batches(self, before: int, now: int) -> None:
        if self.trainer is None:
            return
        # Also brings a checkpoint that was cut within a step, or within an accumulation, back to the last whole step.
        progress = _progress(self.trainer)
        whole_steps = progress.processed // before * now
        progress.completed += whole_steps - progress.processed
        progress.ready = progress.started = progress.processed = whole_steps

    def _check_limits(self, trainer: lightning.Trainer, sampler: MicroBatchSampler) -> None:
        """Raises UserError for limits of an epoch that would cut an optimizer step, or leave no validation in it."""
        batches, accumulation = _limited(trainer, len(sampler)), sampler.accumulation
        name = "overfit_batches" if trainer.overfit_batches else "limit_train_batches"  # type: ignore[attr-defined]
        if batches % accumulation and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise UserError(
                f"--trainer.{name} {trainer.limit_train_batches} leaves {batches} batches in an epoch, no multiple of "
                f"the {accumulation} of an optimizer step (--trainer.accumulate_grad_batches): take such a multiple."
            )
        interval = getattr(trainer, "val_check_interval", None)  # absent where it is a time
        if isinstance(interval, int) and interval > batches and trainer.check_val_every_n_epoch is not None:
            raise UserError(
                f"--trainer.val_check_interval {interval} exceeds the {batches} batches of an epoch: count over all "
                "epochs (--trainer.check_val_every_n_epoch null), or take a smaller one."
            )

    def _sampler(self, dataset: BatchDataset, shuffle: bool, accumulation: int, endless: bool) -> MicroBatchSampler:
        noun = "training rows" if dataset is self.training else "validation rows"
        order = dataset.order(self.global_batch_size, self.seed, shuffle, noun)
        if order.rows_left_out and (self.trainer is None or self.trainer.is_global_zero):
            logger.info(
                "%d of %d %s fill no global batch of %d and are left out of an epoch",
                order.rows_left_out,
                sum(dataset.bucket_sizes),
                noun,
                self.global_batch_size,
            )
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return MicroBatchSampler(order, rank=rank, world_size=world_size, accumulation=accumulation, endless=endless)

    def _loader(self, dataset: BatchDataset, sampler: MicroBatchSampler) -> DataLoader[dict[str, Any]]:
        return DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=self.num_workers, collate_fn=as_made)


def _limited(trainer: lightning.Trainer, batches: int) -> int:
    """How many of an epoch's micro-batches the Trainer takes; `overfit_batches` limits them too."""
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def _progress(trainer: lightning.Trainer) -> _ProcessedTracker:
    """Lightning's count of micro-batches in the running epoch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    assert isinstance(progress, _ProcessedTracker)
    return progress
