"""Tar files in WebDataset's layout, as img2dataset writes them. They are read member after member, never unpacked."""

from __future__ import annotations

import bz2
import glob
import gzip
import logging
import lzma
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from simplear.data.sample import ADDRESS, MAX_BYTES, NO_CAPTION, TOO_LARGE, Drop, PictureFile, Sample, drop
from simplear.data.sources.base import (
    CAPTION_KEYS,
    CAPTION_SUFFIXES,
    NO_TEXT,
    Source,
    Unit,
    caption_lines,
    captions_and_metadata,
    decoded,
    distinct_names,
    valid_text,
)
from simplear.data.sources.folders import files_below, is_hidden
from simplear.errors import MissingFileError, SystemRefusedError, UserError
from simplear.hashing import file_identity
from simplear.pictures import PICTURE_SUFFIXES
from simplear.text_files import parse_json

logger = logging.getLogger(__name__)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
"""Of what is read in a folder of tars."""
COMPRESSED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x28\xb5\x2f\xfd": partial(pa.input_stream, compression="zstd"),
}
"""What decompresses files that begin so."""
READ_SUFFIXES = frozenset(
    [".json", *PICTURE_SUFFIXES, *CAPTION_SUFFIXES, *(a + b for a in PICTURE_SUFFIXES for b in CAPTION_SUFFIXES)]
)
PAST_END = 8
"""Times that a whole archive may be read past its end, which is less often."""
PIECE = LONGEST_END = 1 << 20
"""Bytes that are read at a time behind the last member, and more than any packer writes there."""
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
MAX_NAMES = 1_000_000
"""That a pattern with braces may stand for."""
NO_PICTURE = "no picture"
DOTTED = "no picture, as a sample's name ends at the first dot (rename the file)"
APART = "files of a sample do not follow each other (pack the tar with --sort=name)"


class WebDatasetSource(Source):
    """Tar files in WebDataset's layout, one unit each.

    Files of a sample follow each other and share their path up to the first dot of its last part: a picture, and a
    .txt or .caption (a caption a line) or a .json (``captions``, ``caption`` or ``text``; the rest becomes metadata).
    Hidden files and folders are left out.
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
            paths: Paths of tar files, folders of them, or patterns such as "data/*.tar" and "data/{000..127}.tar".
            captions: Keys of the .json that hold captions, all of which count ("a.b" is b of the object a); by default
                the first of captions, caption and text that is there, then the .txt.
            metadata: Keys of the .json to keep; by default all others.
            captions_required: False keeps pictures without a caption, for recaptioning.

        Raises:
            FileNotFoundError: a pattern fits no file, or a file that braces name is missing.
        """
        self.paths = [paths] if isinstance(paths, str) else list(paths)
        self.captions, self.metadata, self.captions_required = captions, metadata, captions_required
        self.tars = [tar for pattern in self.paths for tar in find_tars(pattern)]

    def units(self) -> list[Unit]:
        return [
            Unit(name, tar, identity=partial(file_identity, tar))
            for name, tar in zip(distinct_names(self.tars), self.tars, strict=True)
        ]

    def candidates(self, unit: Unit, drops: Counter[str]) -> Iterator[Sample]:
        """The samples of a tar. Raises ValueError for one that is damaged, OSError for one that changes meanwhile."""
        before = os.stat(unit.part)
        keys = set[str]()
        for key, members in _samples(unit.part):
            dotted = _dotted(members)
            for suffix in dotted:
                drop(drops, key + suffix, DOTTED)
            try:
                yield self._sample(key, members)
            except Drop as error:
                reason = str(error)
                if reason != NO_PICTURE or not dotted:
                    drop(drops, key, APART if reason in (NO_PICTURE, NO_CAPTION) and key in keys else reason)
            keys.add(key)
        after = os.stat(unit.part)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise SystemRefusedError(
                f"{unit.part} changed while it was read: wait until nothing writes there, and run the same again."
            )

    def read(self, unit: Unit, drops: Counter[str]) -> Iterator[Sample]:
        return decoded(self.candidates(unit, drops), drops)

    def hint(self, drops: Mapping[str, int]) -> str:
        """What the first sample has."""
        if APART in drops or not {NO_PICTURE, NO_CAPTION, NO_TEXT} & drops.keys():
            return ""
        key, members = next(_samples(self.tars[0]), ("", {}))
        try:
            entry = _object(members)
        except Drop:
            entry = {}
        keys = f", and the .json has {', '.join(entry)}" if entry else ""
        return (
            f"the first sample of {self.tars[0]}, {key!r}, has {', '.join(islice(members, 9))}{keys}; captions are "
            f"read from {' or '.join(CAPTION_SUFFIXES)} and from {', '.join(self.captions or CAPTION_KEYS)} of the "
            ".json (--source.captions names others)."
        )

    def _sample(self, key: str, members: Mapping[str, bytes | Drop]) -> Sample:
        suffix = next((suffix for suffix in members if suffix in PICTURE_SUFFIXES), None)
        if suffix is None:
            raise Drop(NO_PICTURE)
        if ".." in valid_text(key).split("/"):
            raise Drop("name leads out of the archive")
        captions, metadata = list[str](), dict[str, Any]()
        if ".json" in members:
            captions, metadata = captions_and_metadata(_object(members), self.captions, self.metadata)
        if not captions and self.captions is None:
            names = [*CAPTION_SUFFIXES, *(suffix + each for each in CAPTION_SUFFIXES)]
            captions = caption_lines(next((_content(members, name) for name in names if name in members), b""))
        if not captions and self.captions_required:
            raise Drop(NO_CAPTION)
        return Sample(key, PictureFile(_content(members, suffix), suffix), captions, metadata)


