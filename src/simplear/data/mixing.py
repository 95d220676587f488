"""The order of training data drawn from several sets in given shares, as a pure function like `DataOrder`.

Nothing is drawn by lot: of the first n rows of a grid each set has its share, rounded, whatever n is, and of the first
n batches each grid has its own. A set is passed through in permutations, one after another without a gap, so no row of
it comes again before all others have; rows of two passes may meet in one batch. Batch g is computed alone, from counts
that are arithmetic in g.

Shares are of samples. A set's rows of each grid take that grid's part of the set's share. An epoch is the fewest whole
batches in which every set was passed through once: the set with the most rows for its share decides, and the others are
repeated as their shares ask. A row's random choices are drawn anew in each pass of its set.

Left out: shares that change during training. Stop, export, and start anew with others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from simplear.data.order import ROW_ORDER, GlobalBatch, Int64, permutation


def apportion(count: int, shares: Sequence[Fraction]) -> list[int]:
    """Divide a count by shares: set by set the nearest whole number of what is left.

    Each part grows with the count, by 0 or 1, which is what makes it a schedule: item n belongs to the part that grows
    from n to n + 1. A part differs from its exact share by at most half the number of parts.

    Args:
        count: items to divide, 0 or more.
        shares: of each part, above 0; they sum to 1.
    """
    parts, rest = [], Fraction(1)
    for share in shares[:-1]:
        part = math.floor(count * share / rest + Fraction(1, 2))
        parts.append(part)
        count -= part
        rest -= share
    return [*parts, count]


@dataclass(frozen=True)
class MixedOrder:
    """All global batches of all epochs; each of one grid, with rows of every set that has the grid.

    Raises ValueError for a weight that is not above 0, and for a set without rows.
    """

    rows: tuple[tuple[int, ...], ...]
    """Of each bucket, the rows of each set; a bucket holds the sets one after another."""
    weights: tuple[float, ...]
    """Share of each set, as numbers in any unit."""
    global_batch_size: int
    """Rows of a batch over all ranks and accumulated micro-batches."""
    seed: int = 0
    """Seed of the order and of every choice about a sample."""
    shuffle: bool = True
    """False: the rows of each set come as they lie, in every pass."""

    def __post_init__(self) -> None:
        for number, weight in enumerate(self.weights):
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(
                    f"weight {number} of the sets is {weight}: give a number above 0, or leave the set out."
                )
            if not self.set_rows[number]:
                raise ValueError(f"set {number} of those to mix has no rows: leave it out.")

    @cached_property
    def set_rows(self) -> list[int]:
        """Rows of each set over all buckets."""
        return [sum(of_bucket[number] for of_bucket in self.rows) for number in range(len(self.weights))]

    @cached_property
    def shares(self) -> list[Fraction]:
        """Of each set among all samples."""
        exact = [Fraction(str(weight)) for weight in self.weights]
        return [weight / sum(exact) for weight in exact]

    @cached_property
    def _shares_in_buckets(self) -> list[list[Fraction]]:
        return [
            [share * rows / total for share, rows, total in zip(self.shares, of_bucket, self.set_rows, strict=True)]
            for of_bucket in self.rows
        ]

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every set is passed through at least once."""
        return max(
            math.ceil(rows / (share * self.global_batch_size))
            for rows, share in zip(self.set_rows, self.shares, strict=True)
        )

    @property
    def rows_left_out(self) -> int:
        """None: a pass that ends within a batch is followed by the next."""
        return 0

    def __getitem__(self, number: int) -> GlobalBatch:
        """Global batch `number`, counted from the beginning of the first epoch."""
        bucket, place = self._bucket(number)
        of_bucket = self._shares_in_buckets[bucket]
        members = [index for index, share in enumerate(of_bucket) if share]
        shares = [of_bucket[index] / sum(of_bucket) for index in members]
        first = apportion(place * self.global_batch_size, shares)
        last = apportion((place + 1) * self.global_batch_size, shares)
        starts = np.cumsum([0, *self.rows[bucket]])
        positions, passes, places = [], [], []
        for index, begin, end in zip(members, first, last, strict=True):
            turn, row = np.divmod(np.arange(begin, end), self.rows[bucket][index])
            positions.append(starts[index] + self._permuted(row, turn, bucket, index))
            passes.append(turn)
            places.append((np.arange(end - begin) + 0.5) / max(end - begin, 1))
        # Rows of all sets evenly through the batch, so that each rank's part of it has its shares too.
        spread = np.argsort(np.concatenate(places), kind="stable")
        return GlobalBatch(np.concatenate(passes)[spread], bucket, np.concatenate(positions)[spread])

    def _bucket(self, number: int) -> tuple[int, int]:
        """The bucket of a batch, and how many batches before it are of that bucket."""
        filled = [index for index, shares in enumerate(self._shares_in_buckets) if sum(shares)]
        shares = [sum(self._shares_in_buckets[index], Fraction()) for index in filled]
        before, after = apportion(number, shares), apportion(number + 1, shares)
        grown = next(place for place in range(len(filled)) if after[place] > before[place])
        return filled[grown], before[grown]

    def _permuted(self, rows: Int64, turns: Int64, bucket: int, index: int) -> Int64:
        if not self.shuffle:
            return rows
        permuted = np.empty_like(rows)
        for turn in np.unique(turns).tolist():
            here = turns == turn
            permute = permutation(self.rows[bucket][index], self.seed, turn, ROW_ORDER, bucket, index)
            permuted[here] = permute(rows[here])
        return permuted
