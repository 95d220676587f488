"""Picture files to RGB arrays of one size.

A `PictureFile` is a picture that is not decoded yet: its size is read from the header, so that filters can leave it out
before the costly part, or a decompression bomb before it goes off. A picture smaller than asked for is enlarged;
`simplear.data.filters` leaves out what should not be.
"""

from __future__ import annotations

import io
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image

from simplear.errors import SystemRefusedError
from simplear.pictures import PictureError, open_rgb, opened_picture

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]


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

    content: bytes | Path
    """The file, or where it is."""
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
        return self.name or (str(self.content) if isinstance(self.content, Path) else "")

    def _file(self) -> IO[bytes]:
        return io.BytesIO(self._bytes)

    @cached_property
    def _bytes(self) -> bytes:
        if isinstance(self.content, bytes):
            return self.content
        try:
            return read_unchanged(self.content)
        except (FileNotFoundError, UnicodeEncodeError) as error:
            raise Drop("picture file missing") from error


def read_unchanged(path: Path) -> bytes:
    """The content of a file. Raises OSError when it is written to meanwhile, for then it is neither old nor new."""
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
