"""Token shards: tokenized images with their captions, as Arrow files that are read by memory map.

A directory holds one Arrow stream for each unit of work (``NAME.arrow``, which `datasets.Dataset.from_file` opens
too), its sidecar (``NAME.json``: rows, bytes, SHA-256, grids, drops), ``settings.json`` (what the codes were made with
and how), and ``manifest.json``, which merges them once all units are there. Files are written to a temporary name,
synced and renamed, the sidecar after its shard: a shard that has its sidecar is committed, whatever was killed when.

Reading goes past `datasets`: a row is some offsets and slices of mapped bytes. Each row carries a checksum of what
training takes from it, compared whenever it is read, so nothing damaged is trained on and no start waits until 88 GB
are hashed. A file of prompts reads as rows with an empty grid. Nothing here knows of pictures, of text tokenizers
or of the order of training.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from xxhash import xxh3_64_intdigest

from simplear import atomic
from simplear.atomic import temporary_name, whole_file
from simplear.errors import MissingFileError, SystemRefusedError, UserError
from simplear.hashing import sha256_of
from simplear.text_files import PROMPT_SUFFIXES, read_prompts

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
"""Raised when a shard, sidecar or manifest changes so that older code cannot read it or this code not the older."""

MANIFEST_FILE = "manifest.json"
SETTINGS_FILE = "settings.json"
OWN_FILES = (MANIFEST_FILE, SETTINGS_FILE)
MANIFEST_KEYS = ("rows", "shards", "missing", "set_aside", "left_out", "drops")
"""What a manifest has beside the settings: ``missing`` names units of the set that have no whole shard, ``set_aside``
has the places, rows and grids of those of them that had one, and ``left_out`` names units that are there but no longer
in the source."""

SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "tokens": pa.list_(pa.uint16()),
        "height": pa.int32(),
        "width": pa.int32(),
        "captions": pa.list_(pa.string()),
        "metadata": pa.string(),
        "source": pa.string(),
        "checksum": pa.uint64(),
    }
)
MAX_CODEBOOK_SIZE = 2**16
"""Codes are stored as uint16."""

TEXT_END = "\0"
"""Between the texts of a row where they are read as one; a text may still have one inside."""

DAMAGED = "delete it and run the same `simplear tokenize` again"
"""What to do about a damaged shard; `simplear data repair` sets all that are damaged aside."""

SETTINGS_DIGITS = 16
"""Of the SHA-256 of a directory's settings, as each sidecar holds it."""

