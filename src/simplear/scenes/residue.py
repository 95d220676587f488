"""How much of a picture its detections do not explain: specks, smears, second backgrounds, patches of another colour.

A detector reports what it recognises and is silent about the rest, so whatever is trained on it alone may litter the
rest. Here the detections are redrawn, and what differs from that is counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from simplear.scenes.detection import MIXTURE, Detection, background_of
from simplear.scenes.drawing import coverage
from simplear.scenes.scene import COLORS

FAINT = 24.0
"""Euclidean RGB distance from the background above which a pixel is more than a decoder's noise; half of `CONTRAST`."""

EDGE = 1 / 32
"""Pixels this near to the outline of a detected shape, a share of the picture's width, may be anything: 2 at 64."""


def residue(image: NDArray[np.uint8], detections: Sequence[Detection]) -> float:
    """Share of the picture's area, in [0, 1], that is neither background nor a detected object in its colour.

    Args:
        image: (H, W, 3) uint8 RGB.
        detections: of the picture, as `detect` gives them.
    """
    height, width = image.shape[:2]
    pixels = image.astype(np.float32)
    left = _differs(pixels, background_of(pixels), FAINT)
    across, down = (np.arange(side, dtype=np.float32) + np.float32(0.5) for side in (width, height))
    for found in detections:
        x, y, size, edge = found.x * width, found.y * height, found.size * width, EDGE * width
        outside = coverage(found.shape, x, y, size + 2 * edge, across, down) == 0
        inside = coverage(found.shape, x, y, max(size - 2 * edge, 0), across, down) == 1
        color = np.array(COLORS[found.color], dtype=np.float32)
        left = (left & outside) | (inside & _differs(pixels, color, MIXTURE))
    return float(left.mean())


def _differs(pixels: NDArray[np.float32], color: NDArray[np.float32], distance: float) -> NDArray[np.bool_]:
    return np.asarray(((pixels - color) ** 2).sum(axis=2) > distance**2)
