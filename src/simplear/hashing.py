"""The hash behind every random number that must be the same on any machine and in any order, for arrays and tensors;
and that of files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

UInt64 = npt.NDArray[np.uint64]

INCREMENT, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""SplitMix64's constants: its step from one state to the next, and the factors of its finaliser."""


def mix(words: UInt64) -> UInt64:
    """A step of SplitMix64 and its finaliser (Steele et al., 2014): each output bit depends on each input bit."""
    words = words + np.uint64(INCREMENT)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(FIRST)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(SECOND)
    return words ^ (words >> np.uint64(31))


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


def sha256_of(file: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sha256_of_all(files: Iterable[Path]) -> str:
    """SHA-256 (hex) of what ``sha256sum`` prints for files, run in their directory."""
    return hashlib.sha256("".join(f"{sha256_of(file)}  {file.name}\n" for file in files).encode()).hexdigest()
