"""What a source of pictures and captions is, and the conventions that the sources share.

A source is divided into units of work, which name the token shards made of them, so that any process can take any
unit. Derive your own source from `Source` and name it by its class path in YAML.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simplear.data.sample import NO_CAPTION, Drop, Dropped, PictureFile, Sample, column
from simplear.described import Described
from simplear.text_files import NotUTF8Error, read_lines, valid_unicode

CAPTION_KEYS = ("captions", "caption", "text")
"""Where metadata holds captions by default; the first that is there counts."""
CAPTION_SUFFIXES = (".txt", ".caption")
"""Of files of captions, in any case; they have the picture's name without its suffix, or with it (a.jpg.txt)."""
RESERVED_NAMES = frozenset({"settings", "manifest", "drops"})
"""Of files that a directory of shards or captions has for itself; no unit can have one."""
NOT_UTF8, NO_TEXT, NO_PICTURE_FILE = "text is not UTF-8", "captions are not text", "no picture"


@dataclass(frozen=True)
class Unit:
    """A piece of a source, as large as one token shard."""

    name: str
    """Unique in the source, safe as a file name, and not in `RESERVED_NAMES`."""
    part: Any
    """What the source needs to find it; picklable."""
    count: int | None = None
    """Samples in it, dropped ones included, if that is known beforehand."""
    identity: Callable[[], str] | None = field(default=None, compare=False)
    """Tells its content from that of another unit of the name, such as `simplear.hashing.file_identity`.

    Kept in the unit's sidecar, so that work that goes on later is not mixed with that of another corpus if the source's
    settings do not say which units it has. Picklable.
    """


class Source(Described, ABC):
    """Pictures and captions in units of work, described by class and arguments.

    A list of units is not a setting: name its argument in ``not_described``, and give each `Unit` an identity.
    """

    reads = ""
    """A sentence on where pictures and captions are read from."""

    @abstractmethod
    def units(self) -> list[Unit]:
        """All units, in an order that does not change."""

    @abstractmethod
    def read(self, unit: Unit, dropped: list[Dropped]) -> Iterator[Sample]:
        """The unit's samples in their order.

        Pictures may be not decoded yet, and prove unusable then: `Sample.image` raises `Drop`.

        Args:
            unit: one of `units`.
            dropped: key and reason of what is left out are appended here.
        """

    def hint(self, drops: Mapping[str, int]) -> str:
        """What the source reads, for a message that most samples were dropped for these reasons; else empty."""
        return self.reads if {NO_CAPTION, NO_TEXT, NO_PICTURE_FILE} & drops.keys() else ""


class IndexedSource(Source):
    """A source whose samples have numbers, in units of `rows_per_unit` of them."""

    rows_per_unit: int
    unit_prefix: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """Sample `index`. Raises `Drop` if it cannot be used."""

    def key(self, index: int) -> str:
        """Names sample `index` also if it cannot be used."""
        return f"{self.unit_prefix}-{index:09d}"

    def units(self) -> list[Unit]:
        starts = range(0, len(self), self.rows_per_unit)
        parts = [range(start, min(start + self.rows_per_unit, len(self))) for start in starts]
        return [Unit(f"{self.unit_prefix}-{part.start:09d}", part, len(part)) for part in parts]

    def read(self, unit: Unit, dropped: list[Dropped]) -> Iterator[Sample]:
        for index in unit.part:
            try:
                yield self.sample(index)
            except Drop as reason:
                dropped.append((self.key(index), str(reason)))


def distinct_names(files: Sequence[Path]) -> list[str]:
    """A name for each of the files, not in `RESERVED_NAMES`: without suffix, and with as many folders as it takes.

    So a name depends neither on the number of files nor on where the folders lie.
    """
    whole = [Path(os.path.abspath(file)) for file in files]
    for folders in range(max((len(file.parts) for file in whole), default=0)):
        names = ["-".join([*file.parts[1:-1][-folders or len(file.parts) :], file.stem]) for file in whole]
        if len(set(names)) == len(names):
            break
    else:  # two files of one name
        names = [f"{number:06d}-{file.stem}" for number, file in enumerate(whole)]
    return [file.name if name in RESERVED_NAMES else name for name, file in zip(names, whole, strict=True)]


def decoded(samples: Iterable[Sample], dropped: list[Dropped]) -> Iterator[Sample]:
    """The samples whose pictures can be decoded; the others are appended to `dropped`."""
    for sample in samples:
        try:
            _ = sample.image
        except Drop as reason:
            dropped.append((sample.key, str(reason)))
        else:
            yield sample


def captions_and_metadata(
    row: Mapping[str, Any], captions: Sequence[str] | None = None, metadata: Sequence[str] | None = None
) -> tuple[list[str], dict[str, Any]]:
    """Captions of a row of named values, and what is kept of the others.

    Args:
        row: JSON values.
        captions: columns that hold captions (text or lists of text), all of which count; None: the first of
            `CAPTION_KEYS` that is there.
        metadata: columns to keep; None: all but the captions.

    Raises `Drop` if captions are not text, and for text that is not valid Unicode.
    """
    names = captions if captions is not None else [key for key in CAPTION_KEYS if key in row][:1]
    texts: list[str] = []
    for name in names:
        found = column(row, name)
        found = [found] if isinstance(found, str) else found or []
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise Drop(NO_TEXT)
        texts += found
    if metadata is None:
        kept = {key: value for key, value in row.items() if key not in names}
    else:
        kept = {name: column(row, name) for name in metadata}
    # JSON can spell half of a surrogate pair, which no file can hold.
    valid_text(json.dumps([texts, kept], ensure_ascii=False))
    return [text.strip() for text in texts if text.strip()], kept


def captioned_sample(
    key: str, picture: PictureFile, captions: list[str], metadata: dict[str, Any], required: bool
) -> Sample:
    """A sample. Raises `Drop` if a caption is required and there is none, or if the key is not valid Unicode."""
    if required and not captions:
        raise Drop(NO_CAPTION)
    return Sample(valid_text(key), picture, captions, metadata)


def valid_text(text: str) -> str:
    """The text itself. Raises `Drop` if UTF-8 cannot hold it, as file names in another encoding."""
    if not valid_unicode(text):
        raise Drop(NOT_UTF8)
    return text


def caption_lines(content: bytes) -> list[str]:
    """A caption a line. Raises `Drop` for text that is not UTF-8."""
    try:
        return [line.strip() for _, line in read_lines(content)]
    except NotUTF8Error as error:
        raise Drop(NOT_UTF8) from error
