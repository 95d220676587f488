"""Folders of picture files."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from simplear.data.sample import PictureFile, Sample
from simplear.data.sources.base import (
    CAPTION_KEYS,
    CAPTION_SUFFIXES,
    IndexedSource,
    caption_lines,
    captioned_sample,
    captions_and_metadata,
    valid_text,
)
from simplear.errors import MissingFileError, SystemRefusedError, UserError
from simplear.hashing import sha256_of_lines
from simplear.pictures import PICTURE_SUFFIXES
from simplear.text_files import read_objects

logger = logging.getLogger(__name__)

LISTING, FILE_NAME = "metadata.jsonl", "file_name"
HIDDEN_FOLDERS = ("__MACOSX", "@eaDir")
"""Of copies and thumbnails; others have names that begin with a dot."""


class ImageFolderSource(IndexedSource):
    """A folder of pictures, sub-folders included, in the order of their paths; hidden files and folders are left out.

    Captions are in a .txt or .caption beside each picture (a.txt or a.jpg.txt), one a line. Or a ``metadata.jsonl`` at
    the top lists all pictures, an object a line: ``file_name`` and ``captions``, ``caption`` or ``text``; other keys
    become metadata.
    """

    unit_prefix = "images"
    local_paths = frozenset({"path"})
    reads = (
        f"captions are read from a {' or '.join(CAPTION_SUFFIXES)} beside each picture, or from a {LISTING} at the top "
        f"with {FILE_NAME} and one of {', '.join(CAPTION_KEYS)} in each line."
    )

    def __init__(self, path: str, *, rows_per_unit: int = 1000, captions_required: bool = True) -> None:
        """
        Args:
            path: The folder. Links to folders are followed.
            rows_per_unit: Pictures in one token shard.
            captions_required: False keeps pictures without a caption, for recaptioning.

        Raises:
            FileNotFoundError: the folder is missing or holds no pictures.
            OSError: a folder in it cannot be read.
            ValueError: a line of metadata.jsonl has no file_name.
        """
        self.path, self.rows_per_unit, self.captions_required = Path(path), rows_per_unit, captions_required
        listing = self.path / LISTING
        self._texts: dict[str, str] = {}
        """Files of captions by their names without suffix."""
        self._entries: list[tuple[str, dict[str, Any] | None]]
        """Pictures, with their lines of the list."""
        if listing.is_file():
            self._entries = list(_read_listing(listing))
        else:
            pictures, self._texts = _look_through(self.path)
            self._entries = [(name, None) for name in pictures]

    def __len__(self) -> int:
        return len(self._entries)

    def key(self, index: int) -> str:
        return self._entries[index][0]

    def entry(self, index: int) -> tuple[Path, list[str], dict[str, Any]]:
        """File, captions and metadata of picture `index` of the sorted or listed paths; the picture is not opened.

        Raises `Drop` for text that is not valid.
        """
        name, listed = self._entries[index]
        file = self.path / valid_text(name)
        if listed is not None:
            return file, *captions_and_metadata(listed)
        text = self._texts.get(os.path.splitext(name)[0]) or self._texts.get(name)
        return file, caption_lines((self.path / text).read_bytes()) if text else [], {}

    def sample(self, index: int) -> Sample:
        """Picture `index` of the sorted or listed paths."""
        file, captions, metadata = self.entry(index)
        return captioned_sample(self.key(index), PictureFile(file), captions, metadata, self.captions_required)

    def describe(self) -> dict[str, Any]:
        """Also the pictures' names: with others a number means another picture."""
        return {**super().describe(), "names": sha256_of_lines(name for name, _ in self._entries)}


def pictures_below(folder: Path) -> list[Path]:
    """All pictures in a folder and those below it, in the order of their paths; a line says what was passed over.

    Raises as `files_below` does, and FileNotFoundError if there are none.
    """
    return sorted(folder / name for name in _look_through(folder)[0])


def _look_through(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Sorted names of all pictures, and files of captions by their names without suffix."""
    pictures, texts, others = list[str](), dict[str, str](), Counter[str]()
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a folder: give one that holds pictures.")
    for file in files_below(folder):
        name = file.relative_to(folder).as_posix()
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in PICTURE_SUFFIXES:
            pictures.append(name)
        elif suffix.lower() in CAPTION_SUFFIXES:
            texts[stem] = name if suffix == ".txt" else texts.get(stem, name)
        elif name != LISTING:
            others[suffix] += 1
    known = ", ".join(sorted(PICTURE_SUFFIXES))
    found = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in others.most_common(9))
    if not pictures:
        raise MissingFileError(
            f"{folder} holds no picture ({known})" + (f" but {found}" if others else "") + ". WebDatasetSource reads "
            "tars, HuggingFaceSource tables."
        )
    if others:
        logger.warning("%d files passed over in %s: %s (pictures are %s)", others.total(), folder, found, known)
    return sorted(pictures), texts


def is_hidden(name: str) -> bool:
    """Whether it is the name of a file or folder that programs keep for themselves, such as .ipynb_checkpoints."""
    return name.startswith(".") or name in HIDDEN_FOLDERS


def files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and those below it that are not hidden, links followed.

    Raises OSError naming a folder that cannot be read, or a link that leads back to a folder above it.
    """

    def refuse(error: OSError) -> NoReturn:
        raise SystemRefusedError(
            error.errno,
            f"{error.filename} cannot be read ({error.strerror}): make it readable, or take it out of the source.",
        ) from error

    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        place = Path(os.path.abspath(parent))
        if place.parent.resolve().is_relative_to(place.resolve()):
            raise SystemRefusedError(f"{parent} is a link to a folder above it, without end: remove the link.")
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from (Path(parent, name) for name in files if not is_hidden(name))


def _read_listing(listing: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in read_objects(listing):
        name = row.pop(FILE_NAME, None)
        if not isinstance(name, str):
            raise UserError(f'{listing}, line {number} has no text "{FILE_NAME}".')
        yield name, row
