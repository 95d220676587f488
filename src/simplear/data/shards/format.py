"""What a directory of token shards consists of: names, schema, checksums, settings and manifest.

A directory holds one Arrow stream for each unit of work (``NAME.arrow``, which `datasets.Dataset.from_file` opens
too), its sidecar (``NAME.json``: rows, bytes, SHA-256, grids, drops), ``settings.json`` (how the codes were made), and
``manifest.json``, which merges the sidecars once all units are there. Each row has a checksum of what training reads of
it.
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
from simplear.text_files import read_object

FORMAT_VERSION = 3
"""Raised when a change makes shards, sidecars or manifests unreadable for older code, or older ones for this code."""
MANIFEST_FILE = "manifest.json"
SETTINGS_FILE = "settings.json"
OWN_FILES = (MANIFEST_FILE, SETTINGS_FILE)
MANIFEST_KEYS = ("rows", "shards", "left_out", "missing", "set_aside", "drops")
"""What a manifest has beside the settings. ``left_out`` names units that are in the directory but no longer in the
source; ``missing``, ``set_aside`` and ``drops`` occur in older manifests alone."""
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
SETTINGS_DIGITS = 16
"""Of the SHA-256 of a directory's settings, which each sidecar holds."""
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
    """JSON values."""
    source: str = ""
    """The unit of work that the row comes from."""


def row_checksum(codes: npt.NDArray[np.uint16], grid: Grid, texts: Sequence[str]) -> int:
    """XXH3 (64 bits, in [0, 2**64)) of what training reads of a row.

    Args:
        codes: in raster order, contiguous.
        grid: (h, w).
        texts: key, captions and metadata.
    """
    height, width = grid
    shape = (height & 0xFFFFFFFF) << 32 | width & 0xFFFFFFFF
    return xxh3_64_intdigest("\0".join(texts).encode(), xxh3_64_intdigest(codes.data, shape))


def rows_table(rows: Sequence[TokenRow]) -> pa.Table:
    """Rows as an Arrow table of one chunk.

    Raises ValueError, naming the row, for one without a caption, or with text that is not valid Unicode.
    """
    made = []
    for row in rows:
        if not row.captions:
            raise UserError(f"row {row.key!r} of {row.source!r} has no caption; an empty string would be one.")
        codes, (height, width) = np.ascontiguousarray(row.codes), row.codes.shape
        metadata = json.dumps(row.metadata, ensure_ascii=False)
        try:
            checksum = row_checksum(codes, (height, width), [row.key, *row.captions, metadata])
        except UnicodeEncodeError as error:
            raise UserError(f"row {row.key!r} of {row.source!r} has text that is no valid Unicode: {error}.") from error
        made.append((row.key, codes.reshape(-1), height, width, list(row.captions), metadata, row.source, checksum))
    columns = list(zip(*made, strict=True)) or [()] * len(SCHEMA)
    return pa.table([pa.array(column, kind.type) for column, kind in zip(columns, SCHEMA, strict=True)], SCHEMA)


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Identifies the settings of a directory; a sidecar with another digest belongs to a shard of another directory."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:SETTINGS_DIGITS]


def settings_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What ``settings.json`` holds, from a manifest."""
    return {key: value for key, value in manifest.items() if key not in MANIFEST_KEYS}


def is_foreign(sidecar: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a shard was made under other settings; sidecars of older versions do not say so."""
    return sidecar.get("settings") not in (None, settings_digest(settings))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError, naming the file, for one that is cut short, and FileNotFoundError."""
    try:
        return read_object(path)
    except UserError as error:
        raise UserError(f"{error} Delete it and run the same `simplear tokenize` again.") from error


def read_versioned(path: Path) -> dict[str, Any]:
    """`read_json` of settings or a manifest. Raises ValueError, naming the file, for another format version."""
    content = read_json(path)
    if (version := content.get("format_version")) != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        remedy = "update simplear" if newer else "remove the directory and tokenize again"
        raise VersionError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}: {remedy}.")
    return content


class VersionError(UserError):
    """Shards that another version of this package wrote."""
