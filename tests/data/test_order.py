from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from simplear.data.training.order import CAPTION, DROPOUT, DataOrder, uniforms
from simplear.data.training.ordered_data import MicroBatchSampler, micro_batch_size
from simplear.hashing import Permutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 4097])
def test_permutation_is_one(size: int) -> None:
    for key in range(3):
        assert sorted(Permutation(size, key)(np.arange(size)).tolist()) == list(range(size))


def test_permutations_are_as_even_as_chance() -> None:
    # Where row 3 of 8 lands, over 2,000 keys: chi-square with 7 degrees of freedom stays below 24.3 in 99.9 %.
    landed = np.array([Permutation(8, key)(np.array([3]))[0] for key in range(2000)])
    counts = np.bincount(landed, minlength=8)
    assert ((counts - 250) ** 2 / 250).sum() < 24.3


def test_permutation_of_many_rows_scatters_neighbours() -> None:
    size = 43_000_000
    images = Permutation(size, 1)(np.arange(20_000))
    assert len(np.unique(images)) == 20_000 and images.min() >= 0 and images.max() < size
    assert abs(images.mean() / size - 0.5) < 0.01
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.03


def test_any_batch_of_many_rows_takes_no_more_than_itself() -> None:
    tracemalloc.start()
    order = DataOrder((40_000_000, 3_000_000), 256)
    batch = order[7 * order.batches_per_epoch + 123_456]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20, "it depends on the batch alone, not on the rows"
    assert batch.epoch == 7 and len(np.unique(batch.positions)) == 256


def test_uniforms_are_even_and_independent() -> None:
    rows = np.arange(20_000)
    first, second = uniforms(0, 0, rows, CAPTION), uniforms(0, 0, rows, DROPOUT)
    assert first.min() >= 0 and first.max() < 1
    assert np.abs(np.histogram(first, 10)[0] - 2000).max() < 200
    for other in (second, uniforms(0, 1, rows, CAPTION), uniforms(1, 0, rows, CAPTION)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.03
    np.testing.assert_array_equal(uniforms(0, 0, rows[[5, 9]], CAPTION), first[[5, 9]])


def test_an_epoch_sees_each_row_at_most_once_and_leaves_out_the_rest() -> None:
    order = DataOrder((23, 9, 3), 4, seed=5)
    assert order.batches_per_epoch == 5 + 2 and order.rows_left_out == 3 + 1 + 3
    for epoch in range(2):
        seen = set()
        for index in range(7):
            batch = order[epoch * 7 + index]
            assert batch.epoch == epoch
            seen |= {(batch.bucket, position) for position in batch.positions.tolist()}
        assert len(seen) == 7 * 4


def test_epochs_and_seeds_differ_and_plain_order_does_not_shuffle() -> None:
    def rows(seed: int, epoch: int) -> list[int]:
        order = DataOrder((40,), 4, seed)
        return np.concatenate([order[epoch * 10 + i].positions for i in range(10)]).tolist()

    assert rows(0, 0) == rows(0, 0)
    assert len({tuple(rows(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4
    plain = DataOrder((9, 5), 4, shuffle=False)
    assert [plain[i].positions.tolist() for i in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    assert [plain[i].bucket for i in range(3)] == [0, 0, 1]


@pytest.mark.parametrize("world_size, accumulation", [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2), (3, 4)])
def test_ranks_and_accumulation_cut_the_same_global_batches(world_size: int, accumulation: int) -> None:
    order = DataOrder((100, 50), 24, seed=3)
    samplers = [
        MicroBatchSampler(order, rank=rank, world_size=world_size, accumulation=accumulation)
        for rank in range(world_size)
    ]
    assert {len(sampler) for sampler in samplers} == {6 * accumulation}
    per_rank = [list(sampler) for sampler in samplers]
    for number in range(6):
        steps = range(number * accumulation, (number + 1) * accumulation)
        together = np.concatenate([per_rank[rank][step].positions for step in steps for rank in range(world_size)])
        np.testing.assert_array_equal(together, order[number].positions)
        assert {per_rank[rank][step].bucket for step in steps for rank in range(world_size)} == {order[number].bucket}


def test_a_sampler_that_starts_late_goes_on_as_one_that_did_not() -> None:
    order = DataOrder((40,), 4)
    whole = [batch for _, batch in zip(range(50), MicroBatchSampler(order, accumulation=2, endless=True), strict=False)]
    late = MicroBatchSampler(order, accumulation=2, start=lambda: 7, endless=True)
    for expected, batch in zip(whole[14:], late, strict=False):
        assert (expected.number, expected.epoch) == (batch.number, batch.epoch)
        np.testing.assert_array_equal(expected.positions, batch.positions)
    rest_of_epoch = list(MicroBatchSampler(order, accumulation=2, start=lambda: 7))
    assert [batch.number for batch in rest_of_epoch] == [14, 15, 16, 17, 18, 19]


def test_sizes_that_do_not_divide_are_refused() -> None:
    assert micro_batch_size(256, 32, 2) == 4
    for global_batch_size, world_size, accumulation in [(256, 3, 1), (8, 4, 4), (10, 2, 4)]:
        with pytest.raises(ValueError, match=rf"multiple of {world_size * accumulation}"):
            micro_batch_size(global_batch_size, world_size, accumulation)
    with pytest.raises(ValueError, match=r"fill no global batch of 8"):
        DataOrder((7, 7), 8)
    with pytest.raises(ValueError, match=r"fill no global batch"):
        DataOrder((), 8)
