"""Read token shards by memory map.

Reading goes past `datasets`: a row is some offsets and slices of mapped bytes. Each row's checksum is compared whenever
it is read, so nothing damaged is trained on and no start waits until 88 GB are hashed. A file of prompts reads as rows
with an empty grid. Nothing here knows of pictures, of text tokenizers or of the order of training.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from simplear.data.shards.format import (
    DAMAGED,
    MANIFEST_FILE,
    SCHEMA,
    TEXT_END,
    Grid,
    TokenRow,
    all_entries,
    read_json,
    require_version,
    row_checksum,
    rows_table,
)
from simplear.errors import MissingFileError, SystemRefusedError, UserError
from simplear.hashing import Int64, sha256_of
from simplear.text_files import PROMPT_SUFFIXES, read_prompts

logger = logging.getLogger(__name__)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished directory.

    Raises:
        FileNotFoundError: directory or manifest is missing.
        ValueError: no JSON, or of another version.
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
    manifest = read_json(path)
    require_version(path, manifest)
    return manifest


@dataclass(frozen=True)
class Rows:
    """Some rows of one grid, column by column."""

    numbers: Int64
    """(B,) which rows of all."""
    keys: list[str]
    codes: npt.NDArray[np.uint16]
    """(B, h, w)"""
    captions: list[list[str]]
    metadata: list[dict[str, Any]]


@dataclass
class Shard:
    """One file of rows, as a manifest or a sidecar states it."""

    path: Path
    rows: int
    grids: dict[Grid, int]
    sha256: str = ""
    size: int = 0
    """Bytes of the file."""
    path_number: int = 0
    """Which of the paths it belongs to."""
    table: pa.Table | None = None
    """Prompts alone are held; files are mapped when first read."""
    missing: bool = False
    """Set aside as damaged; the rows keep their numbers."""


class TokenShards:
    """Random access to the rows of one or several directories of shards, or files of prompts, one after another.

    Opening reads the manifests and compares file sizes; shards are mapped when first read.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], *, reserve: bool = False) -> None:
        """
        Args:
            paths: directories that `simplear tokenize` wrote, and ``.jsonl`` files of prompts.
            reserve: rows of shards that were set aside as damaged keep their numbers and their places in buckets, where
                other rows stand in for them (`Bucket.stand_ins`), so that the order of the others does not change.

        Raises:
            FileNotFoundError: a path, manifest or shard is missing.
            ValueError: a manifest of another version, a shard of another size than its sidecar states, or directories
                of different visual tokenizers.
        """
        self.fingerprint: str | None = None
        """Of the visual tokenizer; None when there are prompts or texts alone."""
        self.codebook_size: int | None = None
        """None when there are prompts or texts alone."""
        self.downsample: int | None = None
        """Pixels per code along each side; None when there are prompts or texts alone."""
        self.holds_texts = False
        """Whether a directory holds texts without images, which name no visual tokenizer."""
        self.holds_prompts = False
        """Whether a path is a file of prompts."""
        self._shards: list[Shard] = []
        self._columns: dict[int, Columns] = {}
        self.paths = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
        for number, path in enumerate(self.paths):
            first = len(self._shards)
            if path.suffix == ".arrow":
                raise UserError(f"{path} is one shard: name its directory, {path.parent}.")
            if path.is_file() or path.suffix.lower() in filter(None, PROMPT_SUFFIXES):
                rows = [
                    TokenRow(str(number), np.empty((0, 0), np.uint16), [prompt], metadata, path.name)
                    for number, (prompt, metadata) in enumerate(read_prompts(path), start=1)
                ]
                self.holds_prompts = True
                self._shards.append(Shard(path, len(rows), {(0, 0): len(rows)}, table=rows_table(rows)))
            else:
                self._add_directory(path, reserve)
            for shard in self._shards[first:]:
                shard.path_number = number
        self._shards = [shard for shard in self._shards if shard.rows]
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)])

    def _add_directory(self, directory: Path, reserve: bool) -> None:
        manifest = read_manifest(directory)
        if manifest.get("missing"):
            logger.warning(
                "%s lacks %d shards that were set aside as damaged, the first is %s: `%s` again writes them; without "
                "them, other rows take their places in training",
                directory,
                len(manifest["missing"]),
                manifest["missing"][0],
                manifest.get("made_by", "simplear tokenize"),
            )
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
        set_aside = manifest.get("set_aside", {})
        whole = {grid for entry in manifest["shards"] for grid in entry["grids"]}
        for name, entry in all_entries(manifest).items():
            if name in set_aside:
                if reserve:
                    # A grid of which nothing is left has no row to stand in.
                    grids = {_grid(grid): count for grid, count in entry["grids"].items() if grid in whole}
                    self._shards.append(Shard(directory / f"{name}.arrow", entry["rows"], grids, missing=True))
                continue
            path = directory / entry["file"]
            if not path.exists():
                raise MissingFileError(f"{path} is missing: run the same `simplear tokenize` again to write it.")
            if (size := path.stat().st_size) != entry["bytes"]:
                raise UserError(
                    f"{path} has {size} bytes instead of {entry['bytes']}: it is cut short or changed; run the same "
                    "`simplear tokenize` again to write it."
                )
            self._shards.append(stated_shard(directory, entry))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        # Data loader processes map the files anew: mapped columns would be copied into them.
        return self.__dict__ | {"_columns": {}}

    @property
    def grids(self) -> dict[Grid, int]:
        """Rows of each grid (h, w), sorted by grid."""
        counts: dict[Grid, int] = {}
        for shard in self._shards:
            for grid, count in shard.grids.items():
                counts[grid] = counts.get(grid, 0) + count
        return dict(sorted(counts.items()))

    def rows_by_path(self, grid: Grid) -> list[int]:
        """Rows of a grid in each of `paths`; a bucket has them in this order."""
        counts = [0] * len(self.paths)
        for shard in self._shards:
            counts[shard.path_number] += shard.grids.get(grid, 0)
        return counts

    def bucket(self, grid: Grid) -> Bucket:
        """The rows of one grid; reads heights and widths of shards of mixed grids alone."""
        starts: list[int] = []
        counts: list[int] = []
        of: list[Shard] = []
        picks: dict[int, Int64] = {}
        for index, shard in enumerate(self._shards):
            if grid not in shard.grids:
                continue
            if len(shard.grids) > 1 and not shard.missing:
                columns = self._open(index)
                rows = np.flatnonzero((columns.height == grid[0]) & (columns.width == grid[1]))
                if len(rows) != shard.grids[grid]:
                    raise UserError(f"{shard.path} has {len(rows)} rows of {grid}, not {shard.grids[grid]}: {DAMAGED}.")
                picks[len(starts)] = rows
            starts.append(int(self._starts[index]))
            counts.append(shard.grids[grid])
            of.append(shard)
        missing = np.array([shard.missing for shard in of])
        return Bucket(np.array(starts), np.cumsum(counts), picks, missing, np.array([s.path_number for s in of]))

    def read(self, rows: Int64) -> Rows:
        """The rows with these numbers, shape (B,), which must have one grid.

        Raises IndexError for a row that does not exist, and ValueError for rows of two grids and, naming file and row,
        for a code outside the codebook, a row that is not as it was written, or a damaged file.
        """
        rows = np.asarray(rows)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            wrong = rows[(rows < 0) | (rows >= len(self))][0]
            raise IndexError(f"row {wrong} lies outside the {len(self)} rows of {self._shards[0].path.parent}, ….")
        shard_indices = np.searchsorted(self._starts, rows, side="right") - 1
        shards, local = shard_indices.tolist(), (rows - self._starts[shard_indices]).tolist()
        columns = {shard: self._open(shard) for shard in set(shards)}
        read = [columns[shard].row(row) for shard, row in zip(shards, local, strict=True)]
        grids, codes, keys, captions, metadata = zip(*read, strict=True)
        if len(set(grids)) > 1:
            raise UserError(f"rows of the grids {sorted(set(grids))} cannot be read together.")
        stacked = np.frombuffer(bytearray().join(codes), np.uint16).reshape(len(rows), *grids[0])
        if stacked.size and self.codebook_size is not None and int(stacked.max()) >= self.codebook_size:
            number = int(np.flatnonzero((stacked >= self.codebook_size).any((1, 2)))[0])
            shard = shard_indices[number]
            raise UserError(
                f"{self._shards[shard].path}, key {keys[number]!r}: code {stacked[number].max()} in a codebook of "
                f"{self.codebook_size}, in row {rows[number] - self._starts[shard]} of the shard. The codes are of "
                "another tokenizer than the manifest says: tokenize again into another directory."
            )
        # Most sources have no metadata, and json.loads takes longer to begin than all the rest of a row.
        parsed = [{} if text == "{}" else json.loads(text) for text in metadata]
        return Rows(rows, list(keys), stacked, list(captions), parsed)

    @property
    def size(self) -> int:
        """Bytes of all shard files."""
        return sum(shard.size for shard in self._shards)

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Read every byte of this rank's share of the shards and compare SHA-256 with the manifest.

        Raises ValueError naming the first that differs.
        """
        for shard in self._shards[rank::world_size]:
            if shard.sha256:
                digest = sha256_of(shard.path)
                if digest != shard.sha256:
                    raise UserError(
                        f"{shard.path} has SHA-256 {digest[:12]}…, its sidecar {shard.sha256[:12]}…: {DAMAGED}."
                    )

    def _open(self, index: int) -> Columns:
        if index not in self._columns:
            if self._shards[index].missing:
                raise MissingFileError(f"{self._shards[index].path} was set aside as damaged.")
            self._columns[index] = Columns(self._shards[index])
        return self._columns[index]


@dataclass(frozen=True)
class Bucket:
    """Rows of one grid: positions in the bucket to numbers of rows."""

    starts: Int64
    """(S,) first row of each shard that has the grid."""
    ends: Int64
    """(S,) running total of the grid's rows."""
    picks: dict[int, Int64]
    """Of shards with several grids: the rows of this one, from the shard's beginning."""
    missing: npt.NDArray[np.bool_]
    """(S,) whether the shard was set aside, so that its rows cannot be read."""
    paths: Int64
    """(S,) which of the paths the shard is of."""

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

    def are_missing(self, positions: Int64) -> npt.NDArray[np.bool_]:
        """(B,) whether the rows at these positions were set aside."""
        return self.missing[np.searchsorted(self.ends, positions, side="right")]

    def stand_ins(self, positions: Int64, draws: npt.NDArray[np.float64]) -> Int64:
        """Positions (B,) of rows of the same path that are there.

        Args:
            positions: (B,) of rows that were set aside.
            draws: (B,) in [0, 1): each chooses among all rows of the path.
        """
        paths = self.paths[np.searchsorted(self.ends, positions, side="right")]
        counts = np.diff(self.ends, prepend=0)
        chosen = np.empty_like(positions)
        for path in np.unique(paths):
            whole = np.flatnonzero(~self.missing & (self.paths == path))
            ends = np.cumsum(counts[whole])
            numbers = (draws[paths == path] * ends[-1]).astype(np.int64)
            shards = np.searchsorted(ends, numbers, side="right")
            chosen[paths == path] = self.ends[whole][shards] - (ends[shards] - numbers)
        return chosen


