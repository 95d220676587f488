"""Read token shards by memory map.

A shard is validated by pyarrow when it is opened, and each row's checksum is compared whenever the row is read. So
damaged rows are never trained on, and no start waits until 88 GB are hashed. A file of prompts is read as rows with an
empty grid. This module knows nothing of pictures, text tokenizers or the order of training.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from simplear.data.shards.format import (
    MANIFEST_FILE,
    SCHEMA,
    Grid,
    TokenRow,
    how_to_remake,
    read_versioned,
    row_checksum,
    rows_table,
)
from simplear.errors import MissingFileError, SystemRefusedError, UserError
from simplear.hashing import Int64, sha256_of
from simplear.text_files import PROMPT_SUFFIXES, read_prompts

logger = logging.getLogger(__name__)

REMEDY = "delete it and run the same `simplear tokenize` again"
"""For a damaged shard; `simplear data repair` moves all damaged ones aside."""


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished directory.

    Raises:
        FileNotFoundError: directory or manifest is missing.
        ValueError: the manifest is not JSON, or of another version.
    """
    path = directory / MANIFEST_FILE
    if not directory.is_dir():
        raise MissingFileError(
            f"no token shards at {directory}: make them with `simplear tokenize` (the demo's: make tokenize)."
        )
    if not path.exists():
        raise MissingFileError(
            f"{path} is missing, so not all shards are written: run the same `simplear tokenize` again; "
            "it goes on where it stopped."
        )
    return read_versioned(path)


@dataclass(frozen=True)
class RowBatch:
    """Some rows of one grid, column by column."""

    numbers: Int64
    """(B,) of the rows among all."""
    keys: list[str]
    codes: npt.NDArray[np.uint16]
    """(B, h, w)"""
    captions: list[list[str]]
    metadata: list[dict[str, Any]]


@dataclass
class Shard:
    """One file of rows, as a manifest states it."""

    path: Path
    path_number: int
    """Which of the paths it belongs to."""
    rows: int
    grids: dict[Grid, int]
    size: int = 0
    """Bytes of the file."""
    sha256: str = ""
    table: pa.Table | None = None
    """Of prompts; files are mapped when first read."""


