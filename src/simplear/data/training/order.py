"""The order of training data as a pure function: which rows make up global batch g of epoch e.

Rows are bucketed by grid, so that a batch has one shape. Each epoch permutes the rows of each bucket and then the
batches of all buckets; rows that fill no batch sit that epoch out. The permutations (`simplear.hashing.Permutation`)
need no memory and any batch is computed alone, so starting in the middle of 43 million rows takes as long as starting
at the first. Ranks and accumulation only cut a global batch up, and every random choice about a sample is a hash of
(seed, epoch, row): so another world size, or a run that was stopped and resumed, sees the same.

Nothing here knows of files, captions or Lightning's loops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import DistributedSampler, SequentialSampler

from simplear.errors import UserError
from simplear.hashing import Int64, hash_key, mix, permutation

Epoch = int | Int64
"""Times that rows were passed through before: one number, or one for each row (B,) where sets are mixed."""

# What a random number is for; keeps the numbers of one sample independent of each other.
ROW_ORDER, BATCH_ORDER, CAPTION, PREFIX, DROPOUT = range(5)


def uniforms(seed: int, epoch: Epoch, rows: Int64, purpose: int) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each row, a pure function of (seed, epoch, row, purpose), shape (B,)."""
    bits = mix(hash_key(seed, epoch, purpose) ^ mix(rows.astype(np.uint64)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


class GlobalBatch(NamedTuple):
    """One optimizer step's rows, before ranks and accumulation divide them."""

    epoch: Epoch
    bucket: int
    """Which of the buckets the rows are of."""
    positions: Int64
    """(global_batch_size,) positions within the bucket."""


class Order(Protocol):
    """Global batches by their number: all that a sampler asks for."""

    @property
    def global_batch_size(self) -> int:
        """Rows of a batch over all ranks and accumulated micro-batches."""
        ...

    @property
    def batches_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        ...

    @property
    def rows_left_out(self) -> int:
        """Rows that an epoch does not see."""
        ...

    def __getitem__(self, number: int) -> GlobalBatch:
        """Global batch `number`, counted from the beginning of the first epoch."""
        ...


@dataclass(frozen=True)
class DataOrder:
    """All global batches of all epochs.

    Raises ValueError when no bucket fills a single batch.
    """

    bucket_sizes: tuple[int, ...]
    """Rows of each bucket."""
    global_batch_size: int
    """Rows of a batch over all ranks and accumulated micro-batches."""
    seed: int = 0
    """Seed of the order and of every choice about a sample."""
    shuffle: bool = True
    """False: rows and batches come as they lie, the same in every epoch."""
    noun: str = "rows"
    """What a message calls the rows."""

    def __post_init__(self) -> None:
        if self.batches_per_epoch == 0:
            raise UserError(
                f"{sum(self.bucket_sizes)} {self.noun} (by grid: {list(self.bucket_sizes)}) fill no global batch of "
                f"{self.global_batch_size}: take a smaller global_batch_size or more data."
            )

    @cached_property
    def _ends(self) -> Int64:
        """Running total of whole batches over buckets."""
        return np.cumsum([size // self.global_batch_size for size in self.bucket_sizes])

    @property
    def batches_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return int(self._ends[-1]) if self.bucket_sizes else 0

    @property
    def rows_left_out(self) -> int:
        """Rows that an epoch does not see, for they fill no batch; other ones in each epoch when shuffled."""
        return sum(self.bucket_sizes) - self.batches_per_epoch * self.global_batch_size

    def __getitem__(self, number: int) -> GlobalBatch:
        """Global batch `number`, counted from the beginning of the first epoch."""
        epoch, index = divmod(number, self.batches_per_epoch)
        if self.shuffle:
            index = int(permutation(self.batches_per_epoch, self.seed, epoch, BATCH_ORDER)(np.array([index]))[0])
        bucket = int(np.searchsorted(self._ends, index, side="right"))
        first = (index - (int(self._ends[bucket - 1]) if bucket else 0)) * self.global_batch_size
        positions = np.arange(first, first + self.global_batch_size)
        if self.shuffle:
            positions = permutation(self.bucket_sizes[bucket], self.seed, epoch, ROW_ORDER, bucket)(positions)
        return GlobalBatch(epoch, bucket, positions)


def micro_batch_size(global_batch_size: int, world_size: int, accumulation: int) -> int:
    """Rows of one forward and backward pass on one rank. Raises ValueError when it is no whole number."""
    if accumulation < 1:
        raise UserError(f"--trainer.accumulate_grad_batches {accumulation} must be at least 1.")
    size, rest = divmod(global_batch_size, world_size * accumulation)
    if rest or size == 0:
        raise UserError(
            f"global_batch_size {global_batch_size} does not divide over {world_size} ranks x accumulate_grad_batches "
            f"{accumulation}: take a multiple of {world_size * accumulation}."
        )
    return size


class MicroBatch(NamedTuple):
    """What a dataset needs to build one micro-batch."""

    number: int
    """Micro-batches of this rank before this one, over all epochs."""
    epoch: Epoch
    bucket: int
    positions: Int64


class MicroBatchSampler(DistributedSampler[MicroBatch], SequentialSampler):  # type: ignore[misc]
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
            start: asked at the beginning of each iteration for the global batch to begin at.
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

    def __iter__(self) -> Iterator[MicroBatch]:  # type: ignore[override]
        number = self.start()
        end = (number // self.order.batches_per_epoch + 1) * self.order.batches_per_epoch
        while self.endless or number < end:
            batch = self.order[number % self.period if self.period else number]
            for step in range(self.accumulation):
                first = (step * self.world_size + self.rank) * self.size
                part = slice(first, first + self.size)
                epoch = batch.epoch[part] if isinstance(batch.epoch, np.ndarray) else batch.epoch
                yield MicroBatch(number * self.accumulation + step, epoch, batch.bucket, batch.positions[part])
            number += 1

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the position says which epoch it is."""


def choose_captions(
    captions: Sequence[Sequence[str]], seed: int, epoch: Epoch, rows: Int64, purpose: int = CAPTION
) -> list[str]:
    """One of each row's captions (or prefixes), drawn anew each epoch."""
    draws = uniforms(seed, epoch, rows, purpose)
    return [options[int(draw * len(options))] for options, draw in zip(captions, draws.tolist(), strict=True)]
