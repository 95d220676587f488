"""Pictures with their captions as one picture: cells in rows, under headings, each image marked right or wrong.

A cell holds one caption and one image, or several images of that caption side by side, such as two runs'. Left out:
plots and anything interactive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT, RULE = (255, 255, 255), (32, 33, 36), (128, 134, 139), (218, 220, 224)
GREEN, RED = (24, 148, 72), (210, 38, 48)
MARGIN = 20
"""Pixels around everything and between cells."""
GAP = 4
"""Pixels between the images of one cell."""
CAPTION_SIZE, LABEL_SIZE, HEADING_SIZE = 14, 12, 18
LINE_SPACING = 1.35
"""Height of a line of text as a multiple of its size."""
BADGE_SIZE = 18
"""Diameter of a tick or cross; they stand above the image, where they hide nothing of it."""
SUPERSAMPLING = 4
"""Ticks and crosses are drawn this many times larger and reduced, for smooth edges."""


@dataclass(frozen=True)
class Cell:
    """One caption and what was drawn for it."""

    caption: str
    """Text below the images, wrapped to their width."""
    images: tuple[Image.Image, ...]
    """Shown side by side."""
    marks: tuple[bool | None, ...] = ()
    """For each image True (tick), False (cross) or None; empty: no marks at all."""
    labels: tuple[str, ...] = ()
    """A word above each image, such as the name of its run; empty: none."""


def image_grid(sections: Mapping[str, Sequence[Cell]], columns: int = 4, image_size: int = 128) -> Image.Image:
    """Lay cells out in rows, section after section.

    Args:
        sections: cells under each heading; an empty heading is left out.
        columns: cells in a row.
        image_size: pixels of the longer side of each image as shown. Small pictures are enlarged by whole pixels where
            that is a whole number of times, others are resampled smoothly.

    Raises:
        ValueError: no cell at all.
    """
    cells = [cell for members in sections.values() for cell in members]
    if not cells:
        raise ValueError("there are no images to show.")
    columns = min(columns, max(len(members) for members in sections.values()))
    images = max(len(cell.images) for cell in cells)
    cell_width = images * image_size + (images - 1) * GAP
    width = columns * cell_width + (columns + 1) * MARGIN
    parts = []
    for heading, members in sections.items():
        parts += [_heading(heading, width)] if heading else []
        for start in range(0, len(members), columns):
            parts.append(_row(members[start : start + columns], width, cell_width, image_size))
    page = Image.new("RGB", (width, MARGIN + sum(part.height for part in parts)), PAPER)
    top = MARGIN
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    return page


def tiled(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size edge to edge, ``columns`` in a row; what the last row lacks is black."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * width, rows * height))
    for number, image in enumerate(images):
        page.paste(image, (number % columns * width, number // columns * height))
    return page


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _line(size: int) -> int:
    return round(size * LINE_SPACING)


def _heading(text: str, width: int) -> Image.Image:
    strip = Image.new("RGB", (width, _line(HEADING_SIZE) + MARGIN // 2), PAPER)
    drawing = ImageDraw.Draw(strip)
    drawing.text((MARGIN, 0), text, INK, _font(HEADING_SIZE))
    rule = _line(HEADING_SIZE)
    drawing.line((MARGIN, rule, width - MARGIN, rule), RULE)
    return strip


def _row(cells: Sequence[Cell], width: int, cell_width: int, image_size: int) -> Image.Image:
    captions = [wrap(cell.caption, cell_width - 2 * GAP, CAPTION_SIZE) for cell in cells]
    label_height = BADGE_SIZE + GAP if any(cell.labels or cell.marks for cell in cells) else 0
    shown = [[fit(image, image_size) for image in cell.images] for cell in cells]
    image_height = max(image.height for images in shown for image in images)
    text_height = max(len(lines) for lines in captions) * _line(CAPTION_SIZE)
    strip = Image.new("RGB", (width, label_height + image_height + MARGIN // 3 + text_height + MARGIN), PAPER)
    drawing = ImageDraw.Draw(strip)
    for number, (cell, images, lines) in enumerate(zip(cells, shown, captions, strict=True)):
        left = MARGIN + number * (cell_width + MARGIN)
        for place, image in enumerate(images):
            x = left + place * (image_size + GAP)
            mark = cell.marks[place] if cell.marks else None
            if mark is not None:
                strip.paste(badge_of(mark, BADGE_SIZE), (x, 0), badge_of(mark, BADGE_SIZE))
            if cell.labels:
                start = x if mark is None else x + BADGE_SIZE + GAP
                drawing.text((start, BADGE_SIZE // 2), cell.labels[place], FAINT, _font(LABEL_SIZE), anchor="lm")
            x += (image_size - image.width) // 2
            strip.paste(image, (x, label_height))
            # A frame, so that a white picture has an edge.
            drawing.rectangle((x, label_height, x + image.width - 1, label_height + image.height - 1), outline=RULE)
        for index, text in enumerate(lines):
            top = label_height + image_height + MARGIN // 3 + index * _line(CAPTION_SIZE)
            drawing.text((left + cell_width // 2, top), text, INK, _font(CAPTION_SIZE), anchor="ma")
    return strip


def fit(image: Image.Image, size: int) -> Image.Image:
    """The image with its longer side at ``size`` pixels: enlarged pixel by pixel if that is exact, else resampled."""
    longer = max(image.size)
    shape = (max(1, round(image.width * size / longer)), max(1, round(image.height * size / longer)))
    return image.convert("RGB").resize(
        shape, Image.Resampling.NEAREST if size % longer == 0 else Image.Resampling.LANCZOS
    )


def wrap(text: str, width: int, size: int) -> list[str]:
    """Lines of ``text`` no wider than ``width`` pixels at font size ``size``; a longer word is broken, none is lost."""
    font = _font(size)
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def badge_of(right: bool, size: int) -> Image.Image:
    """A white tick on a green disc, or a white cross on a red one, (size, size) RGBA."""
    full = size * SUPERSAMPLING
    badge = Image.new("RGBA", (full, full), (255, 255, 255, 0))
    drawing = ImageDraw.Draw(badge)
    drawing.ellipse((0, 0, full - 1, full - 1), fill=(*(GREEN if right else RED), 255))
    strokes: list[list[tuple[float, float]]]
    strokes = (
        [[(0.28, 0.52), (0.44, 0.68), (0.73, 0.35)]]
        if right
        else [[(0.33, 0.33), (0.67, 0.67)], [(0.67, 0.33), (0.33, 0.67)]]
    )
    for stroke in strokes:
        points = [(x * full, y * full) for x, y in stroke]
        drawing.line(points, fill=(*PAPER, 255), width=full // 9, joint="curve")
        for x, y in (points[0], points[-1]):
            radius = full / 18
            drawing.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*PAPER, 255))
    return badge.reduce(SUPERSAMPLING)
