"""What was left out and why: counts by reason while reading, and a list of keys and reasons beside the shards.

A unit's list is written before its shard is committed, so a committed unit always has one (none where nothing was
dropped). ``drops.parquet`` is put together from them in the order of the units, like the manifest, and so is the same
however many processes there were and however often they were stopped.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simplear.atomic import remove_abandoned
from simplear.data.shards.reader import write_atomically

DROPS_FILE = "drops.parquet"
UNITS_DIRECTORY = "drops"
SCHEMA = pa.schema({"unit": pa.string(), "key": pa.string(), "reason": pa.string()})

Dropped = tuple[str | None, str]
"""Key and reason; no key where a source counted without naming it."""


class Drops(Counter[str]):
    """Counts by reason that know the keys too, for whoever reads a source."""

    def __init__(self) -> None:
        super().__init__()
        self._named: list[tuple[str, str]] = []

    def listed(self) -> list[Dropped]:
        """Every drop in the order of dropping, then those without a key."""
        unnamed = Counter(self)
        unnamed.subtract(reason for _, reason in self._named)
        return [*self._named, *((None, reason) for reason in sorted(unnamed.elements()))]

    def name(self, key: str, reason: str) -> None:
        """Remember the key of a drop; it is counted apart."""
        self._named.append((key, reason))


def drop(drops: Counter[str], key: str, reason: object) -> None:
    """Count a sample that is left out; `Drops` also remember its key."""
    drops[str(reason)] += 1
    if isinstance(drops, Drops):
        drops.name(key, str(reason))


def write_unit_drops(directory: Path, unit: str, dropped: Sequence[Dropped]) -> None:
    """Write ``drops/UNIT.parquet``, or remove it where nothing was dropped."""
    path = directory / UNITS_DIRECTORY / f"{unit}.parquet"
    if not dropped:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    pq.write_table(_table(unit, dropped), buffer)
    write_atomically(path, buffer.getvalue())


def copy_unit_drops(source: Path, unit: str, target: Path, name: str) -> None:
    """Write a unit's list of another directory into this one, where it is called ``name``."""
    path = source / UNITS_DIRECTORY / f"{unit}.parquet"
    listed = pq.read_table(path).to_pylist() if path.exists() else []
    write_unit_drops(target, name, [(row["key"], row["reason"]) for row in listed])


def merge_drops(directory: Path, shards: Iterable[Mapping[str, Any]]) -> Path:
    """Write ``drops.parquet`` (unit, key, reason): a row for each sample that is in no shard.

    Args:
        directory: of the shards.
        shards: the manifest's, whose counts decide: what they have beyond the unit's list comes without a key.
    """
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, SCHEMA) as writer:
        for shard in shards:
            unit = shard["file"].removesuffix(".arrow")
            path = directory / UNITS_DIRECTORY / f"{unit}.parquet"
            missing = Counter(shard["drops"])
            if path.exists():
                listed = pq.read_table(path)
                missing.subtract(listed["reason"].to_pylist())
                writer.write_table(listed)
            if rest := [(None, reason) for reason in sorted(missing.elements())]:
                writer.write_table(_table(unit, rest))
    write_atomically(directory / DROPS_FILE, buffer.getvalue())
    remove_abandoned(directory / UNITS_DIRECTORY)
    return directory / DROPS_FILE


def _table(unit: str, dropped: Sequence[Dropped]) -> pa.Table:
    # A file name in another encoding is no text that Arrow could hold.
    keys = [None if key is None else key.encode("utf-8", "backslashreplace").decode() for key, _ in dropped]
    columns = {"unit": [unit] * len(keys), "key": keys, "reason": [reason for _, reason in dropped]}
    return pa.table(columns, schema=SCHEMA)
