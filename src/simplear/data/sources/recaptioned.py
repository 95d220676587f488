"""New captions of a source's pictures on disk, and the source that has them instead of its own.

A directory holds, for each unit of the source, a Parquet table (``NAME.parquet``: key, the long and the short caption,
what is wrong with either, the captions there were before) with its sidecar (``NAME.json``: rows, bytes, SHA-256, drops
and problems by reason). They are written as token shards are: a unit that has its sidecar is finished, whatever was
killed when. ``manifest.json`` merges the sidecars with prompts, model and revision.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from simplear.atomic import difference, shortened
from simplear.data.sample import Sample, drop
from simplear.data.shards import MANIFEST_FILE, commit, settings_digest, settings_of
from simplear.data.sources.base import Source, Unit, decoded
from simplear.errors import MissingFileError, UserError

FORMAT_VERSION = 1
"""Of the tables; raised when older code cannot read newer ones or the other way round."""
KINDS = ("long", "short")
SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "long": pa.string(),
        "short": pa.string(),
        "long_problem": pa.string(),
        "short_problem": pa.string(),
        "captions": pa.list_(pa.string()),
    }
)
"""A caption is null where its problem is not; ``captions`` are those of the source."""


def write_captions(
    directory: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    drops: Mapping[str, int],
    identity: str | None = None,
) -> None:
    """Write and commit the table of one unit.

    Args:
        directory: existing directory.
        name: name of the unit, which names the files.
        rows: of `SCHEMA`, in the order of the source; may be empty.
        drops: pictures that the source left out, counted by reason.
        identity: of what the unit was read from, see `simplear.data.Unit`.
    """
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows], SCHEMA), sink)
    problems = Counter(f"{kind}: {row[f'{kind}_problem']}" for row in rows for kind in KINDS if row[kind] is None)
    sidecar = {"drops": dict(sorted(drops.items())), "problems": dict(sorted(problems.items()))}
    commit(directory, f"{name}.parquet", sink.getvalue(), len(rows), sidecar, identity)


class RecaptionedSource(Source):
    """The pictures of a source with the captions that `recaption` wrote: long, then short.

    Captions are found by key; where a unit has a key twice, by their order. A picture without a usable new caption is
    dropped and counted, as is one whose key has no row.
    """

    def __init__(self, source: Source, captions: str, *, keep_original: bool = False) -> None:
        """
        Args:
            source: The source that was recaptioned, with the same settings.
            captions: Directory that `simplear recaption` wrote.
            keep_original: Put the source's own captions after the new ones; a picture then stays also without a new
                one, as long as it has a row.

        Raises:
            FileNotFoundError: the directory or its manifest is missing.
            ValueError: the captions are of another source, or of another version of this format.
        """
        self.source, self.directory, self.keep_original = source, Path(captions), keep_original
        manifest_file = self.directory / MANIFEST_FILE
        if not manifest_file.is_file():
            raise MissingFileError(
                f"{manifest_file} is missing, so not all captions are written: run `simplear recaption` (again)."
            )
        try:
            manifest = json.loads(manifest_file.read_bytes())
            version, described, units = manifest["format_version"], manifest["source"], manifest["shards"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{manifest_file} is no manifest of captions ({error!r}): delete it and recaption again."
            ) from error
        if version != FORMAT_VERSION:
            raise UserError(f"{manifest_file} has format version {version}, this code reads {FORMAT_VERSION}.")
        if found := difference({"source": described}, {"source": source.describe()}):
            raise UserError(
                f"the captions in {captions} are of the source {shortened(described)}, not of "
                f"{shortened(source.describe())} ({found}): name the one that was recaptioned."
            )
        self._settings = settings_digest(settings_of(manifest))
        self._stated = {Path(unit["file"]).stem: unit for unit in units}

    def describe(self) -> dict[str, Any]:
        """The source, and a digest of all that the captions were made with."""
        return {**super().describe(), "captions": self._settings}

    def units(self) -> list[Unit]:
        """Those of the source; what tells them apart is also the table of their captions."""
        return [replace(unit, identity=partial(self._identity, unit)) for unit in self.source.units()]

    def _identity(self, unit: Unit) -> str:
        """Of a unit of the source. Raises ValueError for one whose captions are of another."""
        stated = self._stated.get(unit.name, {})
        parts = [f"captions of SHA-256 {str(stated.get('sha256'))[:12]}"]
        if unit.identity is not None:
            parts.insert(0, now := unit.identity())
            if stated.get("identity", now) != now:
                raise UserError(
                    f"the captions in {self.directory / stated['file']} are of {unit.name} of {stated['identity']}, "
                    f"the source's {unit.name} has {now}: name the source that was recaptioned."
                )
        return ", ".join(parts)

    def read(self, unit: Unit, drops: Counter[str]) -> Iterator[Sample]:
        """The unit's pictures with their new captions. Raises ValueError, naming the file, for a damaged table."""
        return decoded(self.candidates(unit, drops), drops)

    def candidates(self, unit: Unit, drops: Counter[str]) -> Iterator[Sample]:
        """As `read`, before pictures are decoded."""
        if unit.identity is not None:
            unit.identity()
        rows = self._rows(unit)
        for sample in self.source.candidates(unit, drops):
            if not rows[sample.key]:
                drop(drops, sample.key, "no row in the captions")
                continue
            row = rows[sample.key].popleft()
            captions = [row[kind] for kind in KINDS if row[kind] is not None]
            captions += sample.captions if self.keep_original else []
            if captions:
                yield replace(sample, captions=captions)
            else:
                drop(drops, sample.key, "no usable new caption")

    def _rows(self, unit: Unit) -> defaultdict[str, deque[dict[str, Any]]]:
        file = self.directory / f"{unit.name}.parquet"
        if not file.is_file():
            raise MissingFileError(f"{file} is missing: run the same `simplear recaption` again to write it.")
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != self._stated.get(unit.name, {}).get("sha256"):
            raise UserError(f"{file} is not as it was written: delete it and run the same `simplear recaption` again.")
        rows: defaultdict[str, deque[dict[str, Any]]] = defaultdict(deque)
        for row in parquet.read_table(io.BytesIO(content)).to_pylist():
            rows[row["key"]].append(row)
        return rows

    def hint(self, drops: Mapping[str, int]) -> str:
        return self.source.hint(drops)
