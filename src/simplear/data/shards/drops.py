"""What was left out of a directory of shards: ``drops.parquet`` with keys and reasons, and ``drops.png``.

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
from matplotlib.figure import Figure

from simplear.atomic import remove_abandoned
from simplear.data.sample import Dropped
from simplear.data.shards.writer import write_atomically

DROPS_FILE = "drops.parquet"
UNITS_DIRECTORY = "drops"
FUNNEL_FILE = "drops.png"
SCHEMA = pa.schema({"unit": pa.string(), "key": pa.string(), "reason": pa.string()})
WIDTH, HEIGHT_OF_BAR, DOTS_PER_INCH = 8.0, 0.3, 120
"""Of the picture, in inches."""


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


def funnel(manifest: Mapping[str, Any], filters: Sequence[Sequence[str]]) -> list[tuple[str, int, int]]:
    """Reason, samples dropped for it, and samples left then, in the order in which the picture shows them.

    What no filter claims (files that are no pictures, missing captions) comes first, the most frequent first; then the
    filters in their order.

    Args:
        manifest: of token shards.
        filters: the reasons of each filter.
    """
    drops: Counter[str] = Counter()
    for shard in manifest["shards"]:
        drops.update(shard["drops"])
    claimed = [reason for reasons in filters for reason in reasons]
    others = sorted(drops.keys() - set(claimed), key=lambda reason: (-drops[reason], reason))
    left, steps = manifest["rows"] + drops.total(), []
    for reason in [*others, *(reason for reason in claimed if drops[reason])]:
        left -= drops[reason]
        steps.append((reason, drops[reason], left))
    return steps


def draw_funnel(directory: Path, manifest: Mapping[str, Any], filters: Sequence[Sequence[str]]) -> Path:
    """Write ``drops.png``: a bar for the samples read, and one for those left after each reason."""
    steps = funnel(manifest, filters)
    total = manifest["rows"] + sum(dropped for _, dropped, _ in steps)
    labels = ["read", *(reason for reason, _, _ in steps)]
    lefts = [total, *(left for _, _, left in steps)]
    figure = Figure(figsize=(WIDTH, 1 + HEIGHT_OF_BAR * len(labels)), layout="constrained", dpi=DOTS_PER_INCH)
    axes = figure.add_subplot()
    places = range(len(labels))
    axes.barh(places, lefts, color="tab:blue")
    axes.barh(places, [0, *(dropped for _, dropped, _ in steps)], left=lefts, color="tab:red", alpha=0.5)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"pictures: {manifest['rows']:,} of {total:,} kept")
    for place, left in zip(places, lefts, strict=True):
        dropped = "" if place == 0 else f", {steps[place - 1][1]:,} dropped"
        axes.text(0, place, f" {left:,}{dropped}", va="center", fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(directory / FUNNEL_FILE, image.getvalue())
    return directory / FUNNEL_FILE
