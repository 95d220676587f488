"""Scenes to pixels, at any resolution.

Each shape is a signed distance to its outline, and a pixel's colour mixes by how deep it lies inside: edges are
smooth without supersampling, and the same function gives the detector its templates.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from simplear.scenes.scene import BACKGROUNDS, COLORS, Scene

ARM = 0.36
"""Width of the cross's arms as a share of its size."""


def coverage(
    shape: str, x: float, y: float, size: float, columns: NDArray[np.float32], rows: NDArray[np.float32]
) -> NDArray[np.float32]:
    """How much of each pixel a shape covers, in [0, 1].

    Args:
        shape: one of `SHAPES`.
        x, y, size: centre and side of the bounding square in pixels, pixel 0 reaching from 0 to 1.
        columns: (w,) centres of the pixel columns, in pixels.
        rows: (h,) centres of the pixel rows.

    Returns:
        (h, w) float32.
    """
    half = size / 2
    across = np.abs(columns - x)
    down = (rows - y)[:, None]
    if shape == "circle":
        distance = np.sqrt(across * across + down * down) - half
    elif shape == "triangle":
        distance = np.maximum((2 * across - (down + half)) / math.sqrt(5), down - half)
    else:
        away = np.abs(down)
        if shape == "square":
            distance = np.maximum(across, away) - half
        else:
            arm = half * ARM
            distance = np.minimum(np.maximum(across - half, away - arm), np.maximum(across - arm, away - half))
    return np.minimum(np.maximum(0.5 - distance, 0.0), 1.0)


def draw(scene: Scene, resolution: int) -> NDArray[np.uint8]:
    """The picture of a scene, (resolution, resolution, 3) uint8 RGB."""
    background = np.array(BACKGROUNDS[scene.background], dtype=np.float32)
    image = np.empty((resolution, resolution, 3), dtype=np.uint8)
    image[:] = BACKGROUNDS[scene.background]
    centres = np.arange(resolution, dtype=np.float32) + np.float32(0.5)
    for item in scene.objects:
        x, y, size = item.x * resolution, item.y * resolution, item.size * resolution
        columns, rows = (_span(centre, size, resolution) for centre in (x, y))
        covered = coverage(item.shape, x, y, size, centres[columns], centres[rows])[:, :, None]
        color = np.array(COLORS[item.color], dtype=np.float32)
        image[rows, columns] = np.rint(background + covered * (color - background))
    return image


def _span(centre: float, size: float, resolution: int) -> slice:
    return slice(max(int(centre - size / 2) - 1, 0), min(int(centre + size / 2) + 2, resolution))
