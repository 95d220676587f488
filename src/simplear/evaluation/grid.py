"""Pictures with their captions as one picture: cells in rows, under headings, each image marked right or wrong.

A cell has one caption and one image, or several images of that caption side by side, such as those of two runs.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT, RULE = (255, 255, 255), (32, 33, 36), (128, 134, 139), (218, 220, 224)
GREEN, RED = (24, 148, 72), (210, 38, 48)
MARGIN = 20
"""Pixels around everything and between cells."""
GAP = 4
"""Pixels between the images of one cell."""
CAPTION_SIZE, LABEL_SIZE, HEADING_SIZE = 14, 13, 18
LINE = 1.35
"""Height of a line of text as a multiple of its size."""
LETTER = 0.6
"""Width of a letter as a multiple of its size; texts have narrower ones on average."""


@dataclass(frozen=True)
class Cell:
    """A caption and what was drawn for it."""

    caption: str
    """Text below the images, wrapped to their width."""
    images: tuple[Image.Image, ...]
    """Shown side by side."""
    marks: tuple[bool | None, ...] = ()
    """For each image whether it is right, if known; empty: no marks at all."""
    labels: tuple[str, ...] = ()
    """A word above each image, such as the name of its run; empty: none."""


def image_grid(sections: Mapping[str, Sequence[Cell]], columns: int = 4, image_size: int = 128) -> Image.Image:
    """Lay cells out in rows, section by section.

    Args:
        sections: cells under each heading; an empty heading is left out.
        columns: cells in a row.
        image_size: pixels of the longer side of each image as shown, see `fit`.

    Raises:
        ValueError: there are no cells.
    """
    cells = [cell for members in sections.values() for cell in members]
    if not cells:
        raise ValueError("there are no images to show.")
    columns = min(columns, max(len(members) for members in sections.values()))
    images = max(len(cell.images) for cell in cells)
    cell_width = images * image_size + (images - 1) * GAP
    width = columns * cell_width + (columns + 1) * MARGIN
    strips = []
    for heading, members in sections.items():
        if heading:
            strips.append(Image.new("RGB", (width, round(LINE * HEADING_SIZE) + MARGIN // 2), PAPER))
            ImageDraw.Draw(strips[-1]).text((MARGIN, 0), heading, INK, _font(HEADING_SIZE))
        for start in range(0, len(members), columns):
            strips.append(_row(members[start : start + columns], width, cell_width, image_size))
    page = Image.new("RGB", (width, MARGIN + sum(strip.height for strip in strips)), PAPER)
    top = MARGIN
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height
    return page


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _row(cells: Sequence[Cell], width: int, cell_width: int, image_size: int) -> Image.Image:
    captions = [wrap(cell.caption, cell_width) for cell in cells]
    label_height = round(LINE * LABEL_SIZE) if any(cell.labels or cell.marks for cell in cells) else 0
    shown = [[fit(image, image_size) for image in cell.images] for cell in cells]
    below = label_height + max(image.height for images in shown for image in images) + MARGIN // 3
    text_height = max(map(len, captions)) * round(LINE * CAPTION_SIZE)
    strip = Image.new("RGB", (width, below + text_height + MARGIN), PAPER)
    drawing = ImageDraw.Draw(strip)
    for number, (cell, images, lines) in enumerate(zip(cells, shown, captions, strict=True)):
        left = MARGIN + number * (cell_width + MARGIN)
        for place, image in enumerate(images):
            x = left + place * (image_size + GAP)
            mark = cell.marks[place] if cell.marks else None
            word, color = ("", FAINT) if mark is None else ("right", GREEN) if mark else ("wrong", RED)
            label = " ".join([*cell.labels[place : place + 1], word])
            drawing.text((x, 0), label, color, _font(LABEL_SIZE))
            x += (image_size - image.width) // 2
            strip.paste(image, (x, label_height))
            # A frame, so that a white picture has an edge.
            drawing.rectangle((x, label_height, x + image.width - 1, label_height + image.height - 1), outline=RULE)
        for index, line in enumerate(lines):
            place_of_line = left + cell_width // 2, below + index * round(LINE * CAPTION_SIZE)
            drawing.text(place_of_line, line, INK, _font(CAPTION_SIZE), anchor="ma")
    return strip


def fit(image: Image.Image, size: int) -> Image.Image:
    """The image with its longer side at ``size`` pixels: enlarged pixel by pixel if that is exact, else resampled."""
    longer = max(image.size)
    shape = (max(1, round(image.width * size / longer)), max(1, round(image.height * size / longer)))
    return image.convert("RGB").resize(
        shape, Image.Resampling.NEAREST if size % longer == 0 else Image.Resampling.LANCZOS
    )


def wrap(text: str, width: int) -> list[str]:
    """Lines of about ``width`` pixels; a longer word is broken."""
    return textwrap.wrap(text, max(1, int(width / (LETTER * CAPTION_SIZE)))) or [""]
