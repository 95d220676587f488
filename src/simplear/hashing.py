"""The hash behind all random numbers and permutations that must not depend on the machine or on the order in which they
are drawn, for arrays and tensors; and SHA-256 of files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]

INCREMENT, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""SplitMix64's constants: its step from one state to the next, and the factors of its finaliser."""

FEISTEL_ROUNDS = 6
"""Four rounds of a Feistel network are a strong pseudo-random permutation (Luby and Rackoff); two more for tiny
halves."""

IDENTITY_BYTES, IDENTITY_DIGITS = 64 * 1024, 16
"""Of each end of a file, that `file_identity` hashes, and of the hash, that it keeps."""


def mix(words: UInt64) -> UInt64:
    """A step of SplitMix64 and its finaliser (Steele et al., 2014): each output bit depends on each input bit."""
    words = words + np.uint64(INCREMENT)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(FIRST)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(SECOND)
    return words ^ (words >> np.uint64(31))


def hash_key(*words: int | Int64) -> UInt64:
    """64-bit keys from several integers: an array of length 1, whose arithmetic wraps silently, or as many as rows."""
    key = np.zeros(1, dtype=np.uint64)
    for word in words:
        bits = word.astype(np.uint64) if isinstance(word, np.ndarray) else np.array([word % 2**64], dtype=np.uint64)
        key = mix(key ^ bits)
    return key


def mix_tensor(words: Tensor) -> Tensor:
    """The same on int64, whose bits stand for those of unsigned numbers."""
    words = words + signed(INCREMENT)
    words = (words ^ shifted(words, 30)) * signed(FIRST)
    words = (words ^ shifted(words, 27)) * signed(SECOND)
    return words ^ shifted(words, 31)


def shifted(words: Tensor, bits: int) -> Tensor:
    """To the right, filled with zeros: torch's own shift repeats the sign."""
    return (words >> bits) & (2 ** (64 - bits) - 1)


def signed(word: int) -> int:
    """The int64 of the same bits."""
    word %= 2**64
    return word - 2**64 if word >= 2**63 else word


class Permutation:
    """A pseudo-random permutation of ``range(size)``, each position computed when it is asked for.

    A Feistel network permutes the next larger power of four; a value outside the range is sent through it again until
    it falls inside (cycle walking), which takes fewer than four turns on average.
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self.half_bits = np.uint64((max(size - 1, 1).bit_length() + 1) // 2)
        self.round_keys = [hash_key(*key, turn) for turn in range(FEISTEL_ROUNDS)]

    def __call__(self, positions: Int64) -> Int64:
        """Images of positions, each in ``[0, size)``, shape (B,)."""
        values = self._network(positions.astype(np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: UInt64) -> UInt64:
        mask = (np.uint64(1) << self.half_bits) - np.uint64(1)
        left, right = values >> self.half_bits, values & mask
        for key in self.round_keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        return (left << self.half_bits) | right


@lru_cache(maxsize=256)
def permutation(size: int, *key: int) -> Permutation:
    """As `Permutation`; consecutive batches share their epoch's."""
    return Permutation(size, *key)


def sha256_of(file: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def file_identity(file: Path) -> str:
    """Tells a file from another of its name, wherever it lies, at the price of two small reads."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        for place in (0, max(0, size - IDENTITY_BYTES)):
            opened.seek(place)
            digest.update(opened.read(IDENTITY_BYTES))
    return f"{size} bytes, SHA-256 of both ends {digest.hexdigest()[:IDENTITY_DIGITS]}"


def sha256_of_lines(lines: Iterable[str]) -> str:
    """SHA-256 (hex) of texts in their order; names of files may be in another encoding."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def sha256_of_all(files: Iterable[Path]) -> str:
    """SHA-256 (hex) of what ``sha256sum`` prints for files, run in their directory."""
    return hashlib.sha256("".join(f"{sha256_of(file)}  {file.name}\n" for file in files).encode()).hexdigest()
