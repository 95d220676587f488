"""What a directory of token shards consists of: names, schema, checksums, settings and manifest.

A directory holds one Arrow stream for each unit of work (``NAME.arrow``, which `datasets.Dataset.from_file` opens
too), its sidecar (``NAME.json``: rows, bytes, SHA-256, grids, drops), ``settings.json`` (what the codes were made with
and how), and ``manifest.json``, which merges them once all units are there. Each row carries a checksum of what
training takes from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from xxhash import xxh3_64_intdigest

from simplear.errors import UserError

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


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Names the settings of a directory; a shard whose sidecar has another one was made for another directory."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:SETTINGS_DIGITS]


def settings_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What ``settings.json`` holds, from a manifest."""
    return {key: value for key, value in manifest.items() if key not in MANIFEST_KEYS}


def all_entries(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Sidecars of a manifest by the names of their units, and in their places what is known of shards set aside."""
    entries = [(Path(entry["file"]).stem, entry) for entry in manifest.get("shards", [])]
    for name, note in sorted(manifest.get("set_aside", {}).items(), key=lambda item: item[1]["place"]):
        entries.insert(note["place"], (name, note))
    return dict(entries)


def is_foreign(sidecar: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a sidecar says that its shard was made under other settings; those written before it said so do not."""
    return sidecar.get("settings") not in (None, settings_digest(settings))


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