class Columns:
    """Columns of a table as views into its buffers.

    Rows are slices of memory views, which stay inside them whatever the offsets say: pyarrow itself follows damaged
    lengths and offsets out of the file. (Single elements of a memory view are also half the price of numpy's.)
    """

    def __init__(self, shard: Shard) -> None:
        """Raises ValueError, naming the file, when it does not hold the shard's rows."""
        self._path, rows = shard.path, shard.rows
        table = _map_table(shard.path) if shard.table is None else shard.table
        if table.schema != SCHEMA or table.num_rows != rows or table["key"].num_chunks != 1:
            raise Damage(self._path, f"{table.num_rows} rows instead of {rows}, or other columns")
        # Of each column and its children: validity, which nothing here uses, and then offsets or values.
        buffers = {name: table[name].chunk(0).buffers() for name in SCHEMA.names}
        try:
            self._key, self._metadata = _text(*buffers["key"][1:]), _text(*buffers["metadata"][1:])
            self._token_offsets = memoryview(buffers["tokens"][1]).cast("B").cast("i")
            self._tokens = memoryview(buffers["tokens"][3] or b"").cast("B").cast("H")
            self._caption_offsets = memoryview(buffers["captions"][1]).cast("B").cast("i")
            self._captions = _text(*buffers["captions"][3:])
            self.height, self.width = (np.frombuffer(buffers[side][1], np.int32, rows) for side in ("height", "width"))
            self._heights, self._widths = self.height.data, self.width.data
            self._checksums = np.frombuffer(buffers["checksum"][1], np.uint64, rows).data
        except (ValueError, TypeError) as error:
            raise Damage(self._path, error) from error

    def row(self, index: int) -> tuple[Grid, memoryview, str, list[str], str]:
        """Grid, codes in raster order, key, captions and metadata.

        Raises ValueError, naming file and row, when they do not have the row's checksum.
        """
        keys, key_bytes = self._key
        captions, caption_bytes = self._captions
        metadata, metadata_bytes = self._metadata
        try:
            codes = self._tokens[self._token_offsets[index] : self._token_offsets[index + 1]]
            grid = self._heights[index], self._widths[index]
            texts = [key_bytes[keys[index] : keys[index + 1]]]
            for caption in range(self._caption_offsets[index], self._caption_offsets[index + 1]):
                texts.append(caption_bytes[captions[caption] : captions[caption + 1]])
            texts.append(metadata_bytes[metadata[index] : metadata[index + 1]])
        except (ValueError, IndexError) as error:
            raise Damage(f"{self._path}, row {index}", error) from error
        joined = TEXT_END.encode().join(texts)
        checksum = row_checksum(codes, grid, joined)
        if checksum != self._checksums[index]:
            wrong = f"checksum {checksum:016x} instead of {self._checksums[index]:016x}"
            raise Damage(f"{self._path}, row {index}", wrong)
        decoded = joined.decode().split(TEXT_END)  # half the time of decoding one by one
        if len(decoded) != len(texts):
            decoded = [str(text, "utf-8") for text in texts]
        return grid, codes, decoded[0], decoded[1:-1], decoded[-1]


