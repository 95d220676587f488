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

from simplear.data.training.order import ROW_ORDER, GlobalBatch
from simplear.errors import UserError
from simplear.hashing import Int64, permutation, permute_each


class Apportionment:
    """Divides counts by shares: part by part the nearest whole number of what is left.

    Each part grows with the count, by 0 or 1, which is what makes it a schedule: item n belongs to the part that grows
    from n to n + 1. A part differs from its exact share by at most half the number of parts.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        """
        Args:
            shares: of each part, above 0; they are taken relative to their sum.
        """
        rest, self._ratios = sum(shares, Fraction()), []
        for share in shares[:-1]:
            self._ratios.append((share / rest).as_integer_ratio())
            rest -= share

    def __call__(self, count: int) -> list[int]:
        """Parts of a count of 0 or more, in whole numbers that sum to it."""
        parts = []
        for numerator, denominator in self._ratios:
            part = (2 * count * numerator + denominator) // (2 * denominator)
            parts.append(part)
            count -= part
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
                raise UserError(
                    f"weight {number} of the sets is {weight}: give a number above 0, or leave the set out."
                )
            if not self.set_rows[number]:
                raise UserError(f"set {number} of those to mix has no rows: leave it out.")

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

    @cached_property
    def _members(self) -> list[list[int]]:
        """Of each bucket, the sets that have rows in it."""
        return [[index for index, rows in enumerate(of_bucket) if rows] for of_bucket in self.rows]

    @cached_property
    def _parts(self) -> list[Apportionment]:
        """Of each bucket, its rows among its members."""
        return [
            Apportionment([shares[index] for index in members])
            for shares, members in zip(self._shares_in_buckets, self._members, strict=True)
        ]

    @cached_property
    def _buckets(self) -> Apportionment:
        return Apportionment([sum(shares, Fraction()) for shares in self._shares_in_buckets])

    def __getitem__(self, number: int) -> GlobalBatch:
        """Global batch `number`, counted from the beginning of the first epoch."""
        before, after = self._buckets(number), self._buckets(number + 1)
        bucket = next(place for place in range(len(before)) if after[place] > before[place])
        members, parts = self._members[bucket], self._parts[bucket]
        first = np.array(parts(before[bucket] * self.global_batch_size), np.int64)
        counts = np.array(parts((before[bucket] + 1) * self.global_batch_size), np.int64) - first
        # Rows of all sets evenly through the batch, so that each rank's part of it has its shares too.
        which = np.repeat(np.arange(len(members)), counts)
        place = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        spread = np.argsort((place + 0.5) / counts[which], kind="stable")
        which, place = which[spread], place[spread]
        sizes = np.array([self.rows[bucket][index] for index in members])
        passes, rows = np.divmod(first[which] + place, sizes[which])
        starts = np.cumsum([0, *self.rows[bucket]])[members]
        return GlobalBatch(passes, bucket, starts[which] + self._permuted(rows, passes, which, bucket))

    def _permuted(self, rows: Int64, passes: Int64, which: Int64, bucket: int) -> Int64:
        if not self.shuffle:
            return rows
        members = self._members[bucket]
        numbers, inverse = np.unique(passes * len(members) + which, return_inverse=True)
        permutations = [
            permutation(self.rows[bucket][members[place]], self.seed, turn, ROW_ORDER, bucket, members[place])
            for turn, place in (divmod(number, len(members)) for number in numbers.tolist())
        ]
        return permute_each(permutations, inverse, rows)
