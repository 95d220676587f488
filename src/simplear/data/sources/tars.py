"""Tar files in WebDataset's layout, as img2dataset writes them. They are read member after member, never unpacked."""

from __future__ import annotations

import errno
import glob
import logging
import os
import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from simplear.data.sample import Drop, Dropped, PictureFile, Sample
from simplear.data.sources.base import (
    CAPTION_KEYS,
    CAPTION_SUFFIXES,
    NO_PICTURE_FILE,
    Source,
    Unit,
    caption_lines,
    captioned_sample,
    captions_and_metadata,
    distinct_names,
)
from simplear.data.sources.folders import files_below, is_hidden
from simplear.errors import MissingFileError, UserError, first_line
from simplear.hashing import file_identity
from simplear.pictures import PICTURE_SUFFIXES
from simplear.text_files import parse_json

logger = logging.getLogger(__name__)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
"""Of what is read in a folder of tars."""
READ_SUFFIXES = frozenset(
    [".json", *PICTURE_SUFFIXES, *CAPTION_SUFFIXES, *(a + b for a in PICTURE_SUFFIXES for b in CAPTION_SUFFIXES)]
)
PIECE = LONGEST_END = 1 << 20
"""Bytes that are read at a time behind the last member, and more than any packer writes there."""


class WebDatasetSource(Source):
    """Tar files in WebDataset's layout, one unit each.

    Files of a sample follow each other and share their path up to the first dot of its last part: a picture, and a
    .txt or .caption (a caption a line) or a .json (``captions``, ``caption`` or ``text``; the rest becomes metadata).
    Hidden files and folders are left out.
    """

    not_described = frozenset({"paths"})
    reads = (
        "files of a sample must follow each other (pack the tar with --sort=name), and its name ends at the first dot; "
        f"captions are read from {', '.join(CAPTION_SUFFIXES)} and from one of {', '.join(CAPTION_KEYS)} of the .json "
        "(--source.captions names others)."
    )

    def __init__(
        self,
        paths: str | list[str],
        *,
        captions: list[str] | None = None,
        metadata: list[str] | None = None,
        captions_required: bool = True,
    ) -> None:
        """
        Args:
            paths: Paths of tar files, folders of them, or patterns such as "data/*.tar".
            captions: Keys of the .json that hold captions, all of which count ("a.b" is b of the object a); by default
                the first of captions, caption and text that is there, then the .txt.
            metadata: Keys of the .json to keep; by default all others.
            captions_required: False keeps pictures without a caption, for recaptioning.

        Raises:
            FileNotFoundError: a path or pattern fits no tar.
        """
        self.paths = [paths] if isinstance(paths, str) else list(paths)
        self.captions, self.metadata, self.captions_required = captions, metadata, captions_required
        self.tars = [tar for pattern in self.paths for tar in find_tars(pattern)]

    def units(self) -> list[Unit]:
        return [
            Unit(name, tar, identity=partial(file_identity, tar))
            for name, tar in zip(distinct_names(self.tars), self.tars, strict=True)
        ]

    def read(self, unit: Unit, dropped: list[Dropped]) -> Iterator[Sample]:
        """The samples of a tar. Raises ValueError for one that is damaged."""
        for key, members in _samples(unit.part):
            try:
                yield self._sample(key, members)
            except Drop as reason:
                dropped.append((key, str(reason)))

    def _sample(self, key: str, members: Mapping[str, bytes]) -> Sample:
        suffix = next((suffix for suffix in members if suffix in PICTURE_SUFFIXES), None)
        if suffix is None:
            raise Drop(NO_PICTURE_FILE)
        captions, metadata = list[str](), dict[str, Any]()
        if ".json" in members:
            try:
                entry = parse_json(members[".json"])
            except ValueError as error:
                raise Drop("broken JSON") from error
            if not isinstance(entry, dict):
                raise Drop("JSON is not an object")
            captions, metadata = captions_and_metadata(entry, self.captions, self.metadata)
        if not captions and self.captions is None:
            names = [*CAPTION_SUFFIXES, *(suffix + each for each in CAPTION_SUFFIXES)]
            captions = caption_lines(next((members[name] for name in names if name in members), b""))
        return captioned_sample(key, PictureFile(members[suffix]), captions, metadata, self.captions_required)


def find_tars(pattern: str) -> list[Path]:
    """The tars that a path, a folder's path or a pattern means, sorted. Raises FileNotFoundError if there are none."""
    found = set[Path]()
    for path in map(Path, [pattern] if os.path.exists(pattern) else glob.glob(pattern)):
        if path.is_dir():
            found.update(file for file in files_below(path) if file.name.lower().endswith(TAR_SUFFIXES))
        else:
            found.add(path)
    if not found:
        raise MissingFileError(
            f"no tar file at {pattern}: name a file, a pattern such as data/*.tar, or a folder that holds "
            f"{', '.join(TAR_SUFFIXES)} (ImageFolderSource reads folders of pictures)."
        )
    return sorted(found)


def _samples(tar: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and files by suffix of each sample; a suffix that comes again begins another sample of the same key.

    A file that no sample needs is empty; links and sparse files, which may state any size, are left out. Raises
    UserError, naming the tar, if it is damaged.
    """
    key, members = "", dict[str, bytes]()
    try:
        with tarfile.open(tar) as opened:
            for member in opened:
                opened.members = []  # type: ignore[attr-defined]  # it would keep the headers of all
                parts = [part for part in member.name.split("/") if part != "."]
                hidden = any(is_hidden(part) for part in parts if part != "..")
                file = opened.extractfile(member) if member.isreg() and not member.issparse() else None
                if hidden or file is None:
                    continue
                stem, _, suffix = parts[-1].partition(".")
                name, suffix = "/".join([*parts[:-1], stem]).removeprefix("/"), f".{suffix.lower()}"
                if members and (key != name or suffix in members):
                    yield key, members
                    members = {}
                key, members[suffix] = name, file.read() if suffix in READ_SUFFIXES else b""
            _require_end(opened, tar)
    except Exception as error:  # damaged numbers and names lead to errors of a dozen kinds
        # A negative size is an invalid argument of the system's; its other errors are not of the tar.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise UserError(
            f"{tar} is damaged or cut short ({first_line(error)}): fetch it again, or take it out of the paths."
        ) from error
    if members:
        yield key, members


def _require_end(opened: tarfile.TarFile, tar: Path) -> None:
    """Raise ReadError if the last member is not followed by zeros alone.

    `tarfile` takes an archive that was cut between two members, or has a damaged header, for one that ends there.
    """
    file: Any = opened.fileobj
    file.seek(place := opened.offset)  # type: ignore[attr-defined]
    while piece := file.read(PIECE):
        if data := piece.lstrip(b"\0"):
            place += len(piece) - len(data)
            raise tarfile.ReadError(
                f"at byte {place} there is neither a file's header nor the end: a page was lost, or these are several "
                "tars one after another, which must be separate files"
            )
        place += len(piece)
    if place == opened.offset:  # type: ignore[attr-defined]
        raise tarfile.ReadError("the blocks that end an archive are missing")
    if place - opened.offset > LONGEST_END:  # type: ignore[attr-defined]
        logger.warning("%s ends in %d bytes of zeros: is its download finished?", tar, place - opened.offset)
