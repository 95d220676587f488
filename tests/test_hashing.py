"""The hash is one for arrays and tensors, and the one that is published."""

from __future__ import annotations

import numpy as np
import torch

from simplear.hashing import mix, mix_tensor, shifted, signed


def test_arrays_and_tensors_are_mixed_alike() -> None:
    words = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
    words[:4] = [0, 1, 2**63, 2**64 - 1]
    found = mix_tensor(torch.from_numpy(words.view(np.int64)))
    np.testing.assert_array_equal(found.numpy().view(np.uint64), mix(words))


def test_the_first_output_of_splitmix64_is_the_published_one() -> None:
    assert mix(np.array([1234567], dtype=np.uint64)).tolist() == [6457827717110365317]
    assert mix_tensor(torch.tensor([1234567])).tolist() == [6457827717110365317]


def test_bits_are_kept() -> None:
    for word in (0, 5, 2**63 - 1, 2**63, 2**64 - 1, -3, 2**70 + 9):
        assert signed(word) % 2**64 == word % 2**64 and -(2**63) <= signed(word) < 2**63
    assert shifted(torch.tensor([-1]), 31).tolist() == [2**33 - 1]
