"""Tar files in WebDataset's layout, as img2dataset writes them. They are read member after member, never unpacked."""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from simplear.data.drops import drop
from simplear.data.pictures import Drop, PictureFile
from simplear.data.sources.base import (
    NO_CAPTION,
    Sample,
    Source,
    Unit,
    caption_lines,
    captions_and_metadata,
    decoded,
    distinct_names,
    valid_text,
)
from simplear.errors import MissingFileError, SystemRefusedError, UserError
from simplear.hashing import file_identity
from simplear.pictures import PICTURE_SUFFIXES


class WebDatasetSource(Source):
    """Tar files in WebDataset's layout, one unit each.

    Files of a sample follow each other and share their path up to the first dot of its last part: a picture, and a
    .txt (a caption a line) or a .json (``captions``, ``caption`` or ``text``; the rest becomes metadata).
    """

    not_described = frozenset({"paths"})

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
            paths: Paths of tar files, or patterns such as "data/*.tar".
            captions: Keys of the .json that hold captions, all of which count ("a.b" is b of the object a); by default
                the first of captions, caption and text that is there, then the .txt.
            metadata: Keys of the .json to keep; by default all others.
            captions_required: False keeps pictures without a caption, for recaptioning.

        Raises:
            FileNotFoundError: a pattern fits no file.
        """
        self.paths = [paths] if isinstance(paths, str) else list(paths)
        self.captions, self.metadata, self.captions_required = captions, metadata, captions_required
        self.tars: list[Path] = []
        for pattern in self.paths:
            found = sorted(glob.glob(pattern))
            if not found:
                raise MissingFileError(f"no tar file at {pattern}.")
            self.tars += map(Path, found)

    def units(self) -> list[Unit]:
        return [
            Unit(name, tar, identity=partial(file_identity, tar))
            for name, tar in zip(distinct_names(self.tars), self.tars, strict=True)
        ]

    def candidates(self, unit: Unit, drops: Counter[str]) -> Iterator[Sample]:
        """The samples of a tar. Raises ValueError for one that is damaged, OSError for one that changes meanwhile."""
        before = os.stat(unit.part)
        try:
            for key, members in _groups(unit.part):
                try:
                    yield self._sample(key, members)
                except Drop as reason:
                    drop(drops, key, reason)
        except (tarfile.TarError, EOFError) as error:
            raise UserError(
                f"{unit.part} is damaged or cut short ({error}): fetch it again, or take it out of the paths."
            ) from error
        after = os.stat(unit.part)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise SystemRefusedError(
                f"{unit.part} changed while it was read: wait until nothing writes there, and run the same again."
            )

    def read(self, unit: Unit, drops: Counter[str]) -> Iterator[Sample]:
        return decoded(self.candidates(unit, drops), drops)

    def _sample(self, key: str, members: Mapping[str, bytes]) -> Sample:
        picture = next((content for suffix, content in members.items() if suffix in PICTURE_SUFFIXES), None)
        if picture is None:
            raise Drop("no picture")
        if ".." in valid_text(key).split("/"):
            raise Drop("name leads out of the archive")
        captions, metadata = list[str](), dict[str, Any]()
        if ".json" in members:
            try:
                entry = json.loads(members[".json"])
            except ValueError as error:
                raise Drop("broken JSON") from error
            if not isinstance(entry, dict):
                raise Drop("JSON is no object")
            captions, metadata = captions_and_metadata(entry, self.captions, self.metadata)
        if not captions and self.captions is None:
            captions = caption_lines(members.get(".txt", b""))
        if not captions and self.captions_required:
            raise Drop(NO_CAPTION)
        return Sample(key, PictureFile(picture), captions, metadata)


def _groups(tar: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and files by suffix of each sample; a suffix that comes again begins another sample of the same key."""
    key, members = "", dict[str, bytes]()
    with tarfile.open(tar, "r|*") as opened:
        for member in opened:
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            file = opened.extractfile(member) if member.isfile() else None
            if file is None or not stem:
                continue
            suffix = f".{suffix.lower()}"
            if members and (key != f"{folder}/{stem}" or suffix in members):
                yield key.removeprefix("./").removeprefix("/"), members
                members = {}
            key = f"{folder}/{stem}"
            members[suffix] = file.read()
        # tarfile takes an archive that was cut between two members for a whole one.
        if not opened.fileobj.read(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("the blocks that end an archive are missing")
    if members:
        yield key.removeprefix("./").removeprefix("/"), members
