"""What a directory of token shards consists of, and how it is written.

A directory holds one Arrow stream for each unit of work (``NAME.arrow``, which `datasets.Dataset.from_file` opens
too), its sidecar (``NAME.json``: rows, bytes, SHA-256, grids, drops), ``settings.json`` (how the codes were made), and
``manifest.json``, which merges the sidecars once all units are there. Each row has a checksum of what training reads of
it.

Files are written to a temporary name, synced and renamed, and the sidecar follows its shard: a shard that has its
sidecar is committed, whenever the process was killed. Captions (`simplear.data.sources.recaptioned`) are committed in
the same way.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from xxhash import xxh3_64_intdigest

from simplear import atomic
from simplear.atomic import whole_file
from simplear.errors import UserError
from simplear.text_files import read_object

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
"""Raised when a change makes shards, sidecars or manifests unreadable for older code, or older ones for this code."""
MANIFEST_FILE = "manifest.json"
SETTINGS_FILE = "settings.json"
OWN_FILES = (MANIFEST_FILE, SETTINGS_FILE)
MANIFEST_KEYS = ("rows", "shards", "left_out", "missing", "set_aside", "drops")
"""What a manifest has beside the settings; older versions wrote all but the first two."""
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
    records = []
    for row in rows:
        if not row.captions:
            raise UserError(f"row {row.key!r} of {row.source!r} has no caption; an empty string would be one.")
        codes, (height, width) = np.ascontiguousarray(row.codes), row.codes.shape
        metadata = json.dumps(row.metadata, ensure_ascii=False)
        try:
            checksum = row_checksum(codes, (height, width), [row.key, *row.captions, metadata])
        except UnicodeEncodeError as error:
            raise UserError(f"row {row.key!r} of {row.source!r} has text that is no valid Unicode: {error}.") from error
        records.append((row.key, codes.reshape(-1), height, width, list(row.captions), metadata, row.source, checksum))
    columns = list(zip(*records, strict=True)) or [()] * len(SCHEMA)
    return pa.table([pa.array(column, kind.type) for column, kind in zip(columns, SCHEMA, strict=True)], SCHEMA)


def how_to_remake(settings: Mapping[str, Any]) -> str:
    """What to do to have the missing shards of a directory made again; from its settings or its manifest."""
    maker = settings.get("made_by", "simplear tokenize")
    if maker == "simplear data merge":  # a verb of an earlier version
        return "train on the sets that it was merged from, as several `paths`"
    return f"run the same `{maker}` again"


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
        raise UserError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}: {remedy}.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON; the file appears complete or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
        drops: pictures without a row, counted by reason.
        identity: of what the unit was read from, see `simplear.data.Unit`.
    """
    table = rows_table(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    grids = Counter("x".join(map(str, row.codes.shape)) for row in rows)
    sidecar: dict[str, Any] = {"grids": dict(sorted(grids.items())), "drops": dict(sorted((drops or {}).items()))}
    if (directory / SETTINGS_FILE).exists():
        sidecar["settings"] = settings_digest(read_json(directory / SETTINGS_FILE))
    commit(directory, f"{name}.arrow", memoryview(sink.getvalue()), len(rows), sidecar, identity)


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
    entry = {"file": file, "rows": rows, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with whole_file(directory / file) as partial:
        partial.write_bytes(content)
    origin = {} if identity is None else {"identity": identity}
    write_json(directory / f"{Path(file).stem}.json", {**entry, **sidecar, **origin})


def committed_sidecar(directory: Path, name: str, identity: str | None = None) -> dict[str, Any] | None:
    """The sidecar of a unit whose file exists and has the size that the sidecar states; else None.

    Args:
        directory: of shards or captions.
        name: of the unit.
        identity: of what it should have been read from; None: not compared.

    Raises ValueError, naming both, if it was read from something else.
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
    """Whether a unit's file exists with its sidecar and has the size that the sidecar states."""
    return committed_sidecar(directory, name) is not None


def claim_directory(directory: Path, settings: Mapping[str, Any]) -> None:
    """Reserve the directory for these settings, or check that it was begun with the same ones.

    Args:
        directory: created if missing.
        settings: ``visual_tokenizer`` (fingerprint), ``codebook_size``, ``downsample``, and everything else that
            determines what the shards hold; JSON values.

    Raises:
        ValueError: the directory holds shards of other settings; names the first that differs.
    """
    atomic.claim_directory(directory / SETTINGS_FILE, {"format_version": FORMAT_VERSION, **settings})


def merge_manifest(directory: Path, names: Iterable[str]) -> dict[str, Any]:
    """Write and return ``manifest.json`` from ``settings.json`` and the sidecars of the named units, in their order.

    Other committed units, which the source had before, are left out, with a line that counts them.

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
                "repair` on this one, which moves it aside, and then the same tokenization again."
            )
        shards[name] = sidecar
    others = {file.stem for file in directory.iterdir() if file.suffix in (".arrow", ".parquet")} - shards.keys()
    left_out = sorted(name for name in others if is_committed(directory, name))
    if left_out:
        text = "%d units in %s are not of the source now and are left out of the manifest, the first is %s"
        logger.warning(text, len(left_out), directory, left_out[0])
    manifest = {**settings, "rows": sum(shard["rows"] for shard in shards.values()), "shards": list(shards.values())}
    write_json(directory / MANIFEST_FILE, manifest)
    return manifest