class Damage(UserError):
    """A shard, or a row of one, that is not as it was written."""

    def __init__(self, what: object, why: object) -> None:
        super().__init__(f"{what} is damaged ({why}): {DAMAGED}.")
        self.why = str(why)


Texts = tuple[memoryview, memoryview]
"""Offsets and bytes of a column of strings."""


def _text(offsets: pa.Buffer, content: pa.Buffer | None) -> Texts:
    return memoryview(offsets).cast("B").cast("i"), memoryview(content or b"")


def _map_table(path: Path) -> pa.Table:
    try:
        # Not pyarrow.memory_map, which advises the kernel of all pages of the file and so takes ten times as long.
        # PyTorch gives the file descriptor back, which Python's mmap keeps: there may be thousands of shards.
        mapped = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
        with pa.ipc.open_stream(pa.py_buffer(mapped.numpy())) as stream:
            return stream.read_all()
    except (pa.ArrowException, OSError, RuntimeError) as error:  # RuntimeError is how PyTorch cannot map
        if os.strerror(errno.ENOMEM) in str(error):
            raise SystemRefusedError(
                errno.ENOMEM,
                f"{path} could not be mapped ({os.strerror(errno.ENOMEM)}): this process maps too many shards. Raise "
                "the system's vm.max_map_count above their number, or tokenize in larger units.",
            ) from error
        raise UserError(f"{path} is no readable Arrow stream ({error}): {DAMAGED}.") from error


def stated_shard(directory: Path, sidecar: Mapping[str, Any]) -> Shard:
    """The shard of a sidecar or of an entry of a manifest, not opened yet."""
    grids = {_grid(name): count for name, count in sidecar["grids"].items()}
    return Shard(directory / sidecar["file"], sidecar["rows"], grids, sidecar["sha256"], sidecar["bytes"])


def _grid(name: str) -> Grid:
    height, width = name.split("x")
    return int(height), int(width)
