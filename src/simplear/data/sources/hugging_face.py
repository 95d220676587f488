"""Data sets that Hugging Face `datasets` reads: parquet and others, local or streamed from the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa

from simplear.data.sample import ADDRESS, Drop, Dropped, PictureFile, Sample, column
from simplear.data.sources.base import (
    CAPTION_KEYS,
    NO_PICTURE_FILE,
    NOT_UTF8,
    IndexedSource,
    Unit,
    captioned_sample,
    captions_and_metadata,
)
from simplear.errors import UserError


class HuggingFaceSource(IndexedSource):
    """Rows of a `datasets` data set; a column is named as it is, or "a.b" for b of the struct a.

    Streamed, each file of the data set is a unit and nothing is copied to the local cache; else the rows have numbers,
    and `rows_per_unit` of them are a unit.
    """

    local_paths = frozenset({"path", "data_files", "image_root"})
    reads = (
        "pictures are read from the column image, and captions, texts or lists of texts, from one of "
        f"{', '.join(CAPTION_KEYS)} (--source.image and --source.captions name others; a.b is b of the object a)."
    )

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
            revision: Commit or tag on the hub; name one, since a branch moves.
            streaming: Read the files as they are, one unit each, without a copy in the cache.
            image: Column of the pictures; of several the first that has one.
            image_root: Directory in which to look for pictures if the column holds file names.
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
        self.image_root = Path(image_root or "")
        self.captions_required, self.rows_per_unit, self.streaming = captions_required, rows_per_unit, streaming
        self.path, self.data_files = path, data_files
        self.unit_prefix = split
        # `datasets` takes such a path for a name on the hub and says only that the hub has none.
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

    def sample(self, index: int) -> Sample:
        """Row `index`."""
        return self._sample(self.rows[index], self.key(index))

    def read(self, unit: Unit, dropped: list[Dropped]) -> Iterator[Sample]:
        """The rows of a unit; one that is dropped here is listed by its number."""
        if not self.streaming:
            yield from super().read(unit, dropped)
            return
        shard = self.rows.shard(self.rows.num_shards, unit.part)
        # iter(shard) would share it out among PyTorch's loader processes, and all but one get nothing; larger batches
        # fail if the columns of tars come in another order.
        rows = shard.iter(batch_size=1)
        for number in count():
            with self._explained():
                row = next(rows, None)
            if row is None:
                return
            key = f"{unit.name}-{number:09d}"
            try:
                yield self._sample(row, key)
            except Drop as reason:
                dropped.append((key, str(reason)))

    def describe(self) -> dict[str, Any]:
        """Also the number of rows, if they are numbered."""
        return super().describe() | ({} if self.streaming else {"rows": len(self)})

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of `datasets` in the block become a UserError: its builders raise errors of all kinds."""
        try:
            yield
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            said = " ".join(str(cause).split()) or type(cause).__name__
            of = f" of {self.data_files}" if self.data_files else ""
            raise UserError(
                f"the data set {self.path}{of} cannot be read: {said} (if a file is damaged, a line above names it)."
            ) from error

    def _sample(self, row: pa.Table, number: str) -> Sample:
        """The sample in a table of one row; `number` names it without a key column."""
        try:
            (values,) = row.to_pylist()
        except UnicodeDecodeError as error:
            raise Drop(NOT_UTF8) from error
        key = number if self.key_column is None else column(values, self.key_column)
        if key is None:
            raise Drop(f"no {self.key_column} to name it by")
        picture = next((found for name in self.images if (found := column(values, name)) is not None), None)
        others = {name: value for name, value in values.items() if name not in self.images}
        others = json.loads(json.dumps(others, default=_time))
        captions, metadata = captions_and_metadata(others, self.captions, self.metadata)
        return captioned_sample(str(key), self._picture_file(picture), captions, metadata, self.captions_required)

    def _picture_file(self, picture: Any) -> PictureFile:
        if isinstance(picture, Mapping):  # how `datasets` holds pictures: their bytes, or where they are
            picture = picture.get("bytes") or picture.get("path")
        if isinstance(picture, str) and picture:
            return PictureFile(picture if ADDRESS.match(picture) else self.image_root / picture)
        if not isinstance(picture, bytes):
            raise Drop(NO_PICTURE_FILE)
        return PictureFile(picture)

    def _require_columns(self, features: Mapping[str, Any]) -> None:
        wanted = [*self.images, *(self.captions or []), *(self.metadata or []), self.key_column]
        for name in filter(None, wanted):
            if name not in features and name.partition(".")[0] not in features:
                raise UserError(
                    f"{self.path} has no column {name!r}; it has {', '.join(features)}: set image, captions, key and "
                    "metadata accordingly."
                )
        if self.captions is None and self.captions_required and not any(name in features for name in CAPTION_KEYS):
            raise UserError(
                f"{self.path} has none of the columns {', '.join(CAPTION_KEYS)}; it has {', '.join(features)}: name "
                "that of the captions (--source.captions NAME), or set captions_required to false."
            )


def _time(value: Any) -> str | None:
    """Of what JSON does not have, times as text; bytes become null."""
    return value.isoformat() if hasattr(value, "isoformat") else None
