"""A second judge, stricter than `verdict` and independent of `detect`, to evaluate what was trained on these.

A model that is rewarded for what `detect` recognises learns to exploit what `detect` overlooks. This judge gives no
reward. The picture must be one that could have been drawn: a plain background of a known colour and, on it, exactly the
objects asked for, whole, apart from each other and from the edge, each of one colour and of a shape that fits closely.

1. The background is the known one that most pixels are nearest to; what differs from it clearly is foreground.
2. Each connected piece of foreground is an object. Its colour is the median inside it, which nearly all its inside must
   share. Everything else that differs from the background is litter: small pieces and faint smears, but not the soft
   edge of an object.
3. An object's shape is the template that overlaps it best over a search of places and sizes, and must do so by `CLOSE`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from simplear.scenes.detection import Detection, connected
from simplear.scenes.drawing import coverage
from simplear.scenes.judgement import Verdict, verdict
from simplear.scenes.scene import BACKGROUNDS, COLORS, SHAPES

CLEAR = 64.0
"""Euclidean RGB distance from the background beyond which a pixel is foreground."""

PLAIN = 32.0
"""Euclidean RGB distance from the background within which a pixel is background; between the two it is faint."""

NEAR = 60.0
"""Euclidean RGB distance within which the median of an object, or of the background, is the colour it is named."""

UNIFORM = 0.9
"""Smallest share of an object's inside that is nearest to the object's colour."""

CLOSE = 0.85
"""Smallest overlap (intersection over union) of an object with the mask of its shape."""

SMALLEST = 0.01
"""Area of the smallest object, a share of the picture's: 41 pixels at 64 x 64, half of the smallest one drawn."""

SOFT_EDGE = 1 / 32
"""How far an object's soft edge reaches, a share of the picture's width: 2 pixels at 64."""

LITTER = 0.003
"""Largest share of the picture that litter may cover: 12 pixels at 64 x 64."""

_SHIFTS, _GROWTHS = (-1 / 64, 0.0, 1 / 64), (-1 / 32, -1 / 64, 0.0, 1 / 64, 1 / 32)
SEARCH = tuple(itertools.product(_SHIFTS, _SHIFTS, _GROWTHS))
"""What is added to an object's centre and size to find the best overlap, a share of the picture's width."""

_COLOR_NAMES, _BACKGROUND_NAMES = tuple(COLORS), tuple(BACKGROUNDS)
_COLORS = np.array(list(COLORS.values()), dtype=np.float32)
_BACKGROUNDS = np.array(list(BACKGROUNDS.values()), dtype=np.float32)


def strict_verdict(prompt: Mapping[str, Any], image: NDArray[np.uint8]) -> Verdict:
    """Judge one picture: the question of its category, and that it shows nothing else.

    Args:
        prompt: as for `verdict`.
        image: (H, W, 3) uint8 RGB.

    Raises:
        ValueError: the prompt lacks a key, or a value is unknown.
    """
    found = _objects(image)
    if isinstance(found, str):
        return Verdict(False, found)
    answer = verdict(prompt, found)
    wanted = sum(item["count"] for item in prompt["include"])
    return Verdict(False, f"{len(found)} objects, not {wanted}") if answer.correct and len(found) != wanted else answer


def _objects(image: NDArray[np.uint8]) -> list[Detection] | str:
    """All objects, the best match first; or, in words, why the picture could not have been drawn."""
    height, width = image.shape[:2]
    pixels = image.astype(np.float32)
    nearest = _distances(pixels, np.concatenate([_BACKGROUNDS, _COLORS])).argmin(axis=-1)
    name = int(np.bincount(nearest.ravel(), minlength=len(_BACKGROUNDS))[: len(_BACKGROUNDS)].argmax())
    plain = np.median(pixels[nearest == name], axis=0) if (nearest == name).any() else np.full(3, np.inf)
    if np.linalg.norm(plain - _BACKGROUNDS[name]) > NEAR:
        return "no background of a known colour"
    distance = _distances(pixels, plain[None])[..., 0]
    litter, objects = distance > PLAIN, list[Detection]()
    for mask in connected(distance > CLEAR, SMALLEST * height * width):
        if np.concatenate([mask[[0, -1]].ravel(), mask[:, [0, -1]].ravel()]).any():
            return "an object at the edge"
        found = _object(pixels, mask, plain)
        if isinstance(found, str):
            return found
        litter &= ~ndimage.binary_dilation(mask, iterations=math.ceil(SOFT_EDGE * width))
        objects.append(found)
    if litter.sum() > LITTER * height * width:
        return f"litter of {litter.sum()} pixels"
    return sorted(objects, key=lambda item: -item.match)


def _object(pixels: NDArray[np.float32], mask: NDArray[np.bool_], plain: NDArray[np.float32]) -> Detection | str:
    height, width = pixels.shape[:2]
    inside = pixels[~ndimage.binary_dilation(~mask, iterations=math.ceil(SOFT_EDGE * width / 2))]
    if not len(inside):
        return "an object without an interior"
    color = int(_distances(np.median(inside, axis=0), _COLORS).argmin())
    if np.linalg.norm(np.median(inside, axis=0) - _COLORS[color]) > NEAR or (
        (_distances(inside, _COLORS).argmin(axis=-1) == color).mean() < UNIFORM
    ):
        return "an object of no single color"
    # Up to where its colour fades halfway into the background.
    body = mask & (_distances(pixels, np.stack([plain, _COLORS[color]])).argmin(axis=-1) == 1)
    shape, x, y, size, match = _fitted(body)
    if match < CLOSE:
        return f"{_COLOR_NAMES[color]} object of no shape"
    return Detection(shape, _COLOR_NAMES[color], x / width, y / height, size / width, match)


def _fitted(body: NDArray[np.bool_]) -> tuple[str, float, float, float, float]:
    """Best shape, centre and size in pixels, and overlap."""
    width = body.shape[1]
    rows, columns = np.nonzero(body)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    # Room around for templates that are larger; beyond it none reaches.
    room = math.ceil(width / 16)
    body = np.pad(body[top:bottom, left:right], room)
    down, across = (np.arange(side, dtype=np.float32) + np.float32(0.5 - room) for side in body.shape)
    x, y, size = (right - left) / 2, (bottom - top) / 2, math.sqrt((bottom - top) * (right - left))
    fits = []
    for shape in SHAPES:
        for dx, dy, grown in SEARCH:
            place = x + dx * width, y + dy * width, size + grown * width
            drawn = coverage(shape, *place, across, down) >= 0.5
            fits.append((float((drawn & body).sum() / (drawn | body).sum()), shape, *place))
    match, shape, x, y, size = max(fits)
    return shape, x + left, y + top, size, match


def _distances(pixels: NDArray[np.float32], colors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Euclidean distances (…, C) of pixels (…, 3) from colours (C, 3)."""
    return np.asarray(np.sqrt(((pixels[..., None, :] - colors) ** 2).sum(axis=-1)))
