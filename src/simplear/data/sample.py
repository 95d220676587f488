"""A picture with its captions on its way to a token shard, and the reason that it got no further.

A `Sample` holds a picture that may not be decoded yet (`PictureFile`): its size is read from the header, so that
filters can leave it out before the costly part, or a decompression bomb before it goes off. Whoever cannot use a sample
raises `Drop` with a reason; whoever reads samples counts it with `drop`. All other rooms build on this file.
"""

from __future__ import annotations

import io
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from simplear.errors import SystemRefusedError, UserError
from simplear.pictures import PictureError, is_missing, open_rgb, opened_picture

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]

MAX_BYTES = 1 << 28
"""Of a file: larger ones are never pictures or captions, whatever they are called, and would fill the memory."""
TOO_LARGE = f"file of more than {MAX_BYTES >> 20} MiB"
MISSING_FILE = "picture file missing"
WEB_ADDRESS = "web address in place of a picture (img2dataset fetches them)"
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.I)
NO_CAPTION = "no caption"


@dataclass(frozen=True)
class Sample:
    """One picture with its captions."""

    key: str
    """Names the sample within its source."""
    picture: Image.Image | Pixels | PictureFile
    """RGB, or a file that is decoded when the image is asked for."""
    captions: Sequence[str]
    """At least one, none empty, unless the source was told that captions are not required."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    codes: npt.NDArray[np.int64] | None = None
    """(h, w), of a source whose pictures are tokenized already; then the picture is empty."""

    @cached_property
    def image(self) -> Image.Image | Pixels:
        """RGB. Raises `Drop` when the picture cannot be decoded, ValueError where there are codes in its place."""
        if self.codes is not None:
            raise UserError(f"sample {self.key!r} has codes and no picture: this needs a source of pictures.")
        return self.picture.open() if isinstance(self.picture, PictureFile) else self.picture

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the header alone where there is one: before an orientation is applied.

        Raises `Drop` as `image` does, and ValueError where there are codes in place of a picture.
        """
        if self.codes is not None:
            raise UserError(f"sample {self.key!r} has codes and no picture: filters by size cannot judge it.")
        if isinstance(self.picture, np.ndarray):
            return self.picture.shape[1], self.picture.shape[0]
        return self.picture.size if isinstance(self.picture, Image.Image) else self.picture.size()


NO_PICTURE: Pixels = np.empty((0, 0, 3), np.uint8)


def column(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, None without one; "a.b" is b of the object a unless there is a column of that name."""
    if name in row:
        return row[name]
    for part in name.split("."):
        if not isinstance(row, Mapping) or part not in row:
            return None
        row = row[part]
    return row


class Drop(Exception):
    """A sample that cannot be used; its text is the reason that is counted."""


Dropped = tuple[str | None, str]
"""Key and reason; no key where a source counted without naming it."""


class Drops(Counter[str]):
    """Counts by reason that know the keys too, for whoever reads a source."""

    def __init__(self) -> None:
        super().__init__()
        self._named: list[tuple[str, str]] = []

    def listed(self) -> list[Dropped]:
        """Every drop in the order of dropping, then those without a key."""
        unnamed = Counter(self)
        unnamed.subtract(reason for _, reason in self._named)
        return [*self._named, *((None, reason) for reason in sorted(unnamed.elements()))]

    def name(self, key: str, reason: str) -> None:
        """Remember the key of a drop; it is counted apart."""
        self._named.append((key, reason))


def drop(drops: Counter[str], key: str, reason: object) -> None:
    """Count a sample that is left out; `Drops` also remember its key."""
    drops[str(reason)] += 1
    if isinstance(drops, Drops):
        drops.name(key, str(reason))


def warn_of_drops(drops: Counter[str], where: str = "") -> None:
    """A line for each reason, so that nothing is left out in silence."""
    for reason, count in sorted(drops.items()):
        logger.warning("%d pictures dropped%s: %s", count, where, reason)


@contextmanager
def _drops() -> Iterator[None]:
    """A picture that cannot be used becomes a `Drop`; what the system refuses stays an OSError."""
    try:
        yield
    except PictureError as error:
        raise Drop(str(error)) from error


@dataclass(frozen=True)
class PictureFile:
    """A picture that is not decoded yet."""

    content: bytes | Path | str
    """The file, or where it is; a text is an address that fsspec opens, such as ``zip://a.jpg::pictures.zip``."""
    name: str = ""
    """Of the file where the content is given; its suffix counts."""

    def size(self) -> tuple[int, int]:
        """Width and height in pixels as the header states them, before any orientation. Raises what `open` does."""
        with _drops(), opened_picture(self._file(), self._name) as opened:
            return opened.size

    def open(self) -> Image.Image:
        """The picture as RGB, see `simplear.pictures.open_rgb`.

        Raises `Drop` where that raises PictureError, and OSError when the file changes while it is read.
        """
        with _drops():
            return open_rgb(self._file(), self._name)

    @property
    def _name(self) -> str:
        return self.name or ("" if isinstance(self.content, bytes) else str(self.content).partition("::")[0])

    def _file(self) -> IO[bytes]:
        return io.BytesIO(self._bytes)

    @cached_property
    def _bytes(self) -> bytes:
        if isinstance(self.content, bytes):
            return self.content
        if isinstance(self.content, str):
            return _read_address(self.content)
        try:
            return read_unchanged(self.content)
        except (OSError, ValueError) as error:
            if is_missing(error):
                raise Drop(MISSING_FILE) from error
            raise


def picture_at(place: str, folder: Path | None = None) -> PictureFile:
    """The picture of which a list or a column says where it is: a path, perhaps below a folder, or an address."""
    if ADDRESS.match(place):
        return PictureFile(place)
    return PictureFile(Path(place) if folder is None else folder / place)


def _read_address(address: str) -> bytes:
    protocol, _, path = address.partition("://")
    if protocol.lower() in ("http", "https"):
        raise Drop(WEB_ADDRESS)
    path, chain, archive = path.partition("::")
    try:
        content = _file_system(f"{protocol}://{chain}{archive}", os.getpid()).cat_file(path)
    except (FileNotFoundError, KeyError) as error:  # the latter: of an archive
        raise Drop(MISSING_FILE) from error
    except Exception as error:  # each file system has errors of its own
        raise UserError(f"{address} could not be read ({type(error).__name__}: {error}).") from error
    return bytes(content)


@lru_cache(maxsize=4)
def _file_system(address: str, process: int) -> Any:
    """Kept, since opening an archive reads its whole list of contents; by process, since they share no open files."""
    from fsspec.core import url_to_fs  # not needed by most sources

    return url_to_fs(address)[0]


def read_unchanged(path: Path) -> bytes:
    """The content of a file.

    Raises OSError when it is written to meanwhile, for then it is neither old nor new, and `Drop` for what is not a
    file, or too large a one.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Drop("not a file")
    if status.st_size > MAX_BYTES:
        raise Drop(TOO_LARGE)
    with open(path, "rb") as file:
        before = os.fstat(file.fileno())
        content = file.read()
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or len(content) != after.st_size:
        raise SystemRefusedError(
            f"{path} changed while it was read: wait until nothing writes there, and run the same again."
        )
    return content


def as_made(batch: Any) -> Any:
    """Collate function in place of PyTorch's, which would walk through all captions and metadata."""
    return batch
