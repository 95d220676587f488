"""Data sets that Hugging Face `datasets` reads: parquet and others, local or streamed from the hub."""

from __future__ import annotations

import datetime
import glob
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simplear.data.sample import NO_CAPTION, Drop, PictureFile, Sample, column, drop, picture_at
from simplear.data.sources.base import CAPTION_KEYS, IndexedSource, Unit, captions_and_metadata, valid_text
from simplear.errors import UserError

TYPE_LENGTH = 80
"""Of a column's type in a message."""


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

        Raises ValueError for a data set, configuration, split or file that is missing, cannot be reached or is damaged,
        and for a column that the data set does not have; names those that it has.
        """
        import datasets  # takes a second to import, which other sources need not pay

        self.images = [image] if isinstance(image, str) else list(image)
        self.captions = [captions] if isinstance(captions, str) else captions
        self.key_column, self.metadata = key, metadata
        self.image_root = None if image_root is None else Path(image_root)
        self.captions_required, self.rows_per_unit, self.streaming = captions_required, rows_per_unit, streaming
        self.path, self.data_files = path, data_files
        self.unit_prefix = split
        # Where datasets takes a path for a name on the hub: it says only that the hub has none.
        if os.path.isfile(path):
            raise UserError(
                f"{path} is a file: name its format as the path, and it as data_files (--source.path parquet "
                f"--source.data_files {path})."
            )
        with self._explained():
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
        rows = shard.iter(batch_size=1)
        for number in count():
            with self._explained():
                row = next(rows, None)
            if row is None:
                return
            key = self._key(row, f"{unit.name}-{number:09d}")
            try:
                yield self._sample(row, key)
            except Drop as reason:
                drop(drops, key, reason)

    def describe(self) -> dict[str, Any]:
        """Also the number of rows, where they are numbered."""
        return super().describe() | ({} if self.streaming else {"rows": len(self)})

    def hint(self, drops: Mapping[str, int]) -> str:
        """The columns and their types."""
        row = next(self.rows.iter(batch_size=1), None)
        columns = [f"{field.name} ({str(field.type)[:TYPE_LENGTH]})" for field in (row.schema if row else ())]
        return (
            f"the columns of {self.path} are {', '.join(columns)}; pictures are read from "
            f"{', '.join(self.images)}, and captions, texts or lists of texts, from "
            f"{', '.join(self.captions or CAPTION_KEYS)} (--source.image and --source.captions name others; a.b is b "
            "of the object a)."
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What `datasets` raises in the block becomes a UserError: its builders have errors of all kinds."""
        try:
            yield
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            path, files = self.path, self.data_files
            said = " ".join(str(cause).split()) or type(cause).__name__
            if isinstance(error, ConnectionError) and not os.path.exists(path):
                said = f"there is no directory of this name, and the hub cannot be asked: {said}"
            elif (isinstance(cause, pa.ArrowException) or type(cause) is OSError) and (damaged := self._damaged_file()):
                said = f"{damaged} is damaged: {said.rstrip('.')}: fetch it again, or leave it out of data_files"
            of = f" of {files}" if isinstance(files, str) else ""
            raise UserError(f"the data set {path}{of} cannot be read: {said.rstrip('.')}.") from error

    def _damaged_file(self) -> str | None:
        """The first parquet file on this machine that cannot be read, of those that the data set may have."""
        folder = self.path if os.path.isdir(self.path) else ""
        files = self.data_files or (["**/*.parquet"] if folder else [])
        patterns = [files] if isinstance(files, str) else files if isinstance(files, list) else []
        for file in (
            file for each in patterns for file in sorted(glob.glob(os.path.join(folder, each), recursive=True))
        ):
            try:
                for _ in pq.ParquetFile(file).iter_batches() if file.endswith(".parquet") else ():
                    pass
            except (pa.ArrowException, OSError):
                return file
        return None

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
        name = ""
        if isinstance(picture, Mapping):  # how `datasets` holds pictures: their bytes, or where they are
            name = picture.get("path") or ""
            picture = picture.get("bytes") or name
        if isinstance(picture, str) and picture:
            return picture_at(picture, self.image_root)
        if not isinstance(picture, bytes):
            raise Drop("no picture")
        return PictureFile(picture, name)

    def _require_columns(self, features: Mapping[str, Any]) -> None:
        path, there = self.path, ", ".join(features)
        wanted = [*self.images, *(self.captions or []), *(self.metadata or [])]
        for name in [*wanted, *([self.key_column] if self.key_column else [])]:
            if name not in features and name.partition(".")[0] not in features:
                raise UserError(
                    f"{path} has no column {name!r}; it has {there}: set image, captions, key and metadata accordingly."
                )
        if self.captions is None and self.captions_required and not any(name in features for name in CAPTION_KEYS):
            raise UserError(
                f"{path} has none of the columns {', '.join(CAPTION_KEYS)}; it has {there}: name that of the captions "
                "(--source.captions NAME), or set captions_required to false."
            )


def _json_value(value: Any) -> Any:
    """Times as text; bytes, which metadata cannot hold, as None."""
    if isinstance(value, Mapping):
        return {key: _json_value(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_json_value(part) for part in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if value is None or isinstance(value, str | bool | int | float) else None
