"""The order of training data as a pure function: which rows make up global batch g of epoch e.

Rows are bucketed by grid, so that a batch has one shape. Each epoch permutes the rows of each bucket and then the
batches of all buckets; rows that fill no batch sit that epoch out. The permutations (`simplear.hashing.Permutation`)
need no memory and each batch is computed alone, so starting in the middle of 43 million rows takes as long as starting
at the first. Ranks and accumulation only cut a global batch up, and every random choice about a sample is a hash of
(seed, epoch, row): so another world size, or a run that was stopped and resumed, sees the same.

Nothing here knows of files, captions or Lightning's loops. `MixedOrder` (`mixing`) draws from several sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from simplear.errors import UserError
from simplear.hashing import Int64, hash_key, mix, permutation

Epoch = int | Int64
"""Earlier passes through the rows: one number, or one for each row (B,) if sets are mixed."""

# What a random number is for; keeps the numbers of one sample independent of each other.
ROW_ORDER, BATCH_ORDER, CAPTION, PREFIX, DROPOUT = range(5)


def uniforms(seed: int, epoch: Epoch, rows: Int64, purpose: int) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each row, a pure function of (seed, epoch, row, purpose), shape (B,)."""
    bits = mix(hash_key(seed, epoch, purpose) ^ mix(rows.astype(np.uint64)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choose_captions(
    captions: Sequence[Sequence[str]], seed: int, epoch: Epoch, rows: Int64, purpose: int = CAPTION
) -> list[str]:
    """One of each row's captions (or prefixes), drawn again for each epoch."""
    draws = uniforms(seed, epoch, rows, purpose)
    return [options[int(draw * len(options))] for options, draw in zip(captions, draws.tolist(), strict=True)]


class Batch(NamedTuple):
    """Rows of one optimizer step, a global batch, or of one rank's forward and backward pass, a micro-batch."""

    number: int
    """Batches before this one, over all epochs."""
    epoch: Epoch
    bucket: int
    """Index of the rows' bucket."""
    positions: Int64
    """(B,) positions within the bucket."""


@dataclass(frozen=True)
class DataOrder:
    """All global batches of all epochs.

    Raises ValueError if no bucket fills a single batch.
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
        """Rows that an epoch does not see, since they fill no batch; other ones in each epoch when shuffled."""
        return sum(self.bucket_sizes) - self.batches_per_epoch * self.global_batch_size

    def __getitem__(self, number: int) -> Batch:
        """Global batch `number`, counted from the beginning of the first epoch."""
        epoch, index = divmod(number, self.batches_per_epoch)
        if self.shuffle:
            index = int(permutation(self.batches_per_epoch, self.seed, epoch, BATCH_ORDER)(np.array([index]))[0])
        bucket = int(np.searchsorted(self._ends, index, side="right"))
        first = (index - (int(self._ends[bucket - 1]) if bucket else 0)) * self.global_batch_size
        positions = np.arange(first, first + self.global_batch_size)
        if self.shuffle:
            positions = permutation(self.bucket_sizes[bucket], self.seed, epoch, ROW_ORDER, bucket)(positions)
        return Batch(number, epoch, bucket, positions)
