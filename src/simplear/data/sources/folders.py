"""Folders of picture files."""

from __future__ import annotations

import logging
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from simplear.data.sample import ADDRESS, NO_CAPTION, Drop, Sample, picture_at, read_unchanged
from simplear.data.sources.base import (
    CAPTION_KEYS,
    CAPTION_SUFFIXES,
    NO_TEXT,
    IndexedSource,
    caption_lines,
    captions_and_metadata,
    valid_text,
)
from simplear.errors import MissingFileError, SystemRefusedError, UserError
from simplear.hashing import sha256_of_lines
from simplear.pictures import PICTURE_SUFFIXES
from simplear.text_files import read_lines, read_objects, read_table

logger = logging.getLogger(__name__)

LISTINGS = ("metadata.jsonl", "metadata.csv")
"""Of these the first in a folder counts."""
FILE_NAME = "file_name"
"""Their column of pictures."""
HIDDEN_FOLDERS = ("__MACOSX", "@eaDir")
"""Of copies and thumbnails; others have names that begin with a dot."""
OTHER_SOURCES = {".tar": "WebDatasetSource", ".parquet": "HuggingFaceSource", ".arrow": "HuggingFaceSource"}
SUFFIXES_NAMED = 9


class ImageFolderSource(IndexedSource):
    """A folder of pictures, sub-folders included, in the order of their paths; hidden files and folders left out.

    Captions stand in a .txt or .caption beside each picture (a.txt or a.jpg.txt), one a line; or in a
    ``metadata.jsonl`` or ``metadata.csv``, which says which pictures its folder and those below have: ``file_name``,
    from there, and ``captions``, ``caption`` or ``text``; other keys become metadata. One at the top counts alone.
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
            FileNotFoundError: the folder is missing or holds no pictures.
            OSError: a folder in it cannot be read, or a link leads back to a folder above it.
            ValueError: a row of a metadata.jsonl or metadata.csv has no file_name.
        """
        self.path, self.rows_per_unit, self.captions_required = Path(path), rows_per_unit, captions_required
        if not self.path.is_dir():
            raise MissingFileError(f"{path} is no folder: give one that holds pictures.")
        self._entries: list[tuple[str, dict[str, Any] | None]] = []
        self._texts: dict[str, str] = {}
        """Files of captions that are not called as usual, a.txt for a.jpg; by their names without suffix."""
        self._others: Counter[str] = Counter()
        """Files passed over, by suffix."""
        at_top = [name for name in LISTINGS if _is_listing(self.path / name)]
        self._listings = {"": at_top[0]} if at_top else {}
        """By their folders."""
        pictures = [] if self._listings else self._look_through()
        for _, listing in sorted(self._listings.items()):
            self._entries += _read_listing(self.path, listing)
        folders = tuple(f"{folder}/" for folder in self._listings)
        self._entries += [(name, None) for name in pictures if not name.startswith(folders)]
        if not self._entries:
            raise no_pictures(self.path, self._others)
        say_passed_over(self.path, self._others)

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
        text = file.with_suffix(CAPTION_SUFFIXES[0])
        if not text.exists():
            other = self._texts.get(os.path.splitext(name)[0]) or self._texts.get(name)
            if other is None:
                return file, [], {}
            text = self.path / other
        return file, caption_lines(read_unchanged(text)), {}

    def sample(self, index: int) -> Sample:
        """Picture `index` of the sorted or listed paths."""
        _, captions, metadata = self.entry(index)
        if not captions and self.captions_required:
            raise Drop(NO_CAPTION)
        return Sample(self.key(index), picture_at(self.key(index), self.path), captions, metadata)

    def describe(self) -> dict[str, Any]:
        """Also the pictures' names: with others a number means another picture."""
        return {**super().describe(), "names": sha256_of_lines(name for name, _ in self._entries)}

    def hint(self, drops: Mapping[str, int]) -> str:
        if not {NO_CAPTION, NO_TEXT} & drops.keys():
            return ""
        for listing in self._listings.values():
            keys = next((", ".join(entry) for _, entry in self._entries if entry is not None), "")
            return (
                f"{self.path / listing} has {FILE_NAME}, {keys}; captions are read from {_either(CAPTION_KEYS)}, which "
                "holds a text or a list of texts."
            )
        there = f" (there are {_counted(self._others)})" if self._others else ""
        return (
            f"captions are read from a {_either(CAPTION_SUFFIXES)} beside each picture, or from a {_either(LISTINGS)} "
            f"with a {FILE_NAME} and a caption in each row{there}."
        )

    def _look_through(self) -> list[str]:
        """Sorted names of all pictures; notes listings, captions and what is passed over."""
        pictures = []
        for file in files_below(self.path):
            name = file.relative_to(self.path).as_posix()
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in PICTURE_SUFFIXES:
                pictures.append(name)
            elif file.name in LISTINGS and _is_listing(file):
                self._listings[posixpath.dirname(name)] = name  # .jsonl comes after .csv
            elif suffix.lower() not in CAPTION_SUFFIXES:
                self._others[suffix] += 1
            elif suffix != CAPTION_SUFFIXES[0] or os.path.splitext(stem)[1].lower() in PICTURE_SUFFIXES:
                self._texts.setdefault(stem, name)
        return sorted(pictures)


