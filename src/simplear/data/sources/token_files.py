"""The token files of the paper's own code: one array of codes and one text file a picture.

That code writes ``512_codes/17.npy`` (an integer array (1, 1, h, w)) and beside it ``512_labels/17.npy``, which is no
array but text: a caption a line, the short one before the long one where there are two. Its training reads a JSON list
of ``{"code_path": …, "label_path": …}``. Codes are copied into token shards as they are; `simplear tokenize` is given,
as ever, the visual tokenizer that made them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from simplear.data.sample import NO_CAPTION, NO_PICTURE, Drop, Sample, read_unchanged
from simplear.data.sources.base import IndexedSource, caption_lines, valid_text
from simplear.errors import MissingFileError, UserError
from simplear.hashing import sha256_of_lines
from simplear.text_files import read_json, read_objects

CODES, LABELS = "_codes", "_labels"
"""How the two directories end."""


class TokenFilesSource(IndexedSource):
    """Codes and captions of the paper's own code, one file of each a picture."""

    unit_prefix = "tokens"
    local_paths = frozenset({"path", "root"})

    def __init__(self, path: str, *, root: str | None = None, rows_per_unit: int = 1000) -> None:
        """
        Args:
            path: A directory that ends in "_codes" and has one that ends in "_labels" beside it; or the .json (or
                .jsonl) that lists code_path and label_path of each picture.
            root: Where relative paths of the list begin; by default the working directory.
            rows_per_unit: Pictures in one token shard.

        Raises:
            FileNotFoundError: no such directory or list, or an empty one.
            ValueError: a directory of another name, or a list whose entry (named by its number) lacks a path.
        """
        self.path, self.root, self.rows_per_unit = Path(path), Path(root or "."), rows_per_unit
        self._files = self._listed() if self.path.suffix in (".json", ".jsonl") else self._beside()
        if not self._files:
            raise MissingFileError(f"{path} holds no codes (.npy).")

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        return self._files[index][0]

    def sample(self, index: int) -> Sample:
        """Picture `index`, sorted by number or as listed.

        Raises:
            Drop: a file is missing or cut short, or there is no caption.
            ValueError: an array that is no grid of whole numbers; names the file.
        """
        code_file, label_file = (self.root / name for name in self._files[index])
        if not label_file.exists() and label_file.with_suffix(".txt").exists():
            label_file = label_file.with_suffix(".txt")
        captions = caption_lines(read_unchanged(label_file)) if label_file.exists() else []
        if not captions:
            raise Drop(NO_CAPTION)
        return Sample(valid_text(self.key(index)), NO_PICTURE, captions, {}, _read_codes(code_file))

    def describe(self) -> dict[str, Any]:
        """Also the files' names: with others a number means another picture."""
        listed = (Path(code).name if self.path.is_dir() else f"{code}\0{label}" for code, label in self._files)
        return {**super().describe(), "names": sha256_of_lines(listed)}

    def hint(self, drops: Mapping[str, int]) -> str:
        return f"captions are read from files such as {self._files[0][1]}." if NO_CAPTION in drops else ""

    def _beside(self) -> list[tuple[str, str]]:
        if not self.path.is_dir():
            raise MissingFileError(f"no directory of codes at {self.path}.")
        if not self.path.name.endswith(CODES):
            raise UserError(f'{self.path} does not end in "{CODES}": name the directory of codes, or the .json list.')
        labels = self.path.with_name(self.path.name.removesuffix(CODES) + LABELS)
        names = sorted((file.name for file in self.path.glob("*.npy")), key=_by_number)
        self.root = Path()
        return [(str(self.path / name), str(labels / name)) for name in names]

    def _listed(self) -> list[tuple[str, str]]:
        if self.path.suffix == ".jsonl":
            entries: Any = [entry for _, entry in read_objects(self.path)]
        else:
            entries = read_json(self.path)
        if not isinstance(entries, list):
            raise UserError(f"{self.path} is not a JSON list of objects with code_path and label_path.")
        files = []
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict) or not {"code_path", "label_path"} <= entry.keys():
                raise UserError(f"{self.path}, entry {number} is not an object with code_path and label_path.")
            files.append((str(entry["code_path"]), str(entry["label_path"])))
        return files


def _by_number(name: str) -> tuple[int, str]:
    number = re.match(r"\d+", name)
    return (int(number[0]) if number else -1), name


def _read_codes(file: Path) -> npt.NDArray[np.int64]:
    """(h, w) of an array (…, h, w) whose other sides are 1."""
    try:
        array = np.load(io.BytesIO(read_unchanged(file)), allow_pickle=False)
    except FileNotFoundError as error:
        raise Drop("code file missing") from error
    except (ValueError, EOFError) as error:
        raise Drop("truncated or damaged code file") from error
    if array.ndim < 2 or array.size != array.shape[-2] * array.shape[-1] or not np.issubdtype(array.dtype, np.integer):
        raise UserError(
            f"{file} holds an array {array.shape} of {array.dtype}, no grid of whole numbers (1, 1, h, w): these are "
            "no codes of an image tokenizer."
        )
    return array.reshape(array.shape[-2:]).astype(np.int64)
