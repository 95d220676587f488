"""What both DataModules share: loaders in the pure order, and the position in the data.

The position is the number of global batches consumed, and the DataModule's own state in a Lightning checkpoint. Each
micro-batch carries its running number, noted when a training step receives it; so prefetching workers do not matter,
and neither does `trainer.global_step`. Loaders begin at the position and never end by themselves: Lightning counts the
micro-batches of an epoch, and after a restart it goes on counting from where it was, with a fresh iterator. So epochs
that `limit_train_batches` cuts short take up the data one after another, and see all of it in turn; `overfit_batches`
repeats the first ones.

Resuming under another accumulation works too: Lightning's count of micro-batches within the epoch is converted to the
new unit. A stage must not read `trainer.estimated_stepping_batches`: under sharded strategies that builds the loaders
before the position is restored.
"""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import lightning
import numpy as np
from lightning.pytorch.loops.progress import _ProcessedTracker
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from simplear.data.sample import as_made
from simplear.data.training.mixing import MixedOrder
from simplear.data.training.order import Batch, DataOrder
from simplear.errors import UserError

logger = logging.getLogger(__name__)

Order = DataOrder | MixedOrder
"""Global batches by their number."""


def micro_batch_size(global_batch_size: int, world_size: int, accumulation: int) -> int:
    """Rows of one forward and backward pass on one rank. Raises ValueError if the batch does not divide evenly."""
    if accumulation < 1:
        raise UserError(f"--trainer.accumulate_grad_batches {accumulation} must be at least 1.")
    size, rest = divmod(global_batch_size, world_size * accumulation)
    if rest or size == 0:
        raise UserError(
            f"global_batch_size {global_batch_size} does not divide over {world_size} ranks x accumulate_grad_batches "
            f"{accumulation}: take a multiple of {world_size * accumulation}."
        )
    return size