Grid = tuple[int, int]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenRow:
    """One tokenized image."""

    key: str
    """Names the image within its source."""
    codes: npt.NDArray[np.uint16]
    """(h, w) codes; (0, 0) for text alone."""
    captions: Sequence[str]
    """At least one."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Anything that JSON holds."""
    source: str = ""
    """The unit of work that the row comes from."""


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """The file appears complete or not at all, also when the machine stops; an older one is replaced.

    Raises OSError, naming the file, when the disk takes no more.
    """
    temporary = temporary_name(path)
    with whole_file(path, temporary):
        temporary.write_bytes(content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`write_atomically` of indented JSON."""
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def row_checksum(codes: memoryview, grid: Grid, texts: bytes) -> int:
    """XXH3 (64 bits, in [0, 2**64)) of what training reads of a row.

    Args:
        codes: uint16, in raster order, contiguous.
        grid: (h, w).
        texts: key, captions and metadata, as UTF-8 with `TEXT_END` between them.
    """
    height, width = grid
    shape = (height & 0xFFFFFFFF) << 32 | width & 0xFFFFFFFF
    return xxh3_64_intdigest(texts, xxh3_64_intdigest(codes, shape))


def rows_table(rows: Sequence[TokenRow]) -> pa.Table:
    """Rows as an Arrow table of one chunk.

    Raises ValueError, naming the row, for one without a caption, or with text that is no valid Unicode.
    """
    metadata, checksums = [], []
    for row in rows:
        if not row.captions:
            raise UserError(f"row {row.key!r} of {row.source!r} has no caption; an empty string would be one.")
        metadata.append(json.dumps(row.metadata, ensure_ascii=False))
        try:
            texts = TEXT_END.join((row.key, *row.captions, metadata[-1])).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"row {row.key!r} of {row.source!r} has text that is no valid Unicode: {error}.") from error
        checksums.append(
            row_checksum(np.ascontiguousarray(row.codes).data, (row.codes.shape[0], row.codes.shape[1]), texts)
        )
    ends = np.cumsum([0, *(row.codes.size for row in rows)], dtype=np.int32)
    values = np.concatenate([np.empty(0, np.uint16), *(row.codes.reshape(-1) for row in rows)])
    columns = {
        "key": [row.key for row in rows],
        "tokens": pa.ListArray.from_arrays(pa.array(ends), pa.array(values, pa.uint16())),
        "height": [row.codes.shape[0] for row in rows],
        "width": [row.codes.shape[1] for row in rows],
        "captions": [list(row.captions) for row in rows],
        "metadata": metadata,
        "source": [row.source for row in rows],
        "checksum": checksums,
    }
    return pa.table(columns, schema=SCHEMA)


def write_shard(
    directory: Path,
    name: str,
    rows: Sequence[TokenRow],
    drops: Mapping[str, int] | None = None,
    identity: str | None = None,
) -> None:
    """Write and commit the shard of one unit.

    Args:
        directory: existing directory.
        name: name of the unit, which names the files.
        rows: the unit's rows in their order; may be empty.
        drops: pictures that gave no row, counted by reason.
        identity: of what the unit was read from, see `simplear.data.Unit`.
    """
    table = rows_table(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(table)
    content = memoryview(sink.getvalue())
    grids: dict[str, int] = {}
    for row in rows:
        grid = "x".join(map(str, row.codes.shape))
        grids[grid] = grids.get(grid, 0) + 1
    sidecar: dict[str, Any] = {"grids": dict(sorted(grids.items())), "drops": dict(sorted((drops or {}).items()))}
    if (directory / SETTINGS_FILE).exists():
        sidecar["settings"] = settings_digest(read_json(directory / SETTINGS_FILE))
    commit(directory, f"{name}.arrow", content, len(rows), sidecar, identity)


def commit(
    directory: Path,
    file: str,
    content: bytes | memoryview,
    rows: int,
    sidecar: Mapping[str, Any],
    identity: str | None = None,
) -> None:
    """Write a unit's file, and then the sidecar that commits it.

    Args:
        directory: existing directory.
        file: the file's name.
        content: of the file.
        rows: in it.
        sidecar: what the sidecar states beside rows, bytes and SHA-256.
        identity: of what the unit was read from.
    """
    stated = {"file": file, "rows": rows, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(directory / file, content)
    origin = {} if identity is None else {"identity": identity}
    write_json(directory / f"{Path(file).stem}.json", {**stated, **sidecar, **origin})


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Names the settings of a directory; a shard whose sidecar has another one was made for another directory."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:SETTINGS_DIGITS]


def committed_sidecar(directory: Path, name: str, identity: str | None = None) -> dict[str, Any] | None:
    """The sidecar of a unit whose file is there and has the size that the sidecar states; else None.

    Args:
        directory: of shards or captions.
        name: of the unit.
        identity: of what it should have been read from; None: not compared.

    Raises ValueError, naming both, where it was read from something else.
    """
    file = directory / f"{name}.json"
    try:
        sidecar = read_json(file)
        if (directory / sidecar["file"]).stat().st_size != sidecar["bytes"]:
            return None
    except FileNotFoundError:
        return None
    except KeyError as error:
        raise UserError(f"{file} states no {error}: delete it and run the same again.") from error
    if identity is not None and sidecar.get("identity", identity) != identity:
        raise UserError(
            f"{directory / sidecar['file']} was made from {name} of {sidecar['identity']}; the source's {name} has "
            f"{identity}: take another directory for another corpus, or, where the file was fetched again, delete "
            f"{file} and run the same again."
        )
    return sidecar


def is_committed(directory: Path, name: str) -> bool:
    """Whether a unit's shard is there with its sidecar and has the size that the sidecar states."""
    return committed_sidecar(directory, name) is not None


def claim_directory(directory: Path, settings: Mapping[str, Any]) -> None:
    """Make the directory one of these settings, or make sure that it is already.

    Args:
        settings: ``visual_tokenizer`` (fingerprint), ``codebook_size``, ``downsample``, and whatever else decides what
            the shards hold; JSON values.

    Raises:
        ValueError: the directory holds shards of other settings; names the first that differs.
    """
    atomic.claim_directory(directory / SETTINGS_FILE, {"format_version": FORMAT_VERSION, **settings})


def merge_manifest(directory: Path, names: Iterable[str]) -> dict[str, Any]:
    """Write and return ``manifest.json`` from ``settings.json`` and the sidecars of the named units, in their order.

    Other units that are committed there, of a source that had them before, are left out of it, with a line that counts
    them.

    Raises ValueError naming the first unit that is not committed, or that was made for another directory.
    """
    settings = read_json(directory / SETTINGS_FILE)
    shards: dict[str, Mapping[str, Any]] = {}
    for name in names:
        sidecar = committed_sidecar(directory, name)
        if sidecar is None:
            raise UserError(f"unit {name} in {directory} is not finished: run the same command again.")
        if is_foreign(sidecar, settings):
            raise UserError(
                f"{directory / sidecar['file']} was made for another directory, of other settings: run `simplear data "
                "repair` on this one, which sets it aside, and then the same tokenization again."
            )
        shards[name] = sidecar
    others = {file.stem for file in directory.glob("*.json") if file.name not in OWN_FILES} - shards.keys()
    left_out = sorted(name for name in others if _is_committed_here(directory, name))
    if left_out:
        logger.warning(
            "%d units in %s are not of the source now and are left out of the manifest, the first is %s",
            len(left_out),
            directory,
            left_out[0],
        )
    return write_manifest(directory, settings, list(shards.values()), left_out=left_out)


def _is_committed_here(directory: Path, name: str) -> bool:
    """Of any JSON file: whether it is a sidecar."""
    try:
        return is_committed(directory, name)
    except (ValueError, TypeError):
        return False


def is_foreign(sidecar: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a sidecar says that its shard was made under other settings; those written before it said so do not."""
    return sidecar.get("settings") not in (None, settings_digest(settings))


def write_manifest(
    directory: Path, settings: Mapping[str, Any], shards: Sequence[Mapping[str, Any]], **notes: Any
) -> dict[str, Any]:
    """Write and return ``manifest.json``.

    Args:
        directory: of the shards.
        settings: what ``settings.json`` holds.
        shards: sidecars, in the order of the rows.
        notes: ``missing``, ``set_aside`` and ``left_out`` (see `MANIFEST_KEYS`); empty ones are not written.
    """
    manifest = {**settings, "rows": sum(shard["rows"] for shard in shards), "shards": list(shards)}
    manifest |= {name: note for name, note in notes.items() if note}
    write_json(directory / MANIFEST_FILE, manifest)
    return manifest


def settings_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What ``settings.json`` holds, from a manifest."""
    return {key: value for key, value in manifest.items() if key not in MANIFEST_KEYS}


def all_entries(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Sidecars of a manifest by the names of their units, and in their places what is known of shards set aside."""
    entries = [(Path(entry["file"]).stem, entry) for entry in manifest.get("shards", [])]
    for name, note in sorted(manifest.get("set_aside", {}).items(), key=lambda item: item[1]["place"]):
        entries.insert(note["place"], (name, note))
    return dict(entries)


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON. Raises ValueError, naming the file, for one that is cut short or no object."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{path} is no JSON ({error}): delete it and tokenize again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object: delete it and tokenize again.")
    return content


def require_version(path: Path, content: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the file, for settings or a manifest of another format version."""
    if (version := content.get("format_version")) != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        remedy = "update simplear" if newer else "remove the directory and tokenize again"
        raise UserError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}: {remedy}.")


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
