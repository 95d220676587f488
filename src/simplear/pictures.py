"""Picture files that people give, opened the same way by every verb: as training data, to edit, as a mask, to measure.

Only the formats in `FORMATS` are opened. Pillow knows some that hand the file to another program (EPS to Ghostscript).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from simplear.errors import UserError

PICTURE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .jp2 .j2k .jpx".split()  # noqa: SIM905
)
"""Of files that count as pictures in folders and archives, lower case."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
"""Pillow's names. All have a signature; one without, as TGA, would take almost any bytes for a picture."""
WHITE = (255, 255, 255)
"""Shows through where a picture is transparent."""
ORIENTATION = 0x0112
"""EXIF tag."""
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""The system's errors if no file has the name."""


class PictureError(UserError):
    """A file that is not a picture, or a picture that cannot be decoded; the message is the reason alone."""


def open_rgb(file: str | Path | IO[bytes]) -> Image.Image:
    """The picture as RGB, upright as its EXIF orientation says; of an animation the first frame.

    Transparent areas become white, 16-bit grey becomes 8-bit. The picture takes 4 bytes a pixel (Pillow's RGB). While
    it is opened, 4 to 12 are needed beside the file, 10 for progressive JPEG and AVIF, 16 for WebP, 20 for JPEG 2000.

    Args:
        file: path, or an open file.

    Raises:
        PictureError: missing, not a picture, truncated, damaged, a decompression bomb (more than 179 million pixels,
            Pillow's limit), or of a mode whose range is unknown (32-bit integers and floats).
        OSError: the system could not read the file.
    """
    with opened_picture(file) as opened:
        opened.load()
        return as_rgb(opened)


def read_rgb(file: str | Path) -> Image.Image:
    """As `open_rgb`, with an error that names the file: where no picture may be left out."""
    try:
        return open_rgb(file)
    except PictureError as error:
        raise UserError(f"{file}: {error}. Replace it or move it away.") from error


def open_mask(file: str | Path | IO[bytes]) -> Image.Image:
    """The picture as a mask, see `as_mask`. Arguments and errors as for `open_rgb`."""
    with opened_picture(file) as opened:
        opened.load()
        return as_mask(opened)


def as_rgb(picture: Image.Image) -> Image.Image:
    """A loaded picture as `open_rgb` returns it. Raises PictureError for a mode whose range is unknown."""
    picture = _upright(picture)
    if picture.mode in ("I", "F"):
        raise PictureError(f"picture of mode {picture.mode}, whose range is unknown")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        picture = Image.new("RGB", layer.size, WHITE)
        picture.paste(layer, mask=layer)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def as_mask(picture: Image.Image) -> Image.Image:
    """A loaded picture as a mask ("L"): 255 where to draw, 0 where to keep.

    A picture with transparent areas masks by its transparency, as OpenAI's API defines it: transparent means draw.
    Any other masks by its brightness: white means draw.
    """
    picture = _upright(picture)
    if picture.has_transparency_data:
        alpha = picture.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] < 255:  # type: ignore[operator]
            return alpha.point(lambda value: 255 - value)
    return as_rgb(picture).convert("L")


def _upright(picture: Image.Image) -> Image.Image:
    # exif_transpose copies every picture, also an upright one.
    return ImageOps.exif_transpose(picture) if picture.getexif().get(ORIENTATION, 1) != 1 else picture


@contextmanager
def opened_picture(file: str | Path | IO[bytes]) -> Iterator[Image.Image]:
    """Pillow's picture, of which only the header has been read; errors in the block as `open_rgb` raises them."""
    try:
        with Image.open(file, formats=FORMATS) as opened:
            yield opened
    except PictureError:
        raise
    except Exception as error:  # decoders raise errors of a dozen kinds for damaged bytes
        if isinstance(error, OSError) and error.errno in MISSING:
            raise PictureError("picture file missing") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if isinstance(error, Image.DecompressionBombError):
            raise PictureError("decompression bomb") from error
        if isinstance(error, UnidentifiedImageError):
            raise PictureError("not a picture") from error
        raise PictureError("truncated or damaged picture") from error
