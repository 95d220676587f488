"""Picture files to RGB arrays of one size: orientation, modes, crop.

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
from PIL import Image, ImageOps, UnidentifiedImageError

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]

SIGNATURES = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8")
"""How files of the usual formats begin, also when nothing but their beginning is left."""

WHITE = (255, 255, 255)
"""Shows through where a picture is transparent."""


class Drop(Exception):
    """A sample that cannot be used; its text is the reason that is counted."""


def warn_of_drops(drops: Counter[str], where: str = "") -> None:
    """A line for each reason, so that nothing is left out in silence."""
    for reason, count in sorted(drops.items()):
        logger.warning("%d pictures dropped%s: %s", count, where, reason)


def open_rgb(file: str | Path | IO[bytes]) -> Image.Image:
    """The picture as RGB, upright as its EXIF orientation says; of an animation the first frame.

    Transparency goes over white, 16-bit grey becomes 8-bit.

    Raises:
        Drop: a file that is missing, no picture, truncated or damaged, or a decompression bomb (more than 179 million
            pixels, Pillow's limit); and the modes whose range nothing states (32-bit integers and floats).
        OSError: the system could not read the file.
    """
    with _drops_of(file), Image.open(file) as opened:
        opened.load()
        picture = ImageOps.exif_transpose(opened)
    if picture.mode in ("I", "F"):
        raise Drop(f"picture of mode {picture.mode}, whose range is unknown")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.new("RGB", layer.size, WHITE)
        picture.paste(layer, mask=layer.getchannel("A"))
    return picture.convert("RGB")


@contextmanager
def _drops_of(file: str | Path | IO[bytes]) -> Iterator[None]:
    """What a decoder raises becomes a `Drop`; what the system refuses stays an OSError."""
    try:
        yield
    except (FileNotFoundError, UnicodeEncodeError) as error:  # the latter: a name that no file can have
        raise Drop("picture file missing") from error
    except Exception as error:  # what decoders raise at damaged bytes is any of a dozen kinds
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if isinstance(error, Image.DecompressionBombError) or "data too large" in str(error):
            raise Drop("decompression bomb") from error
        if isinstance(error, UnidentifiedImageError) and not _beginning(file).startswith(SIGNATURES):
            raise Drop("not a picture") from error
        raise Drop("truncated or damaged picture") from error


@dataclass(frozen=True)
class PictureFile:
    """A picture that is not decoded yet."""

    content: bytes | Path
    """The file, or where it is."""

    def size(self) -> tuple[int, int]:
        """Width and height in pixels as the header states them, before any orientation. Raises what `open_rgb` does."""
        file = self._file()
        with _drops_of(file), Image.open(file) as opened:
            return opened.size

    def open(self) -> Image.Image:
        """The picture as RGB; see `open_rgb`, which says what is raised.

        Also raises OSError when the file changes while it is read.
        """
        return open_rgb(self._file())

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
        raise OSError(f"{path} changed while it was read: wait until nothing writes there, and run the same again.")
    return content


def _beginning(file: str | Path | IO[bytes]) -> bytes:
    if isinstance(file, str | Path):
        with open(file, "rb") as opened:
            return opened.read(4)
    file.seek(0)
    return file.read(4)


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
