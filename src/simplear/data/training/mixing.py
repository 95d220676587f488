"""The order of training data drawn from several sets in given shares, as a pure function like `DataOrder`.

Sets are not chosen at random: of the first n rows of a grid each set has its share, rounded, for any n, and of the
first n batches each grid has its own. A set is passed through in permutations, one after another without a gap, so no
row of it comes again before all others have; rows of two passes may meet in one batch. Batch g is computed alone, from
counts that are arithmetic in g.

Shares are of samples. A set's rows of each grid take that grid's part of the set's share. An epoch is the fewest whole
batches in which every set was passed through once: the set with the most rows for its share decides, and the others are
repeated as their shares ask. A row's random choices are drawn again in each pass of its set.

Left out: shares that change during training. Stop, export, and begin a run with others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from simplear.data.training.order import ROW_ORDER, Batch
from simplear.errors import UserError
from simplear.hashing import permutation


class Apportionment:
    """Divides counts by shares: part by part the nearest whole number of what is left.

    Each part grows with the count, by 0 or 1, which is what makes it a schedule: item n belongs to the part that grows
    from n to n + 1. A part differs from its exact share by at most half the number of parts.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        """
        Args:
            shares: of each part, 0 or more; they are taken relative to their sum.
        """
        rest, self._ratios = sum(shares, Fraction()), []
        for share in shares[:-1]:
            self._ratios.append((share / rest if rest else rest).as_integer_ratio())
            rest -= share

    def __call__(self, count: int) -> list[int]:
        """Parts of a count of 0 or more, in whole numbers that sum to it."""
        parts = []
        for numerator, denominator in self._ratios:
            parts.append((2 * count * numerator + denominator) // (2 * denominator))
            count -= parts[-1]
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

    rows_left_out = 0  # a pass that ends within a batch is followed by the next

    def __post_init__(self) -> None:
        for number, weight in enumerate(self.weights):
            if not (weight > 0 and math.isfinite(weight)):
                raise UserError(
                    f"weight {number} of the sets is {weight}: give a number above 0, or leave the set out."
                )
            if not self._set_rows[number]:
                raise UserError(f"set {number} of those to mix has no rows: leave it out.")

    @cached_property
    def _set_rows(self) -> list[int]:
        """Rows of each set over all buckets."""
        return [sum(rows[number] for rows in self.rows) for number in range(len(self.weights))]

    @cached_property
    def _shares(self) -> list[list[Fraction]]:
        """Of each bucket, the share of each set's rows in it among all samples, but for a common factor."""
        per_row = [Fraction(str(weight)) / rows for weight, rows in zip(self.weights, self._set_rows, strict=True)]
        return [[share * rows for share, rows in zip(per_row, of_sets, strict=True)] for of_sets in self.rows]

    @cached_property
    def batches_per_epoch(self) -> int:
        """Batches in which every set is passed through at least once."""
        weights = [Fraction(str(weight)) for weight in self.weights]
        return max(
            math.ceil(rows * sum(weights) / (weight * self.global_batch_size))
            for rows, weight in zip(self._set_rows, weights, strict=True)
        )

    @cached_property
    def _buckets(self) -> Apportionment:
        """Of batches among the buckets."""
        return Apportionment([sum(shares, Fraction()) for shares in self._shares])

    @cached_property
    def _sets(self) -> list[Apportionment]:
        """Of each bucket, of its rows among the sets."""
        return [Apportionment(shares) for shares in self._shares]

    def __getitem__(self, number: int) -> Batch:
        """Global batch `number`, counted from the beginning of the first epoch."""
        before, after = self._buckets(number), self._buckets(number + 1)
        bucket = next(place for place in range(len(before)) if after[place] > before[place])
        parts, sizes = self._sets[bucket], np.array(self.rows[bucket])
        first = np.array(parts(before[bucket] * self.global_batch_size))
        counts = np.array(parts(after[bucket] * self.global_batch_size)) - first
        # Rows of all sets evenly through the batch, so that each rank's part of it has its shares too.
        which = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        spread = np.argsort((place + 0.5) / counts[which], kind="stable")
        which, place = which[spread], place[spread]
        passes, rows = np.divmod(first[which] + place, sizes[which])
        starts = (np.cumsum(sizes) - sizes)[which]
        if self.shuffle:
            for turn, index in set(zip(passes.tolist(), which.tolist(), strict=True)):
                chosen = (passes == turn) & (which == index)
                permuted = permutation(self.rows[bucket][index], self.seed, turn, ROW_ORDER, bucket, index)
                rows[chosen] = permuted(rows[chosen])
        return Batch(number, passes, bucket, starts + rows)