def pictures_below(folder: Path) -> list[Path]:
    """All pictures in a folder and those below it, in the order of their paths; a line says what was passed over.

    Raises as `files_below` does, and FileNotFoundError if there are none.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is no folder: give one that holds pictures.")
    found, others = list[Path](), Counter[str]()
    for file in files_below(folder):
        if file.suffix.lower() in PICTURE_SUFFIXES:
            found.append(file)
        elif file.suffix.lower() not in CAPTION_SUFFIXES and file.name not in LISTINGS:
            others[file.suffix] += 1
    if not found:
        raise no_pictures(folder, others)
    say_passed_over(folder, others)
    return sorted(found)


def no_pictures(folder: Path, others: Counter[str]) -> MissingFileError:
    """The error of a folder without pictures, which says what it has: tars and tables have sources of their own."""
    there = f" but {_counted(others)}" if others else ""
    kinds = {suffix for suffix in others if suffix in OTHER_SOURCES}
    remedy = "".join(f" {OTHER_SOURCES[suffix]} reads {suffix}." for suffix in sorted(kinds))
    return MissingFileError(f"{folder} holds no picture ({', '.join(sorted(PICTURE_SUFFIXES))}){there}.{remedy}")


def say_passed_over(folder: Path, suffixes: Counter[str]) -> None:
    """A line on files that are not read, by suffix, where there are any."""
    if suffixes:
        known = ", ".join(sorted(PICTURE_SUFFIXES))
        count = suffixes.total()
        logger.warning("%d files passed over in %s: %s (pictures are %s)", count, folder, _counted(suffixes), known)


def _counted(suffixes: Counter[str]) -> str:
    common = [f"{count} {suffix or 'without a suffix'}" for suffix, count in suffixes.most_common(SUFFIXES_NAMED)]
    return ", ".join([*common, "others"] if len(suffixes) > SUFFIXES_NAMED else common)


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def is_hidden(name: str) -> bool:
    """Whether it is the name of a file or folder that programs keep for themselves, such as .ipynb_checkpoints."""
    return name.startswith(".") or name in HIDDEN_FOLDERS


def files_below(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """All files in a folder and those below it that are not hidden, links followed.

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
        if is_hidden(entry.name):
            continue
        if entry.is_dir():
            yield from files_below(folder / entry.name, (*above, place))
        else:
            yield folder / entry.name


def _is_listing(file: Path) -> bool:
    """Not a .csv of something else, whose first line names no column of files."""
    if not file.is_file() or file.suffix != ".csv":
        return file.is_file()
    return FILE_NAME in next((line for _, line in read_lines(file)), "")


def _read_listing(root: Path, listing: str) -> list[tuple[str, dict[str, Any]]]:
    """Names, from the root, and the rest of each row."""
    file, folder = root / listing, posixpath.dirname(listing)
    entries: list[tuple[str, dict[str, Any]]] = []
    rows: Iterator[tuple[int, Mapping[str, Any]]] = read_table(file) if file.suffix == ".csv" else read_objects(file)
    for number, row in rows:
        entry = dict(row)
        name = entry.pop(FILE_NAME, None)
        if not isinstance(name, str):
            raise UserError(f'{file}, line {number} has no text "{FILE_NAME}".')
        entries.append((name if ADDRESS.match(name) else posixpath.join(folder, name), entry))
    return entries
