"""The token files of the paper's own code: one array of codes and one text file a picture.

That code writes ``512_codes/17.npy`` (an integer array (1, 1, h, w)) and beside it ``512_labels/17.npy``, which is not
an array but text: a caption a line, the short one before the long one if there are two. Codes are copied into token
shards as they are; `simplear tokenize` is given the visual tokenizer that made them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from simplear.data.sample import NO_CAPTION, NO_PICTURE, Drop, Sample
from simplear.data.sources.base import IndexedSource, caption_lines
from simplear.errors import MissingFileError, UserError
from simplear.hashing import sha256_of_lines

CODES, LABELS = "_codes", "_labels"
"""How the two directories end."""


class TokenFilesSource(IndexedSource):
    """Codes and captions of the paper's own code, one file of each a picture."""

    unit_prefix = "tokens"
    local_paths = frozenset({"path"})
    reads = f'captions are read from the files in "…{LABELS}", which have the names of those in "…{CODES}".'

    def __init__(self, path: str, *, rows_per_unit: int = 1000) -> None:
        """
        Args:
            path: A directory that ends in "_codes" and has one that ends in "_labels" beside it.
            rows_per_unit: Pictures in one token shard.

        Raises:
            FileNotFoundError: the directory is missing or holds no codes.
            ValueError: a directory of another name.
        """
        self.path, self.rows_per_unit = Path(path), rows_per_unit
        if not self.path.name.endswith(CODES):
            raise UserError(f'{path} does not end in "{CODES}": name the directory of codes.')
        self._labels = self.path.with_name(self.path.name.removesuffix(CODES) + LABELS)
        self._names = sorted((file.name for file in self.path.glob("*.npy")), key=_number)
        if not self._names:
            raise MissingFileError(f"{path} is not a directory that holds codes (.npy).")

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return str(self.path / self._names[index])

    def sample(self, index: int) -> Sample:
        """Picture `index`, sorted by number.

        Raises:
            Drop: the file of codes is cut short, or there is no caption.
            ValueError: an array that is not a grid of whole numbers; names the file.
        """
        codes, labels = self.path / self._names[index], self._labels / self._names[index]
        captions = caption_lines(labels.read_bytes()) if labels.exists() else []
        if not captions:
            raise Drop(NO_CAPTION)
        try:
            array = np.load(codes, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise Drop("truncated or damaged code file") from error
        if not np.issubdtype(array.dtype, np.integer) or array.ndim < 2 or array.size != np.prod(array.shape[-2:]):
            raise UserError(f"{codes} holds an array {array.shape} of {array.dtype}, not a grid of codes (1, 1, h, w).")
        grid = array.reshape(array.shape[-2:]).astype(np.int64)
        return Sample(self.key(index), NO_PICTURE, captions, codes=grid)

    def describe(self) -> dict[str, Any]:
        """Also the files' names: with others a number means another picture."""
        return {**super().describe(), "names": sha256_of_lines(self._names)}


def _number(name: str) -> tuple[int, str]:
    number = re.match(r"\d+", name)
    return (int(number[0]) if number else -1), name