class TokenShards:
    """Random access to the rows of one or several directories of shards, or files of prompts, one after another.

    Opening reads the manifests and compares file sizes; shards are mapped when first read.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path]) -> None:
        """
        Args:
            paths: directories that `simplear tokenize` wrote, and ``.jsonl`` files of prompts. A pattern such as
                ``tokens/train-*`` counts as one path, with the rows of all directories that it matches.

        Raises:
            FileNotFoundError: a path, manifest or shard is missing.
            ValueError: a manifest of another version, a shard of another size than the manifest states, or directories
                of different visual tokenizers.
        """
        self.fingerprint: str | None = None
        """Of the visual tokenizer; None if there are only prompts or texts, as the next two."""
        self.codebook_size: int | None = None
        self.downsample: int | None = None
        """Pixels per code along each side."""
        self.holds_texts = False
        """Whether a directory holds texts without images, which name no visual tokenizer."""
        self.holds_prompts = False
        """Whether a path is a file of prompts."""
        self._shards: list[Shard] = []
        self._tables: dict[int, pa.Table] = {}
        self.paths = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
        for number, path in enumerate(self.paths):
            if path.suffix == ".arrow":
                raise UserError(f"{path} is one shard: name its directory, {path.parent}.")
            if path.is_file() or path.suffix.lower() in filter(None, PROMPT_SUFFIXES):
                self._add_prompts(path, number)
            else:
                directories = sorted(path.parent.glob(path.name)) if "*" in path.name else []
                for directory in directories or [path]:
                    self._add_directory(directory, number)
        self._shards = [shard for shard in self._shards if shard.rows]
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)])

    def _add_prompts(self, file: Path, path_number: int) -> None:
        self.holds_prompts = True
        rows = [
            TokenRow(str(number), np.empty((0, 0), np.uint16), [prompt], metadata, file.name)
            for number, (prompt, metadata) in enumerate(read_prompts(file), start=1)
        ]
        self._shards.append(Shard(file, path_number, len(rows), {(0, 0): len(rows)}, table=rows_table(rows)))

    def _add_directory(self, directory: Path, path_number: int) -> None:
        manifest = read_manifest(directory)
        if missing := manifest.get("missing"):  # of an older version
            logger.warning("%s lacks %d damaged shards: %s", directory, len(missing), how_to_remake(manifest))
        if manifest["visual_tokenizer"] is None:
            self.holds_texts = True
        elif self.fingerprint not in (None, manifest["visual_tokenizer"]):
            raise UserError(
                f"{directory} was made with the visual tokenizer {manifest['visual_tokenizer'][:12]}…, the directories "
                f"before it with {str(self.fingerprint)[:12]}…: codes of two tokenizers do not mix; tokenize one again."
            )
        else:
            self.fingerprint = manifest["visual_tokenizer"]
            self.codebook_size = manifest["codebook_size"]
            self.downsample = manifest["downsample"]
        for entry in manifest["shards"]:
            path = directory / entry["file"]
            if not path.exists():
                raise MissingFileError(f"{path} is missing: run the same `simplear tokenize` again to write it.")
            if (size := path.stat().st_size) != entry["bytes"]:
                raise UserError(
                    f"{path} has {size} bytes instead of {entry['bytes']}: it is cut short or changed; run the same "
                    "`simplear tokenize` again to write it."
                )
            grids = {_grid(name): count for name, count in entry["grids"].items()}
            self._shards.append(Shard(path, path_number, entry["rows"], grids, size, entry["sha256"]))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        # Data loader processes map the files themselves: mapped tables would be copied into them.
        return self.__dict__ | {"_tables": {}}

    @property
    def grids(self) -> dict[Grid, int]:
        """Rows of each grid (h, w), sorted by grid."""
        counts: Counter[Grid] = Counter()
        for shard in self._shards:
            counts.update(shard.grids)
        return dict(sorted(counts.items()))

    def rows_by_path(self, grid: Grid) -> list[int]:
        """Rows of a grid in each of `paths`; a bucket has them in this order."""
        counts = [0] * len(self.paths)
        for shard in self._shards:
            counts[shard.path_number] += shard.grids.get(grid, 0)
        return counts

    def bucket(self, grid: Grid) -> Bucket:
        """The rows of one grid; reads only shards of several grids, and of these only heights and widths."""
        starts: list[int] = []
        counts: list[int] = []
        picks: dict[int, Int64] = {}
        for number, shard in enumerate(self._shards):
            if grid not in shard.grids:
                continue
            if len(shard.grids) > 1:
                height, width = (self._table(number)[side].to_numpy() for side in ("height", "width"))
                rows = np.flatnonzero((height == grid[0]) & (width == grid[1]))
                if len(rows) != shard.grids[grid]:
                    raise _damaged(shard.path, f"{len(rows)} rows of {grid} instead of {shard.grids[grid]}")
                picks[len(starts)] = rows
            starts.append(self._starts[number])
            counts.append(shard.grids[grid])
        return Bucket(np.array(starts), np.cumsum(counts), picks)

    def read(self, rows: Int64) -> RowBatch:
        """The rows with these numbers, shape (B,), which must have one grid.

        Raises IndexError for a row that does not exist, and ValueError for rows of two grids and, naming file and row,
        for a code outside the codebook, a row that is not as it was written, or a damaged file.
        """
        rows = np.asarray(rows)
        for row in rows[(rows < 0) | (rows >= len(self))]:
            raise IndexError(f"row {row} lies outside the {len(self)} rows of {self._shards[0].path.parent}, ….")
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        places = list(zip(shards.tolist(), (rows - self._starts[shards]).tolist(), strict=True))
        grids, codes, keys, captions, metadata = zip(*(self._row(*place) for place in places), strict=True)
        if len(set(grids)) > 1:
            raise UserError(f"rows of the grids {sorted(set(grids))} cannot be read together.")
        stacked = np.stack(codes).reshape(len(rows), *grids[0])
        if stacked.size and self.codebook_size is not None and stacked.max() >= self.codebook_size:
            number = int(np.flatnonzero((stacked >= self.codebook_size).any((1, 2)))[0])
            shard, row = places[number]
            raise UserError(
                f"{self._shards[shard].path}, key {keys[number]!r}: code {stacked[number].max()} in a codebook of "
                f"{self.codebook_size}, in row {row} of the shard. The codes are of another tokenizer than the "
                "manifest says: tokenize again into another directory."
            )
        return RowBatch(rows, list(keys), stacked, list(captions), [json.loads(text) for text in metadata])

    def _row(self, shard: int, row: int) -> tuple[Grid, npt.NDArray[np.uint16], str, list[str], str]:
        """Grid, codes in raster order, key, captions and metadata."""
        table, where = self._table(shard), f"{self._shards[shard].path}, row {row}"
        try:
            height, width, key, captions, metadata, expected = (
                table[name][row].as_py() for name in ("height", "width", "key", "captions", "metadata", "checksum")
            )
            codes = table["tokens"][row].values.to_numpy()
            checksum = row_checksum(codes, (height, width), [key, *captions, metadata])
        except (ValueError, TypeError) as error:  # a value is null
            raise _damaged(where, error) from error
        if checksum != expected:
            raise _damaged(
                f"{self._shards[shard].path}, row {row}", f"checksum {checksum:016x} instead of {expected:016x}"
            )
        return (height, width), codes, key, captions, metadata

    def _table(self, shard: int) -> pa.Table:
        entry = self._shards[shard]
        if entry.table is not None:
            return entry.table
        if shard not in self._tables:
            self._tables[shard] = _mapped(entry.path, entry.rows)
        return self._tables[shard]

    @property
    def size(self) -> int:
        """Bytes of all shard files."""
        return sum(shard.size for shard in self._shards)

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compare the SHA-256 of this rank's share of the shards with the manifest.

        Raises ValueError naming the first that differs.
        """
        for shard in self._shards[rank::world_size]:
            digest = sha256_of(shard.path) if shard.sha256 else ""
            if digest != shard.sha256:
                raise UserError(f"{shard.path} has SHA-256 {digest[:12]}…, its sidecar {shard.sha256[:12]}…: {REMEDY}.")


