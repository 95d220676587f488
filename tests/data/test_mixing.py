from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simplear.data import TokenDataModule
from simplear.data.training.mixing import Apportionment, MixedOrder
from simplear.data.training.order import DataOrder
from simplear.data.training.ordered_data import MicroBatchSampler

from .conftest import make_rows, write_rows
from .test_token_data import fit

pytestmark = pytest.mark.filterwarnings("ignore:.*dirpath has changed.*", "ignore:.*exists and is not empty.*")

ROWS = ((700, 90, 40), (0, 60, 0))
"""Of two grids, the rows of three sets."""
WEIGHTS = (0.6, 0.3, 0.1)
BATCH = 24
ORDER = MixedOrder(ROWS, WEIGHTS, BATCH, seed=3)


def sets_of(bucket: int, positions: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(ROWS[bucket]), positions, side="right")


@pytest.mark.parametrize("weights", [(7, 3), (1, 1, 1), (50, 30, 15, 4, 1), (0.001, 0.999), (1,)])
def test_apportioning_is_a_schedule(weights: tuple[float, ...]) -> None:
    """One more item goes to one part alone, and no part is ever far from its share."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    apportion = Apportionment(exact)
    before = apportion(0)
    assert before == [0] * len(weights)
    for count in range(1, 2000):
        parts = apportion(count)
        assert sum(parts) == count
        assert sorted(np.subtract(parts, before)) == [0] * (len(parts) - 1) + [1]
        assert all(abs(part - share * count) <= len(weights) / 2 for part, share in zip(parts, shares, strict=True))
        before = parts
    far = apportion(10**12)
    assert all(abs(part - share * 10**12) <= len(weights) / 2 for part, share in zip(far, shares, strict=True))


def test_rounding_each_share_of_a_batch_by_itself_would_not_do() -> None:
    """The wrong variant: a share of a hundredth would never be drawn from in batches of 24."""
    apportion = Apportionment([Fraction(99, 100), Fraction(1, 100)])
    alone = [apportion(BATCH)[1] for _ in range(100)]
    ends = [apportion(number * BATCH)[1] for number in range(101)]
    assert sum(alone) == 0 and ends[-1] == 24 and max(np.diff(ends)) == 1


def test_shares_are_exact_at_any_moment() -> None:
    """Over any number of batches from the beginning: to a batch for grids, and in each batch to two rows."""
    drawn = np.zeros(3)
    in_grid = {bucket: (np.array(WEIGHTS) * ROWS[bucket] / np.sum(ROWS, 0)) for bucket in (0, 1)}
    for number in range(3 * ORDER.batches_per_epoch):
        batch = ORDER[number]
        counts = np.bincount(sets_of(batch.bucket, batch.positions), minlength=3)
        expected = in_grid[batch.bucket] / in_grid[batch.bucket].sum() * BATCH
        assert counts.sum() == BATCH and np.abs(counts - expected).max() <= 2
        drawn += counts
        assert np.abs(drawn - np.array(WEIGHTS) * BATCH * (number + 1)).max() <= BATCH + 2


def test_each_set_is_passed_through_in_permutations() -> None:
    """In time, not only in all: no row of a set comes again before all others of its grid have."""
    seen: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number in range(4 * ORDER.batches_per_epoch):
        batch = ORDER[number]
        order = np.lexsort((np.arange(BATCH), batch.epoch))
        for index, position, turn in zip(
            sets_of(batch.bucket, batch.positions)[order], batch.positions[order], batch.epoch[order], strict=True
        ):
            seen.setdefault((batch.bucket, int(index)), []).append((int(turn), int(position)))
    assert seen.keys() == {(0, 0), (0, 1), (0, 2), (1, 1)}
    for (bucket, index), rows in seen.items():
        size = ROWS[bucket][index]
        passes = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row[0])]
        assert [part[0][0] for part in passes] == list(range(len(passes)))
        assert all(len({position for _, position in part}) == len(part) == size for part in passes[:-1])
        if len(passes) > 2:
            assert passes[0] != [(0, position) for _, position in passes[1]]


def test_an_epoch_is_one_pass_of_the_set_with_most_rows_for_its_share() -> None:
    assert ORDER.batches_per_epoch == -(-700 * 10 // (6 * BATCH))
    seen: set[tuple[int, int]] = set()
    for number in range(ORDER.batches_per_epoch):
        batch = ORDER[number]
        seen |= {(batch.bucket, position) for position in batch.positions.tolist()}
    assert len(seen) >= sum(map(sum, ROWS)) - 3  # but for rounding
    assert ORDER.rows_left_out == 0


def test_any_batch_of_many_rows_is_computed_alone() -> None:
    rows = ((40_000_000, 3_000_000, 2_000_000_000), (0, 5_000_000, 0))
    order = MixedOrder(rows, (0.7, 0.2, 0.1), 256)
    batch = order[5 * order.batches_per_epoch + 1_234_567]
    assert len(np.unique(batch.positions)) == 256 and batch.positions.max() < sum(rows[batch.bucket])


@pytest.mark.parametrize("world_size, accumulation", [(1, 1), (2, 1), (1, 3), (2, 3), (4, 2)])
def test_ranks_and_accumulation_cut_the_same_global_batches(world_size: int, accumulation: int) -> None:
    """And each rank's part of a batch has its shares."""
    samplers = [
        MicroBatchSampler(ORDER, rank=rank, world_size=world_size, accumulation=accumulation, start=lambda: 7)
        for rank in range(world_size)
    ]
    per_rank = [list(itertools.islice(sampler, 10 * accumulation)) for sampler in samplers]
    for number in range(10):
        parts = [
            per_rank[rank][number * accumulation + step] for step in range(accumulation) for rank in range(world_size)
        ]
        batch = ORDER[7 + number]
        assert np.concatenate([part.positions for part in parts]).tolist() == batch.positions.tolist()
        assert np.concatenate([part.epoch for part in parts]).tolist() == batch.epoch.tolist()
        whole = np.bincount(sets_of(batch.bucket, batch.positions), minlength=3) / len(parts)
        for part in parts:
            assert np.abs(np.bincount(sets_of(part.bucket, part.positions), minlength=3) - whole).max() < 2


