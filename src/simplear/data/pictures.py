"""Picture files to RGB arrays of one size: orientation, modes, crop.

Left out: filters by size or quality. A picture smaller than asked for is enlarged.
"""

from __future__ import annotations

import logging
from collections import Counter
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
    try:
        with Image.open(file) as opened:
            opened.load()
            picture = ImageOps.exif_transpose(opened)
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
    if picture.mode in ("I", "F"):
        raise Drop(f"picture of mode {picture.mode}, whose range is unknown")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.new("RGB", layer.size, WHITE)
        picture.paste(layer, mask=layer.getchannel("A"))
    return picture.convert("RGB")


def _beginning(file: str | Path | IO[bytes]) -> bytes:
    if isinstance(file, str | Path):
        with open(file, "rb") as opened:
            return opened.read(4)
    file.seek(0)
    return file.read(4)


def resize_and_crop(image: Image.Image | Pixels, height: int, width: int) -> Pixels:
    """The centre of the picture at (height, width), as large a part as has that aspect; uint8 (height, width, 3).

    Lanczos resampling; a picture of that size already is returned as it is.
    """
    if isinstance(image, np.ndarray):
        if image.shape[:2] == (height, width):
            return image
        image = Image.fromarray(image)
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
        box = (left, top, left + width * scale, top + height * scale)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(image)
