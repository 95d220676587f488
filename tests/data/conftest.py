"""Small token shards, a text tokenizer and a visual tokenizer whose codes can be computed by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from simplear.data.shards import TokenRow, claim_directory, merge_manifest, write_shard
from simplear.language_model import train_text_tokenizer

CODEBOOK_SIZE = 256


class MeanTokenizer:
    """The code of a patch is the mean of its red channel, as a byte."""

    codebook_size = CODEBOOK_SIZE
    downsample = 4
    fingerprint = hashlib.sha256(b"mean").hexdigest()

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = torch.nn.functional.avg_pool2d((pixels[:, :1] + 1) * 127.5, self.downsample)
        return patches[:, 0].round().clamp(0, 255).long()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        pixels = (codes[:, None].float() / 127.5 - 1).repeat(1, 3, 1, 1)
        return torch.nn.functional.interpolate(pixels, scale_factor=self.downsample)


def write_rows(directory: Path, units: dict[str, list[TokenRow]], fingerprint: str = MeanTokenizer.fingerprint) -> Path:
    """A finished directory of token shards."""
    settings = {"visual_tokenizer": fingerprint, "codebook_size": CODEBOOK_SIZE, "downsample": 4}
    claim_directory(directory, settings)
    for name, rows in units.items():
        write_shard(directory, name, rows)
    merge_manifest(directory, units)
    return directory


def make_rows(count: int, grid: tuple[int, int], prefix: str = "row") -> list[TokenRow]:
    """Rows whose codes, captions and metadata follow from their number."""
    size = grid[0] * grid[1]
    return [
        TokenRow(
            key=f"{prefix}{number}",
            codes=((number * 7 + np.arange(size)) % CODEBOOK_SIZE).astype(np.uint16).reshape(grid),
            captions=[f"short {number}", f"a long caption of {number}"],
            metadata={"number": number, "nested": {"name": "größe"}},
            source=prefix,
        )
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def shard_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 rows of two grids in three shards; the middle one holds both grids, interleaved."""
    directory = tmp_path_factory.mktemp("shards")
    wide, square = make_rows(20, (2, 3), "wide"), make_rows(41, (2, 2), "square")
    mixed = [row for pair in zip(wide[:10], square[:10], strict=True) for row in pair]
    return write_rows(directory, {"a": square[10:], "b": mixed, "c": wide[10:]})


@pytest.fixture(scope="session")
def text_tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text_tokenizer")
    train_text_tokenizer((f"a long caption of {number}, short" for number in range(100)), 280, directory)
    return directory
