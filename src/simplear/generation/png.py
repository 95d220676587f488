"""PNG files that say how they were made: a JSON object in a text chunk, under names that any file system takes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from simplear.atomic import whole_file
from simplear.pictures import PictureError, opened_picture
from simplear.text_files import parse_json

METADATA_KEY = "simplear"
"""Name of the PNG text chunk, an iTXt one, so that any prompt fits."""
NAME_LENGTH = 60
"""Letters of the prompt in a file's name."""


def write_png(path: str | Path, image: Image.Image, made: dict[str, Any]) -> None:
    """A PNG file with ``made`` in its metadata, which appears complete or not at all.

    Raises OSError, naming the file, when the disk is full.
    """
    with whole_file(path) as partial:
        partial.write_bytes(png_bytes(image, made))


def png_bytes(image: Image.Image, made: dict[str, Any]) -> bytes:
    """The content of a PNG file with ``made`` in its metadata."""
    information, file = PngInfo(), io.BytesIO()
    information.add_itxt(METADATA_KEY, json.dumps(made, ensure_ascii=False))
    image.save(file, "PNG", pnginfo=information)
    return file.getvalue()


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """The metadata that `write_png` wrote; None for any other file."""
    try:
        with opened_picture(path) as image:
            made = parse_json(image.info[METADATA_KEY])
    except (KeyError, ValueError, TypeError):
        return None
    return made if isinstance(made, dict) else None


def is_whole(path: str | Path) -> bool:
    """Whether a PNG is complete, with the checksums that were written into it."""
    try:
        with opened_picture(path) as image:
            image.verify()
    except PictureError:
        return False
    return True


def file_name(number: int, prompt: str, sample: int) -> str:
    """Safe on any file system, whatever the prompt: at most ASCII letters, digits and hyphens of it."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:NAME_LENGTH].strip("-")
    return f"{number:05d}-{words}-{sample}.png" if words else f"{number:05d}-{sample}.png"