def _content(members: Mapping[str, bytes | Drop], suffix: str) -> bytes:
    content = members[suffix]
    if isinstance(content, Drop):
        raise content
    return content


def _object(members: Mapping[str, bytes | Drop]) -> dict[str, Any]:
    if ".json" not in members:
        return {}
    try:
        entry = parse_json(_content(members, ".json"))
    except ValueError as error:
        raise Drop("broken JSON") from error
    if not isinstance(entry, dict):
        raise Drop("JSON is no object")
    return entry


def find_tars(pattern: str) -> list[Path]:
    """The tars that a path, a folder's path or a pattern means, sorted.

    Raises FileNotFoundError if there are none, or one that braces name is missing.
    """
    if os.path.isdir(pattern):
        tars = sorted(file for file in files_below(Path(pattern)) if file.name.lower().endswith(TAR_SUFFIXES))
        if not tars:
            raise MissingFileError(
                f"the folder {pattern} holds no tar ({', '.join(TAR_SUFFIXES)}); ImageFolderSource reads pictures."
            )
        return tars
    found = set[Path]()
    for name in [pattern] if os.path.exists(pattern) else expand_braces(pattern):
        files = [name] if os.path.exists(name) else glob.glob(name)
        if not files:
            of = "" if name == pattern else f" (of {pattern}; a folder or *.tar takes what is there)"
            fetch = ": fetch it first" if ADDRESS.match(name) or name.startswith("pipe:") else ""
            raise MissingFileError(f"no tar file at {name}{of}{fetch}.")
        for file in files:
            found.update(find_tars(file) if os.path.isdir(file) else [Path(file)])
    return sorted(found)


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for, as in a shell: {a,b} and {00..10}, also within each other.

    Raises ValueError for more than a million.
    """
    names = list(islice(_expanded(pattern), MAX_NAMES + 1))
    if len(names) > MAX_NAMES:
        raise UserError(f"{pattern} stands for more than {MAX_NAMES} files: name a folder.")
    return list(dict.fromkeys(names))


def _expanded(pattern: str) -> Iterator[str]:
    """Innermost braces first, so what is around them comes more than once."""
    for brace in BRACES.finditer(pattern):
        if words := _alternatives(brace[1]):
            for word in words:
                yield from _expanded(pattern[: brace.start()] + word + pattern[brace.end() :])
            return
    yield pattern


def _alternatives(content: str) -> Iterable[str] | None:
    """What a brace with this content stands for; None if it is only a character."""
    if "," in content:
        return content.split(",")
    if not (found := RANGE.fullmatch(content)):
        return None
    first, last, step = int(found[1]), int(found[2]), abs(int(found[3] or 1)) or 1
    width = max(len(found[1]), len(found[2])) if re.search(r"(^|\D)0\d", content) else 0
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return (f"{number:0{width}d}" for number in numbers)


class _Member(tarfile.TarInfo):
    """A damaged header is an error with its place, where `tarfile` takes any but the first for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except (tarfile.EOFHeaderError, tarfile.ReadError):  # type: ignore[attr-defined]
            raise
        except Exception as error:  # what damaged numbers and names lead to is any of a dozen kinds
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise tarfile.ReadError(f"no header at byte {archive.offset}: {error}") from error


