"""Picture files to RGB arrays of one size.

A `PictureFile` is a picture that is not decoded yet: its size is read from the header, so that filters can leave it out
before the costly part, or a decompression bomb before it goes off. A picture smaller than asked for is enlarged;
`simplear.data.prepare.filters` leaves out what should not be.
"""

from __future__ import annotations

import io
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


class Drop(Exception):
    """A sample that cannot be used; its text is the reason that is counted."""


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


CENTRE = (0.5, 0.5)


def resize_and_crop(
    image: Image.Image | Pixels, height: int, width: int, place: tuple[float, float] = CENTRE
) -> Pixels:
    """A part of the picture at (height, width), as large a part as has that aspect; uint8 (height, width, 3).

    Lanczos resampling; a picture of that size already is returned as it is.

    Args:
        image: RGB.
        height: pixels.
        width: pixels.
        place: where the part lies in what is left over, down and across: 0 at top and left, 1 at bottom and right.
    """
    if isinstance(image, np.ndarray):
        if image.shape[:2] == (height, width):
            return image
        image = Image.fromarray(image)
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        left, top = (image.width - width * scale) * place[1], (image.height - height * scale) * place[0]
        box = (left, top, left + width * scale, top + height * scale)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(image)
