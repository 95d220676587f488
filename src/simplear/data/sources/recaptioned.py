"""New captions of a source's pictures on disk, and the source that reads them in place of the old ones.

A directory holds, for each unit of the source, a Parquet table (``NAME.parquet``: key, the long and the short caption,
the problem with either, the source's captions) with its sidecar (``NAME.json``: rows, bytes, SHA-256, drops and
problems by reason). They are written as token shards are: a unit with a sidecar is finished. ``manifest.json`` merges
the sidecars with prompts, model and revision.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from simplear.atomic import difference
from simplear.data.sample import Dropped, Sample
from simplear.data.shards import MANIFEST_FILE, commit
from simplear.data.sources.base import Source, Unit
from simplear.errors import MissingFileError, UserError
from simplear.hashing import sha256_of
from simplear.text_files import read_object

FORMAT_VERSION = 1
"""Of the tables; raised when older code cannot read newer ones or the other way round."""
KINDS = ("long", "short")
TEXTS = dict.fromkeys(("key", *KINDS, *(f"{kind}_problem" for kind in KINDS)), pa.string())
SCHEMA = pa.schema(TEXTS | {"captions": pa.list_(pa.string())})
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

    Captions are found by key. A picture without a usable new caption is dropped and counted, as is one whose key has no
    row.
    """

    not_described = frozenset({"captions"})

    def __init__(self, source: Source, captions: str, *, keep_original: bool = False) -> None:
        """
        Args:
            source: The source that was recaptioned, with the same settings.
            captions: Directory that `simplear recaption` wrote.
            keep_original: Put the source's own captions after the new ones; a picture that has a row then stays also
                without a new caption.

        Raises:
            FileNotFoundError: the directory or its manifest is missing.
            ValueError: the captions are of another source, or of another version of this format.
        """
        self.source, self.directory, self.keep_original = source, Path(captions), keep_original
        self.reads = source.reads
        manifest_file = self.directory / MANIFEST_FILE
        if not manifest_file.is_file():
            raise MissingFileError(
                f"{manifest_file} is missing, so not all captions are written: run `simplear recaption` (again)."
            )
        manifest = read_object(manifest_file)
        if (version := manifest.get("format_version")) != FORMAT_VERSION:
            raise UserError(f"{manifest_file} has format version {version}, this code reads {FORMAT_VERSION}.")
        if found := difference({"source": manifest["source"]}, {"source": source.describe()}):
            raise UserError(f"the captions in {captions} are of another source ({found}): name the one recaptioned.")
        self._stated = {Path(unit["file"]).stem: unit for unit in manifest["shards"]}

    def units(self) -> list[Unit]:
        """Those of the source; their identity covers the table of captions too."""
        return [replace(unit, identity=partial(self._identity, unit)) for unit in self.source.units()]

    def _identity(self, unit: Unit) -> str:
        """Of a unit of the source. Raises ValueError for one whose captions are of another."""
        stated = self._stated.get(unit.name, {})
        captions = f"captions of SHA-256 {str(stated.get('sha256'))[:12]}"
        if unit.identity is None:
            return captions
        now = unit.identity()
        if stated.get("identity", now) != now:
            raise UserError(
                f"the captions in {self.directory / stated['file']} are of {unit.name} of {stated['identity']}, "
                f"the source's {unit.name} has {now}: name the source that was recaptioned."
            )
        return f"{now}, {captions}"

    def read(self, unit: Unit, dropped: list[Dropped]) -> Iterator[Sample]:
        """The unit's pictures with their new captions. Raises ValueError, naming the file, for a damaged table."""
        if unit.identity is not None:
            unit.identity()
        rows = self._rows(unit)
        for sample in self.source.read(unit, dropped):
            row = rows.get(sample.key)
            captions = [row[kind] for kind in KINDS if row[kind] is not None] if row else []
            captions += sample.captions if row and self.keep_original else []
            if captions:
                yield replace(sample, captions=captions)
            else:
                dropped.append((sample.key, "no usable new caption" if row else "no row in the captions"))

    def _rows(self, unit: Unit) -> dict[str, dict[str, Any]]:
        file = self.directory / f"{unit.name}.parquet"
        if not file.is_file():
            raise MissingFileError(f"{file} is missing: run the same `simplear recaption` again to write it.")
        if sha256_of(file) != self._stated.get(unit.name, {}).get("sha256"):
            raise UserError(f"{file} is not as it was written: delete it and run the same `simplear recaption` again.")
        # Of a key that comes twice the first row counts: the second picture is a duplicate, which `tokenize` drops.
        return {row["key"]: row for row in reversed(parquet.read_table(file).to_pylist())}
