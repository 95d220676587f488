"""Data sets that Hugging Face `datasets` reads: parquet and others, local or streamed from the hub."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from simplear.data.drops import drop
from simplear.data.pictures import Drop, PictureFile
from simplear.data.sources.base import (
    NO_CAPTION,
    IndexedSource,
    Sample,
    Unit,
    captions_and_metadata,
    column,
    valid_text,
)
from simplear.errors import UserError


class HuggingFaceSource(IndexedSource):
    """Rows of a `datasets` data set; a column is named as it is, or "a.b" for b of the struct a.

    Streamed, each file of the data set is a unit and nothing is copied to the local cache; else the rows have numbers,
    and `rows_per_unit` of them are a unit.
    """

    local_paths = frozenset({"path", "data_files", "image_root"})

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        split: str = "train",
        data_files: str | list[str] | None = None,
        revision: str | None = None,
        streaming: bool = False,
        image: str | list[str] = "image",
        image_root: str | None = None,
        captions: str | list[str] | None = None,
        key: str | None = None,
        metadata: list[str] | None = None,
        captions_required: bool = True,
        rows_per_unit: int = 1000,
    ) -> None:
        """
        Args:
            path: Name on the hub, local directory, or a format such as "parquet" with data_files.
            name: Configuration of the data set.
            split: Split of the data set.
            data_files: Files or patterns to read.
            revision: Commit or tag on the hub; name one, for a branch moves.
            streaming: Read the files as they are, one unit each, without a copy in the cache.
            image: Column of the pictures; of several the first that has one.
            image_root: Directory in which to look for pictures where the column holds file names.
            captions: Columns that hold captions, all of which count; by default captions, caption or text.
            key: Column that names a sample; by default split and number.
            metadata: Columns to keep; by default all but pictures and captions.
            captions_required: False keeps pictures without a caption, for recaptioning.
            rows_per_unit: Rows in one token shard, when not streamed.

        Raises:
            FileNotFoundError: nothing at path or data_files.
            ValueError: a column that the data set does not have; names those that it has.
        """
        import datasets  # takes a second to import, which other sources need not pay

        self.path = path
        self.images = [image] if isinstance(image, str) else list(image)
        self.captions = [captions] if isinstance(captions, str) else captions
        self.key_column, self.metadata = key, metadata
        self.image_root = None if image_root is None else Path(image_root)
        self.captions_required, self.rows_per_unit, self.streaming = captions_required, rows_per_unit, streaming
        self.unit_prefix = split
        opened = datasets.load_dataset(
            path, name, split=split, data_files=data_files, revision=revision, streaming=streaming
        )
        if opened.features is not None:
            self._require_columns(opened.features)
        self.rows = opened.with_format("arrow")

    def __len__(self) -> int:
        if self.streaming:
            raise UserError(f"{self.path} is streamed and has no numbered rows: set streaming to false.")
        return len(self.rows)

    def units(self) -> list[Unit]:
        if not self.streaming:
            return super().units()
        shards = self.rows.num_shards
        return [Unit(f"{self.unit_prefix}-{number:05d}-of-{shards:05d}", number) for number in range(shards)]

    def key(self, index: int) -> str:
        return self._key(self.rows[index], super().key(index))

    def sample(self, index: int) -> Sample:
        """Row `index`."""
        row = self.rows[index]
        return self._sample(row, self._key(row, super().key(index)))

    def candidates(self, unit: Unit, drops: Counter[str]) -> Iterator[Sample]:
        if not self.streaming:
            yield from super().candidates(unit, drops)
            return
        shard = self.rows.shard(self.rows.num_shards, unit.part)
        # iter(shard) would share it out among PyTorch's loader processes, and all but one get nothing; larger batches
        # fail where the columns of tars come in another order.
        for number, row in enumerate(shard.iter(batch_size=1)):
            key = self._key(row, f"{unit.name}-{number:09d}")
            try:
                yield self._sample(row, key)
            except Drop as reason:
                drop(drops, key, reason)

    def describe(self) -> dict[str, Any]:
        """Also the number of rows, where they are numbered."""
        return super().describe() | ({} if self.streaming else {"rows": len(self)})

    def _sample(self, row: Any, key: str) -> Sample:
        """Of an Arrow table of one row, whose text may be no UTF-8."""
        try:
            values = {name: row[name][0].as_py() for name in row.column_names}
        except UnicodeDecodeError as error:
            raise Drop("text is no valid Unicode") from error
        if self.key_column is not None and column(values, self.key_column) is None:
            raise Drop(f"no {self.key_column} to name it by")
        picture = next((found for name in self.images if (found := column(values, name)) is not None), None)
        others = {name: _json_value(value) for name, value in values.items() if name not in self.images}
        captions, metadata = captions_and_metadata(others, self.captions, self.metadata)
        if not captions and self.captions_required:
            raise Drop(NO_CAPTION)
        return Sample(valid_text(key), self._picture_file(picture), captions, metadata)

    def _key(self, row: Any, number: str) -> str:
        """Of the key column; the number where there is none, or none that is text."""
        if self.key_column is None:
            return number
        top = self.key_column if self.key_column in row.column_names else self.key_column.partition(".")[0]
        try:
            found = column({top: row[top][0].as_py()}, self.key_column)
        except UnicodeDecodeError:
            return number
        return number if found is None else str(found)

    def _picture_file(self, picture: Any) -> PictureFile:
        if isinstance(picture, Mapping):  # how `datasets` holds pictures: their bytes, or where they are
            picture = picture.get("bytes") or picture.get("path")
        if isinstance(picture, str):
            path = Path(picture) if self.image_root is None else self.image_root / picture
            return PictureFile(path)
        if not isinstance(picture, bytes):
            raise Drop("no picture")
        return PictureFile(picture)

    def _require_columns(self, features: Mapping[str, Any]) -> None:
        wanted = [*self.images, *(self.captions or []), *(self.metadata or [])]
        for name in [*wanted, *([self.key_column] if self.key_column else [])]:
            if name not in features and name.partition(".")[0] not in features:
                raise UserError(
                    f"{self.path} has no column {name!r}; it has {', '.join(features)}: set image, "
                    "captions, key and metadata accordingly."
                )


def _json_value(value: Any) -> Any:
    """Times as text; bytes, which are no metadata, as None."""
    if isinstance(value, Mapping):
        return {key: _json_value(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_json_value(part) for part in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if value is None or isinstance(value, str | bool | int | float) else None
