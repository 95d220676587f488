"""Pictures back to objects: exact on what `draw` draws, and tolerant of the blur and noise of a learned decoder.

1. The background is the median of the picture's outermost pixels; what differs from it by `CONTRAST` is foreground.
2. Each connected piece of foreground takes the palette colour that most of its pixels are nearest to. Pixels that are
   no mixture of that colour and the background belong to something else that touches it, and are taken apart alike.
3. Area and centroid of a piece say where each shape would have to be, and how large; the shape whose mask overlaps
   the piece best is its shape.

Pieces smaller than `SMALLEST` are specks and no objects, and those that overlap no shape by `MATCH` are not recognised:
neither is reported, as a neural detector reports nothing below its confidence threshold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simplear.scenes.drawing import ARM, coverage
from simplear.scenes.scene import BACKGROUNDS, COLORS, SHAPES

CONTRAST = 48.0
"""Euclidean RGB distance from the background at which foreground begins; noise stays below, every colour far above."""

MIXTURE = 64.0
"""Euclidean RGB distance within which a pixel passes for a mixture of an object's colour and the background."""

SMALLEST = 0.005
"""Area of the smallest object, a share of the picture's: 20 pixels at 64 x 64, a quarter of the smallest one drawn."""

MATCH = 0.75
"""Smallest overlap (intersection over union) of a piece with the mask of its shape."""

_FILL = {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 2 * ARM - ARM * ARM}
"""Area of each shape as a share of its bounding square's."""

_DROP = {"circle": 0.0, "square": 0.0, "triangle": 1 / 6, "cross": 0.0}
"""How far each shape's centroid lies below the centre of its bounding square, a share of the size."""

_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
_COLOR_NAMES = tuple(COLORS)


@dataclass(frozen=True)
class Detection:
    """An object found; centre and size as in `SceneObject`."""

    shape: str
    """One of `SHAPES`."""
    color: str
    """One of `COLORS`, the nearest."""
    x: float
    """Centre of the bounding square, from the left edge, as a fraction of the width."""
    y: float
    """Centre of the bounding square, from the top edge, as a fraction of the height."""
    size: float
    """Side of the bounding square as a fraction of the width."""
    match: float
    """Overlap with the mask of the shape, `MATCH` to 1: the detector's confidence."""


@dataclass(frozen=True)
class Piece:
    """A connected set of pixels: a mask, and where its top left pixel lies in the picture."""

    top: int
    left: int
    mask: NDArray[np.bool_]


def detect(image: NDArray[np.uint8]) -> list[Detection]:
    """The objects of a picture, the best match first.

    Args:
        image: (H, W, 3) uint8 RGB.

    Raises:
        ValueError: the picture has another shape or type.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"detect needs an (H, W, 3) uint8 picture, not {image.shape} {image.dtype}: scale to 0..255.")
    height, width = image.shape[:2]
    pixels = image.astype(np.float32)
    background = background_of(pixels)
    foreground = ((pixels - background) ** 2).sum(axis=2) > CONTRAST**2
    found = []
    pieces = list(connected(Piece(0, 0, foreground), SMALLEST * height * width))
    while pieces:
        piece = pieces.pop()
        rows, columns = np.nonzero(piece.mask)
        rows, columns = rows + piece.top, columns + piece.left
        values = pixels[rows, columns]
        nearest = ((values[:, None] - _PALETTE) ** 2).sum(axis=2).argmin(axis=1)
        color = int(np.bincount(nearest).argmax())
        # The colour as it is in this picture, a decoder's cast included.
        main = np.median(values[nearest == color], axis=0)
        axis = main - background
        # At least 1: in a picture of mere noise the median can be the background itself.
        share = np.clip((values - background) @ axis / max(axis @ axis, 1.0), 0, 1)
        foreign = ((values - background - share[:, None] * axis) ** 2).sum(axis=1) > MIXTURE**2
        if foreign.any() and not foreign.all():
            others = np.zeros_like(piece.mask)
            others[rows[foreign] - piece.top, columns[foreign] - piece.left] = True
            rest = list(connected(Piece(piece.top, piece.left, others), SMALLEST * height * width))
            if rest:
                own = Piece(piece.top, piece.left, piece.mask & ~others)
                pieces += [*rest, *connected(own, SMALLEST * height * width)]
                continue
        shape, x, y, size, match = _fit(rows, columns, share)
        if match >= MATCH:
            found.append(Detection(shape, _COLOR_NAMES[color], x / width, y / height, size / width, match))
    return sorted(found, key=lambda detection: -detection.match)


def background_of(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Median colour (3,) of the outermost pixels of a picture (H, W, 3)."""
    edge = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    return np.asarray(np.median(edge, axis=0), dtype=np.float32)


def background_name(image: NDArray[np.uint8]) -> str:
    """The one of `BACKGROUNDS` that the outermost pixels of a picture (H, W, 3) uint8 are nearest to."""
    background = background_of(image.astype(np.float32))
    return min(BACKGROUNDS, key=lambda name: float(((background - np.array(BACKGROUNDS[name])) ** 2).sum()))


def _fit(
    rows: NDArray[np.intp], columns: NDArray[np.intp], share: NDArray[np.float32]
) -> tuple[str, float, float, float, float]:
    """The shape that overlaps best, with its centre, size (both in pixels) and overlap."""
    area = float(share.sum())
    x, middle = (float((at + 0.5) @ share) / area for at in (columns, rows))
    top, left = rows.min() - 2, columns.min() - 2
    piece = np.zeros((rows.max() + 3 - top, columns.max() + 3 - left), dtype=np.float32)
    piece[rows - top, columns - left] = share
    across = np.arange(piece.shape[1], dtype=np.float32) + np.float32(left + 0.5)
    down = np.arange(piece.shape[0], dtype=np.float32) + np.float32(top + 0.5)
    fits = []
    for shape in SHAPES:
        size = math.sqrt(area / _FILL[shape])
        y = middle - _DROP[shape] * size
        mask = coverage(shape, x, y, size, across, down)
        common = float(np.minimum(piece, mask).sum())
        fits.append((common / (area + float(mask.sum()) - common), shape, x, y, size))
    match, shape, x, y, size = max(fits)
    return shape, x, y, size, match


def connected(whole: Piece, smallest: float) -> Iterator[Piece]:
    """The connected pieces (pixels that share a side) of at least ``smallest`` pixels.

    Works on the runs of each row, of which a picture has few: runs that overlap in neighbouring rows are one piece.
    """
    edges = np.diff(np.pad(whole.mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    runs = list(zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True))
    parent = list(range(len(runs)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    above = 0
    for run, (row, start, stop) in enumerate(runs):
        while runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] <= start):
            above += 1
        other = above
        while runs[other][0] == row - 1 and runs[other][1] < stop:
            parent[root(other)] = root(run)
            other += 1
    members: dict[int, list[tuple[int, int, int]]] = {}
    for run, extent in enumerate(runs):
        members.setdefault(root(run), []).append(extent)
    for extents in members.values():
        if sum(stop - start for _, start, stop in extents) < smallest:
            continue
        top, left = extents[0][0], min(start for _, start, _ in extents)
        mask = np.zeros((extents[-1][0] + 1 - top, max(stop for _, _, stop in extents) - left), dtype=np.bool_)
        for row, start, stop in extents:
            mask[row - top, start - left : stop - left] = True
        yield Piece(whole.top + top, whole.left + left, mask)
