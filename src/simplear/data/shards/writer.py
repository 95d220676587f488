"""Write and commit token shards.

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
from pathlib import Path
from typing import Any

import pyarrow as pa

from simplear import atomic
from simplear.atomic import whole_file
from simplear.data.shards.format import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    SETTINGS_FILE,
    TokenRow,
    is_foreign,
    read_json,
    rows_table,
    settings_digest,
)
from simplear.errors import UserError

logger = logging.getLogger(__name__)


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
    stated = {"file": file, "rows": rows, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with whole_file(directory / file) as partial:
        partial.write_bytes(content)
    origin = {} if identity is None else {"identity": identity}
    write_json(directory / f"{Path(file).stem}.json", {**stated, **sidecar, **origin})


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
    manifest = {**settings, "rows": sum(shard["rows"] for shard in shards.values()), "shards": list(shards.values())}
    if left_out:
        logger.warning(
            "%d units in %s are not of the source now and are left out of the manifest, the first is %s",
            len(left_out),
            directory,
            left_out[0],
        )
        manifest["left_out"] = left_out
    write_json(directory / MANIFEST_FILE, manifest)
    return manifest
