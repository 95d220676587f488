"""Pictures back to objects: exact on what `draw` draws, and tolerant of the blur and noise of a learned decoder.

1. The background is the median of the picture's outermost pixels; pixels that differ from it by `CONTRAST` are
   foreground.
2. Each connected piece of foreground has the palette colour that most of its pixels are nearest to. Pixels that are not
   a mixture of that colour and the background belong to another object that touches it, and become pieces themselves.
3. The area and centroid of a piece determine where each shape would be and how large; the shape whose mask overlaps the
   piece best is its shape.

Pieces smaller than `SMALLEST` and pieces that overlap no shape by `MATCH` are not reported, just as a neural detector
reports nothing below its confidence threshold. `residue` measures what remains unreported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from simplear.scenes.drawing import ARM, coverage
from simplear.scenes.scene import BACKGROUNDS, COLORS, SHAPES, SceneObject

CONTRAST = 48.0
"""Euclidean RGB distance from the background at which foreground begins; noise stays below, every colour far above."""

MIXTURE = 64.0
"""Euclidean RGB distance within which a pixel passes for a mixture of an object's colour and the background."""

FAINT = 24.0
"""Euclidean RGB distance from the background above which a pixel is more than a decoder's noise; half of `CONTRAST`."""

EDGE = 1 / 32
"""Pixels this near to the outline of a detected shape, a share of the picture's width, may be anything: 2 at 64."""

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
class Detection(SceneObject):
    """An object that was found, with the nearest of `COLORS`."""

    match: float
    """Overlap with the mask of the shape, `MATCH` to 1: the detector's confidence."""


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
    foreground = _differs(pixels, background, CONTRAST)
    smallest = SMALLEST * height * width
    found, pieces = [], connected(foreground, smallest)
    while pieces:
        piece = pieces.pop()
        rows, columns = np.nonzero(piece)
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
            others = np.zeros_like(piece)
            others[rows[foreign], columns[foreign]] = True
            if rest := connected(others, smallest):
                pieces += [*rest, *connected(piece & ~others, smallest)]
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


def connected(mask: NDArray[np.bool_], smallest: float) -> list[NDArray[np.bool_]]:
    """A mask of each connected piece (pixels that share a side) of at least ``smallest`` pixels."""
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    return [labels == number for number in range(1, len(sizes)) if sizes[number] >= smallest]


def residue(image: NDArray[np.uint8], detections: Sequence[Detection]) -> float:
    """Share of the picture's area, in [0, 1], that is neither background nor a detected object in its colour.

    Specks, smears, second backgrounds and patches of another colour count here, which a model that is rewarded for
    detections alone can add without a penalty.

    Args:
        image: (H, W, 3) uint8 RGB.
        detections: of the picture, as `detect` gives them.
    """
    height, width = image.shape[:2]
    pixels = image.astype(np.float32)
    unexplained = _differs(pixels, background_of(pixels), FAINT)
    across, down = (np.arange(side, dtype=np.float32) + np.float32(0.5) for side in (width, height))
    for found in detections:
        x, y, size, edge = found.x * width, found.y * height, found.size * width, EDGE * width
        outside = coverage(found.shape, x, y, size + 2 * edge, across, down) == 0
        inside = coverage(found.shape, x, y, max(size - 2 * edge, 0), across, down) == 1
        color = np.array(COLORS[found.color], dtype=np.float32)
        unexplained = (unexplained & outside) | (inside & _differs(pixels, color, MIXTURE))
    return float(unexplained.mean())


def _differs(pixels: NDArray[np.float32], color: NDArray[np.float32], distance: float) -> NDArray[np.bool_]:
    return np.asarray(((pixels - color) ** 2).sum(axis=2) > distance**2)
