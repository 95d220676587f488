"""Folders of picture files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simplear.data.pictures import Drop, PictureFile, read_unchanged
from simplear.data.sources.base import (
    NO_CAPTION,
    IndexedSource,
    Sample,
    caption_lines,
    captions_and_metadata,
    valid_text,
)
from simplear.errors import MissingFileError, SystemRefusedError, UserError
from simplear.hashing import sha256_of_lines
from simplear.pictures import PICTURE_SUFFIXES
from simplear.text_files import read_objects


class ImageFolderSource(IndexedSource):
    """A folder of pictures, sub-folders included, in the order of their paths.

    Captions stand in a .txt beside each picture, one a line; or in a ``metadata.jsonl`` at the top, which then says
    which pictures there are: ``file_name``, and ``captions``, ``caption`` or ``text``; other keys become metadata.
    """

    unit_prefix = "images"
    local_paths = frozenset({"path"})

    def __init__(self, path: str, *, rows_per_unit: int = 1000, captions_required: bool = True) -> None:
        """
        Args:
            path: The folder. Links to folders are followed.
            rows_per_unit: Pictures in one token shard.
            captions_required: False keeps pictures without a caption, for recaptioning.

        Raises:
            FileNotFoundError: the folder is missing or holds no picture.
            OSError: a folder in it cannot be read, or a link leads back to a folder above it.
            ValueError: a line of metadata.jsonl is no object with a file_name.
        """
        self.path, self.rows_per_unit, self.captions_required = Path(path), rows_per_unit, captions_required
        if not self.path.is_dir():
            raise MissingFileError(f"{path} is no folder: give one that holds pictures.")
        listing = self.path / "metadata.jsonl"
        self._entries: list[tuple[str, dict[str, Any] | None]]
        if listing.exists():
            self._entries = _read_listing(listing)
        else:
            found = (file for file in files_below(self.path) if file.suffix.lower() in PICTURE_SUFFIXES)
            self._entries = [(name, None) for name in sorted(file.relative_to(self.path).as_posix() for file in found)]
        if not self._entries:
            raise MissingFileError(f"{path} holds no picture ({', '.join(sorted(PICTURE_SUFFIXES))}).")

    def __len__(self) -> int:
        return len(self._entries)

    def key(self, index: int) -> str:
        return self._entries[index][0]

    def entry(self, index: int) -> tuple[Path, list[str], dict[str, Any]]:
        """File, captions and metadata of picture `index` of the sorted or listed paths; the picture is not opened.

        Raises `Drop` for text that is none.
        """
        name, listed = self._entries[index]
        file = self.path / valid_text(name)
        if listed is not None:
            return file, *captions_and_metadata(listed)
        text = file.with_suffix(".txt")
        return file, caption_lines(read_unchanged(text)) if text.exists() else [], {}

    def sample(self, index: int) -> Sample:
        """Picture `index` of the sorted or listed paths."""
        file, captions, metadata = self.entry(index)
        if not captions and self.captions_required:
            raise Drop(NO_CAPTION)
        return Sample(self.key(index), PictureFile(file), captions, metadata)

    def describe(self) -> dict[str, Any]:
        """Also the pictures' names: with others a number means another picture."""
        return {**super().describe(), "names": sha256_of_lines(name for name, _ in self._entries)}


def files_below(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """All files in a folder and those below it, links followed.

    Raises OSError naming a folder that cannot be read, and a link that leads back to a folder above it.
    """
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise SystemRefusedError(
            error.errno, f"{folder} cannot be read ({error.strerror}): make it readable, or take it out of the source."
        ) from error
    place = (status.st_dev, status.st_ino)
    if place in above:
        raise SystemRefusedError(f"{folder} is a link to a folder above it, without end: remove the link.")
    for entry in entries:
        if entry.is_dir():
            yield from files_below(folder / entry.name, (*above, place))
        else:
            yield folder / entry.name


def _read_listing(listing: Path) -> list[tuple[str, dict[str, Any] | None]]:
    entries: list[tuple[str, dict[str, Any] | None]] = []
    for number, entry in read_objects(listing):
        if not isinstance(entry.get("file_name"), str):
            raise UserError(f'{listing}, line {number} has no text "file_name".')
        entries.append((entry.pop("file_name"), entry))
    return entries