class MicroBatchSampler(DistributedSampler[Batch], SequentialSampler):  # type: ignore[misc]
    """This rank's micro-batches, from a position on.

    Accumulation step a of rank r takes rows ``[(a * world_size + r) * m, … + m)`` of a global batch, m the micro-batch
    size: micro-batches put together by accumulation step, then by rank, are the global batch in its order.

    It is a `DistributedSampler` and a `SequentialSampler` in name only, which is how Lightning knows that ranks are
    divided already, and that `overfit_batches` needs no other order.
    """

    def __init__(
        self,
        order: Order,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        start: Callable[[], int] = lambda: 0,
        endless: bool = False,
    ) -> None:
        """
        Args:
            order: the global batches.
            rank: this process, from 0.
            world_size: number of processes.
            accumulation: micro-batches that one optimizer step accumulates.
            start: called at the beginning of each iteration for the global batch to begin at.
            endless: go on into the next epochs instead of stopping where the epoch does; the consumer stops.

        Raises:
            ValueError: the global batch does not divide over ranks and accumulation.
        """
        self.order, self.rank, self.world_size, self.accumulation = order, rank, world_size, accumulation
        self.start, self.endless = start, endless
        self.period = 0
        """The order begins again after this many global batches; 0: never."""
        self.size = micro_batch_size(order.global_batch_size, world_size, accumulation)

    def __len__(self) -> int:
        """Micro-batches of a whole epoch, wherever iteration starts."""
        return self.order.batches_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        number = self.start()
        end = (number // self.order.batches_per_epoch + 1) * self.order.batches_per_epoch
        while self.endless or number < end:
            batch = self.order[number % self.period if self.period else number]
            for step in range(self.accumulation):
                first = (step * self.world_size + self.rank) * self.size
                part = slice(first, first + self.size)
                epoch = batch.epoch[part] if isinstance(batch.epoch, np.ndarray) else batch.epoch
                yield Batch(number * self.accumulation + step, epoch, batch.bucket, batch.positions[part])
            number += 1

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the position says which epoch it is."""


class BatchDataset(Dataset[dict[str, Any]], ABC):
    """Rows in buckets that makes whole micro-batches, so that work on a batch is done once and not row by row."""

    bucket_sizes: tuple[int, ...]
    """Rows of each bucket; rows of one bucket have one shape."""
    set_sizes: tuple[tuple[int, ...], ...] = ()
    """Of each bucket, the rows of each of several sets."""
    weights: tuple[float, ...] | None = None
    """Share of each set in every batch; None: all rows alike."""

    def order(self, global_batch_size: int, seed: int, shuffle: bool, noun: str) -> Order:
        """All global batches; arguments as those of `DataOrder`."""
        if self.weights is None:
            return DataOrder(self.bucket_sizes, global_batch_size, seed, shuffle, noun)
        return MixedOrder(self.set_sizes, self.weights, global_batch_size, seed, shuffle)

    def order_settings(self) -> dict[str, Any]:
        """What decides the order beside seed, batch size and shuffling; JSON values."""
        if self.weights is None:
            return {"rows": list(self.bucket_sizes)}
        return {"rows": [list(sizes) for sizes in self.set_sizes], "weights": list(self.weights)}

    @abstractmethod
    def make_batch(self, micro_batch: Batch) -> dict[str, Any]:
        """The batch of these positions."""

    def __getitem__(self, micro_batch: Batch) -> dict[str, Any]:
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

        Raises ValueError if the global batch does not divide over ranks and accumulation, and if the run being resumed
        had another order (seed, global batch size, rows).
        """
        assert self.training is not None, "setup() comes first."
        sampler = self._sampler(self.training, self.shuffle)
        if self.trainer is not None:
            sampler.endless = True
            self._check_limits(self.trainer, sampler)
            if self.trainer.overfit_batches:  # type: ignore[attr-defined]
                sampler.period = self.steps_per_epoch
        sampler.start = lambda: self.global_batches_consumed
        if self._restored is not None:
            self._require_same_order(self._restored)
            self._recount_micro_batches(self._restored["accumulate_grad_batches"], sampler.accumulation)
            self._restored = None
            # Lightning knows only of resumable loaders, not of this position.
            warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
        consumed = self.global_batches_consumed
        self._accumulation = sampler.accumulation
        self._next_micro_batch = consumed * sampler.accumulation
        return self._loader(self.training, sampler)

    def val_dataloader(self) -> Any:
        """Micro-batches of this rank in the order of the files, the same at each validation; none without data."""
        if self.validation is None:
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero.*")
            return []
        return self._loader(self.validation, self._sampler(self.validation, shuffle=False))

    def test_dataloader(self) -> Any:
        """The validation data."""
        return self.val_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Note the position and take the running number out of the batch."""
        number = batch.pop("number")
        if self.trainer is not None and self.trainer.training:
            self._next_micro_batch = number + 1
        return batch

    def _order_settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "shuffle": self.shuffle,
        }
        settings |= {"rows": []} if self.training is None else self.training.order_settings()
        if self.trainer is not None and (overfit := self.trainer.overfit_batches):  # type: ignore[attr-defined]
            settings["overfit_batches"] = overfit
        return settings

    def _require_same_order(self, restored: dict[str, Any]) -> None:
        settings = self._order_settings()
        for key in (*settings, "weights", "overfit_batches"):
            if restored.get(key) != settings.get(key):
                raise UserError(
                    f"the run to resume had {key} = {restored.get(key)}, now it is {settings.get(key)}, so its "
                    "position in the data means nothing: set it back, or start a new run from the exported checkpoint."
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
        interval = getattr(trainer, "val_check_interval", None)  # absent if it is a time
        if isinstance(interval, int) and interval > batches and trainer.check_val_every_n_epoch is not None:
            raise UserError(
                f"--trainer.val_check_interval {interval} exceeds the {batches} batches of an epoch: count over all "
                "epochs (--trainer.check_val_every_n_epoch null), or take a smaller one."
            )

    def _sampler(self, dataset: BatchDataset, shuffle: bool) -> MicroBatchSampler:
        noun = "training rows" if dataset is self.training else "validation rows"
        order = dataset.order(self.global_batch_size, self.seed, shuffle, noun)
        if self.trainer is None:
            return MicroBatchSampler(order)
        if order.rows_left_out and self.trainer.is_global_zero:
            logger.info("%d %s fill no global batch and are left out of an epoch", order.rows_left_out, noun)
        accumulation = self.trainer.accumulate_grad_batches
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return MicroBatchSampler(order, rank=rank, world_size=world_size, accumulation=accumulation)

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
