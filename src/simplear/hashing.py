"""The hash behind every random number that must be the same on any machine and in any order, for arrays and tensors;
and that of files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from simplear.errors import SystemRefusedError

UInt64 = npt.NDArray[np.uint64]

INCREMENT, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""SplitMix64's constants: its step from one state to the next, and the factors of its finaliser."""

IDENTITY_BYTES, IDENTITY_DIGITS = 64 * 1024, 16
"""Of each end of a file, that `file_identity` hashes, and of the hash, that it keeps."""


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


def file_identity(file: Path) -> str:
    """Tells a file from another of its name, wherever it lies, at the price of two small reads.

    Raises OSError naming a file that cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            for place in (0, max(0, size - IDENTITY_BYTES)):
                opened.seek(place)
                digest.update(opened.read(IDENTITY_BYTES))
    except OSError as error:
        raise SystemRefusedError(
            error.errno, f"{file} cannot be read ({error.strerror}): make it readable, or take it out of the paths."
        ) from error
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