def test_without_shuffling_sets_come_as_they_lie() -> None:
    order = MixedOrder(((4, 2),), (1, 1), 4, shuffle=False)
    rows = np.concatenate([order[number].positions for number in range(3)])
    assert rows[rows < 4].tolist() == [0, 1, 2, 3, 0, 1] and rows[rows >= 4].tolist() == [4, 5, 4, 5, 4, 5]


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    """30 square rows, and 12 square with 8 wide ones."""
    one = write_rows(tmp_path / "one", {"a": make_rows(30, (2, 2), "one")})
    both = make_rows(12, (2, 2), "two-square") + make_rows(8, (2, 3), "two-wide")
    return [str(one), str(write_rows(tmp_path / "two", {"a": both[:7], "b": both[7:]}))]


@pytest.fixture
def make_data(text_tokenizer_directory: Path) -> Any:
    def make(paths: Any, weights: Any = None, **options: Any) -> TokenDataModule:
        return TokenDataModule(paths, 8, str(text_tokenizer_directory), weights=weights, **options)

    return make


def test_batches_hold_rows_of_all_sets(make_data: Any, sets: list[str]) -> None:
    data = make_data(sets, [1, 3], caption_dropout=0.0)
    data.setup("fit")
    drawn = {"one": 0, "two-square": 0, "two-wide": 0}
    sampler = MicroBatchSampler(data.training.order(8, 0, True, "rows"), endless=True)
    captions: dict[str, set[str]] = {}
    for micro_batch in itertools.islice(sampler, 60):
        batch = data.training.make_batch(micro_batch)
        for key, caption in zip(batch["keys"], batch["captions"], strict=True):
            drawn[key.rstrip("0123456789")] += 1
            captions.setdefault(key, set()).add(caption)
    assert drawn["one"] == 120 and drawn["two-wide"] == pytest.approx(480 * 0.75 * 0.4, abs=8)
    # Of a row that is passed through again and again another caption is drawn each time.
    assert all(len(both) == 2 for key, both in captions.items() if key.startswith("two"))


def test_one_set_is_the_plain_order(make_data: Any, sets: list[str]) -> None:
    for paths in (sets[0], sets[:1]):
        weighted, plain = make_data(paths, [0.3]), make_data(paths)
        for data in (weighted, plain):
            data.setup("fit")
        assert weighted.state_dict() == plain.state_dict()
        orders = [data.training.order(8, 0, True, "rows") for data in (weighted, plain)]
        assert orders[0] == orders[1] == DataOrder((30,), 8)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_sees_what_one_never_stopped_sees(
    make_data: Any, sets: list[str], tmp_path: Path, accumulate: int
) -> None:
    whole = fit(make_data(sets, [0.4, 0.6]), tmp_path / "whole", 30, accumulate).seen
    for stop in (3, 10, 17):
        state = tmp_path / f"whole/step={stop}.ckpt"
        rest = fit(make_data(sets, [0.4, 0.6]), tmp_path / f"from{stop}", 30, accumulate, state).seen
        assert rest == whole[stop * accumulate :]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([0.4, 0.6], [0.5, 0.5], r"weights = \[0\.4, 0\.6\], now it is \[0\.5, 0\.5\]"),
        ([0.4, 0.6], None, r"rows|weights"),
        (None, [0.4, 0.6], r"rows|weights"),
    ],
)
def test_resuming_with_other_weights_is_refused(
    make_data: Any, sets: list[str], tmp_path: Path, before: Any, after: Any, message: str
) -> None:
    fit(make_data(sets, before), tmp_path, 2)
    with pytest.raises(ValueError, match=message):
        fit(make_data(sets, after), tmp_path, 4, resume=tmp_path / "step=2.ckpt")


def test_weights_that_mean_nothing_are_refused(make_data: Any, sets: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 weights for 2 paths: give one for each"):
        make_data(sets, [1.0])
    for weight in (0.0, -1.0, float("inf")):
        data = make_data(sets, [1.0, weight])
        data.setup("fit")
        with pytest.raises(ValueError, match=r"weight 1 of the sets is"):
            data.train_dataloader()
    empty = write_rows(tmp_path / "empty", {"a": []})
    data = make_data([sets[0], str(empty)], [1.0, 1.0])
    data.setup("fit")
    with pytest.raises(ValueError, match=r"set 1 of those to mix has no rows"):
        data.train_dataloader()
