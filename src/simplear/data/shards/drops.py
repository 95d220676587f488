"""``drops.parquet``: the samples that are in no shard, with their reasons.

The list of a unit (``drops/UNIT.parquet``, missing if nothing was dropped) is written before its shard is committed.
``drops.parquet`` joins the lists in the order of the units, so it depends neither on the number of processes nor on how
often they were stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from simplear.atomic import remove_abandoned, whole_file
from simplear.data.sample import Dropped

DROPS_FILE = "drops.parquet"
UNITS_DIRECTORY = "drops"
SCHEMA = pa.schema({"unit": pa.string(), "key": pa.string(), "reason": pa.string()})


def write_unit_drops(directory: Path, unit: str, dropped: Sequence[Dropped]) -> None:
    """Write ``drops/UNIT.parquet``, or remove it if nothing was dropped."""
    path = directory / UNITS_DIRECTORY / f"{unit}.parquet"
    path.unlink(missing_ok=True)
    if dropped:
        # A file name in another encoding is not text that Arrow can hold.
        keys = [None if key is None else key.encode("utf-8", "backslashreplace").decode() for key, _ in dropped]
        columns = {"unit": [unit] * len(keys), "key": keys, "reason": [reason for _, reason in dropped]}
        with whole_file(path) as partial:
            pq.write_table(pa.table(columns, schema=SCHEMA), partial)


def merge_drops(directory: Path, units: Iterable[str]) -> Path:
    """Write ``drops.parquet`` (unit, key, reason), a row for each dropped sample of the units, and return its path."""
    with whole_file(directory / DROPS_FILE) as partial, pq.ParquetWriter(partial, SCHEMA) as writer:
        for unit in units:
            path = directory / UNITS_DIRECTORY / f"{unit}.parquet"
            if path.exists():
                writer.write_table(pq.read_table(path))
    remove_abandoned(directory / UNITS_DIRECTORY)
    return directory / DROPS_FILE
