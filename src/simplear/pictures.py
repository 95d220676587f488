"""Picture files that people give, opened the same way by every verb: as training data, to edit, as a mask, to measure.

Only the formats in `FORMATS` are opened. Pillow knows some that hand the file to another program (EPS to Ghostscript).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from simplear.errors import UserError

PICTURE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .jp2 .j2k .jpx .tga".split()  # noqa: SIM905
)
"""Of files that count as pictures in folders and archives, lower case."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
"""Pillow's names."""
TGA = "TGA"
"""Has no signature, so almost any bytes look like it: opened only where the name ends in .tga."""
SIGNATURES = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8")
"""How files of the usual formats begin, to tell a truncated picture from a file of another kind."""
WHITE = (255, 255, 255)
"""Shows through where a picture is transparent."""
ORIENTATION = 0x0112
"""EXIF tag."""
STRIP_PIXELS = 1 << 20
"""Pictures are converted to RGB in strips of about so many pixels, so that no second copy takes up memory."""
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
"""What the system answers where there is no file of a name."""


class PictureError(UserError):
    """A file that is not a picture, or a picture that cannot be decoded; the message is the reason alone."""


def open_rgb(file: str | Path | IO[bytes], name: str = "") -> Image.Image:
    """The picture as RGB, upright as its EXIF orientation says; of an animation the first frame.

    Transparent areas become white, 16-bit grey becomes 8-bit. The picture takes 4 bytes a pixel (Pillow's RGB). While
    it is opened, 4 to 8 are needed beside the file, 10 for progressive JPEG and AVIF, 16 for WebP, 20 for JPEG 2000.

    Args:
        file: path, or an open file.
        name: the file's name where `file` is open; its suffix counts for .tga.

    Raises:
        PictureError: missing, not a picture, truncated, damaged, a decompression bomb (more than 179 million pixels,
            Pillow's limit), or of a mode whose range is unknown (32-bit integers and floats).
        OSError: the system could not read the file.
    """
    with opened_picture(file, name) as opened:
        opened.load()
        return as_rgb(opened)


def read_rgb(file: str | Path) -> Image.Image:
    """As `open_rgb`, with an error that names the file: where no picture may be left out."""
    try:
        return open_rgb(file)
    except PictureError as error:
        raise UserError(f"{file}: {error}. Replace it or move it away.") from error


def open_mask(file: str | Path | IO[bytes], name: str = "") -> Image.Image:
    """The picture as a mask, see `as_mask`. Arguments and errors as for `open_rgb`."""
    with opened_picture(file, name) as opened:
        opened.load()
        return as_mask(opened)


def as_rgb(picture: Image.Image) -> Image.Image:
    """A loaded picture as `open_rgb` gives it. Raises PictureError for a mode whose range is unknown."""
    picture = _upright(picture)
    if picture.mode in ("I", "F"):
        raise PictureError(f"picture of mode {picture.mode}, whose range is unknown")
    if picture.mode == "RGB" and not picture.has_transparency_data:
        return picture
    flat = Image.new("RGB", picture.size, WHITE)
    rows = max(1, STRIP_PIXELS // picture.width)
    for top in range(0, picture.height, rows):
        strip = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        if strip.mode.startswith("I;16"):
            strip = Image.fromarray((np.asarray(strip) // 257).astype(np.uint8))
        if strip.has_transparency_data:
            layer = strip.convert("RGBA")
            flat.paste(layer, (0, top), mask=layer)
        else:
            flat.paste(strip.convert("RGB"), (0, top))
    return flat


def as_mask(picture: Image.Image) -> Image.Image:
    """A loaded picture as a mask ("L"): 255 where to draw anew, 0 where to keep.

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
    # exif_transpose copies also where nothing is to be turned.
    return ImageOps.exif_transpose(picture) if picture.getexif().get(ORIENTATION, 1) != 1 else picture


@contextmanager
def opened_picture(file: str | Path | IO[bytes], name: str = "") -> Iterator[Image.Image]:
    """Pillow's picture, of which only the header has been read; errors in the block as `open_rgb` raises them."""
    name = name or (str(file) if isinstance(file, str | Path) else "")
    formats = (TGA,) if name.lower().endswith(".tga") else FORMATS
    try:
        with Image.open(file, formats=formats) as opened:
            yield opened
    except PictureError:
        raise
    except Exception as error:  # what decoders raise at damaged bytes is any of a dozen kinds
        if isinstance(file, str | Path) and is_missing(error):
            raise PictureError("picture file missing") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if isinstance(error, Image.DecompressionBombError) or "data too large" in str(error):
            raise PictureError("decompression bomb") from error
        if isinstance(error, UnidentifiedImageError) and not _beginning(file).startswith(SIGNATURES):
            raise PictureError("not a picture") from error
        raise PictureError("truncated or damaged picture") from error


def is_missing(error: Exception) -> bool:
    """Whether what opening a file raised says that there is no file of the name, or that none can have it."""
    if isinstance(error, OSError):
        return error.errno in MISSING
    return isinstance(error, UnicodeEncodeError) or "null byte" in str(error)


def _beginning(file: str | Path | IO[bytes]) -> bytes:
    if isinstance(file, str | Path):
        with open(file, "rb") as opened:
            return opened.read(4)
    file.seek(0, os.SEEK_SET)
    return file.read(4)
