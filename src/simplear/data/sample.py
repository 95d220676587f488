"""A picture with its captions on its way to a token shard, and the reason that it got no further.

A `Sample` holds a picture that may not be decoded yet (`PictureFile`): its size is read from the header, so that
filters can drop it before the costly part, and decompression bombs are never decoded. Code that cannot use a sample
raises `Drop` with a reason; the code that reads samples appends key and reason to a list. All other rooms build on this
file.
"""

from __future__ import annotations

import io
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from simplear.errors import UserError
from simplear.pictures import PictureError, open_rgb, opened_picture

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.I)
MISSING_FILE = "picture file missing"
WEB_ADDRESS = "web address in place of a picture (img2dataset fetches them)"
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

    @cached_property
    def image(self) -> Image.Image:
        """RGB. Raises `Drop` if the picture cannot be decoded."""
        if isinstance(self.picture, PictureFile):
            return self.picture.open()
        return self.picture if isinstance(self.picture, Image.Image) else Image.fromarray(self.picture)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the header alone where there is one: before an orientation is applied.

        Raises as `image` does.
        """
        return self.picture.size() if isinstance(self.picture, PictureFile) else self.image.size


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
"""Key and reason; no key if only the count is known."""


def warn_of_drops(drops: Counter[str], where: str = "") -> None:
    """A line for each reason, so that nothing is left out in silence."""
    for reason, count in sorted(drops.items()):
        logger.warning("%d pictures dropped%s: %s", count, where, reason)


@dataclass(frozen=True)
class PictureFile:
    """A picture that is not decoded yet."""

    content: bytes | Path | str
    """The file's bytes or its path, or an address that fsspec opens, such as ``zip://a.jpg::pictures.zip``."""

    def size(self) -> tuple[int, int]:
        """Width and height in pixels as the header states them, before any orientation. Raises as `open` does."""
        with _drops(), opened_picture(self._file) as opened:
            return opened.size

    def open(self) -> Image.Image:
        """The picture as RGB. Raises `Drop` where `simplear.pictures.open_rgb` raises PictureError."""
        with _drops():
            return open_rgb(self._file)

    @property
    def _file(self) -> Path | IO[bytes]:
        return self.content if isinstance(self.content, Path) else io.BytesIO(self._bytes)

    @cached_property
    def _bytes(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else _read_address(str(self.content))


@contextmanager
def _drops() -> Iterator[None]:
    """A picture that cannot be used becomes a `Drop`; the system's errors stay OSErrors."""
    try:
        yield
    except PictureError as error:
        raise Drop(str(error)) from error


def _read_address(address: str) -> bytes:
    import fsspec  # most sources do not need it

    if address.lower().startswith(("http://", "https://")):
        raise Drop(WEB_ADDRESS)
    try:
        with fsspec.open(address) as file:
            return bytes(file.read())
    except (FileNotFoundError, KeyError) as error:  # the latter: of an archive
        raise Drop(MISSING_FILE) from error
    except Exception as error:  # each file system has its own errors
        raise UserError(f"{address} could not be read ({type(error).__name__}: {error}).") from error


def as_made(batch: Any) -> Any:
    """Collate function in place of PyTorch's, which would walk through all captions and metadata."""
    return batch