class _Content:
    """A file whose end is an error for whoever reads on: tarfile would, to the terabytes that a header may state."""

    def __init__(self, file: Any) -> None:
        self.file, self.past_end = file, 0

    def read(self, size: int) -> bytes:
        content: bytes = self.file.read(size)
        self.past_end += not content
        if self.past_end > PAST_END:
            raise EOFError("it ends within a member")
        return content


@contextmanager
def _opened(tar: Path) -> Iterator[Any]:
    """The archive, decompressed as it is read. Raises UserError, naming the tar, for damage met in the block."""
    try:
        with open(tar, "rb") as file:
            beginning = file.peek(8)
            reader = next((reader for magic, reader in COMPRESSED.items() if beginning.startswith(magic)), None)
            # As a stream, which takes no more memory than there are bytes, whatever size a header states.
            content: Any = _Content(file if reader is None else reader(file))
            with tarfile.open(fileobj=content, mode="r|", tarinfo=_Member) as opened:
                yield opened
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not of what is read
            raise
        raise UserError(
            f"{tar} is damaged or cut short ({error}): fetch it again, or take it out of the paths."
        ) from error


def _samples(tar: Path) -> Iterator[tuple[str, dict[str, bytes | Drop]]]:
    """Key and files by suffix of each sample; a suffix that comes again begins another sample of the same key.

    A file that no sample needs is empty; in place of one that cannot be used is the reason.
    """
    key, members = "", dict[str, bytes | Drop]()
    with _opened(tar) as opened:
        for member in opened:
            parts = [part for part in member.name.split("/") if part not in (".", "..")]
            if not (member.isfile() or member.issym() or member.islnk()) or any(map(is_hidden, parts)):
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            suffix, of = f".{suffix.lower()}", f"{folder}/{stem}".removeprefix("./").removeprefix("/")
            if members and (key != of or suffix in members):
                yield key, members
                members = {}
            key, members[suffix] = of, _read(opened, member) if suffix in READ_SUFFIXES else b""
        zeros = _require_end(opened.fileobj)
        if zeros > LONGEST_END:
            logger.warning("%s ends in %d bytes of zeros: is its download finished?", tar, zeros)
    if members:
        yield key, members


def _read(opened: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Drop:
    if not member.isreg() or member.issparse():
        return Drop("link or sparse file in place of a file")
    if member.size > MAX_BYTES:
        return Drop(TOO_LARGE)
    file = opened.extractfile(member)
    assert file is not None
    return file.read()


def _require_end(archive: Any) -> int:
    """Number of bytes that follow the first block of zeros behind the last member, which `tarfile` has read.

    Raises ReadError if they are not all zeros, or if there are none: `tarfile` would be content with what precedes a
    cut or a page that was lost.
    """
    first = place = archive.tell()
    rest = archive.read(tarfile.BLOCKSIZE)
    if not rest:
        raise tarfile.ReadError("the blocks that end an archive are missing")
    while rest:
        if data := rest.lstrip(b"\0"):
            place += len(rest) - len(data)
            raise tarfile.ReadError(
                f"at byte {place} more follows the end of the archive: a page before it was lost, or this is several "
                "tars one after another, which must be files of their own"
            )
        place += len(rest)
        rest = archive.read(PIECE)
    return int(place - first)


def _dotted(members: Mapping[str, Any]) -> list[str]:
    """Suffixes of pictures that would be samples if names ended at the last dot."""
    alone = not PICTURE_SUFFIXES & members.keys()
    parts = [(suffix, *os.path.splitext(suffix)) for suffix in members]
    return [
        suffix
        for suffix, before, last in parts
        if last in PICTURE_SUFFIXES and (alone or any(before + text in members for text in CAPTION_SUFFIXES))
    ]