@dataclass(frozen=True)
class Bucket:
    """Rows of one grid: positions in the bucket to numbers of rows."""

    starts: Int64
    """(S,) first row of each shard that has the grid."""
    ends: Int64
    """(S,) running total of the grid's rows."""
    picks: dict[int, Int64]
    """Of shards with several grids: the rows of this one, counted from the shard's beginning."""

    def __len__(self) -> int:
        return int(self.ends[-1])

    def rows(self, positions: Int64) -> Int64:
        """Numbers of rows of positions in ``[0, len(self))``, shape (B,)."""
        shards = np.searchsorted(self.ends, positions, side="right")
        local = positions - np.concatenate([[0], self.ends])[shards]
        for shard in self.picks.keys() & set(shards.tolist()):
            inside = shards == shard
            local[inside] = self.picks[shard][local[inside]]
        return self.starts[shards] + local


def _mapped(path: Path, rows: int) -> pa.Table:
    """The table of a shard, whose columns lie in the mapped file."""
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            table = stream.read_all()
        table.validate(full=True)  # or damaged offsets would lead out of the file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if code := getattr(error, "errno", None):
            remedy = "make it readable, or raise vm.max_map_count above the number of shards"
            raise SystemRefusedError(code, f"{path} could not be mapped ({error}): {remedy}.") from error
        raise UserError(f"{path} is no readable Arrow stream ({error}): {REMEDY}.") from error
    if table.schema != SCHEMA or table.num_rows != rows or any(column.null_count for column in table.columns):
        raise _damaged(path, f"{table.num_rows} rows instead of {rows}, or other columns")
    return table


def _damaged(what: object, why: object) -> UserError:
    return UserError(f"{what} is damaged ({why}): {REMEDY}.")


def _grid(name: str) -> Grid:
    height, width = name.split("x")
    return int(height), int(width)
