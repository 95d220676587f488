"""How a picture becomes one of the sizes that are encoded: its centre, or the grid nearest its shape.

A crop is a pure function of the picture's size and key, so shards do not depend on the process that made them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
from PIL import Image

from simplear.data.sample import Pixels
from simplear.described import Described


def resize_and_crop(image: Image.Image, height: int, width: int) -> Pixels:
    """The largest part in the picture's middle that has the aspect of (height, width), resized.

    uint8 (height, width, 3).
    Lanczos resampling; a picture of that size already is not changed.

    Args:
        image: RGB.
        height: pixels.
        width: pixels.
    """
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
        box = (left, top, left + width * scale, top + height * scale)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(image)


class Crop(Described, ABC):
    """Resizes and cuts; derive from it and name the class by its path."""

    @abstractmethod
    def __call__(self, image: Image.Image, key: str, size: tuple[int, int], downsample: int) -> Pixels:
        """uint8 (h, w, 3), h and w multiples of `downsample`.

        Args:
            image: RGB.
            key: the sample's.
            size: height and width asked for, multiples of `downsample`.
            downsample: pixels of a code along each side.
        """


class CentreCrop(Crop):
    """The middle of the picture, the largest part that has the aspect asked for."""

    def __call__(self, image: Image.Image, key: str, size: tuple[int, int], downsample: int) -> Pixels:
        return resize_and_crop(image, *size)


class AspectBuckets(Crop):
    """The grid nearest the picture's own shape, of those with about as many codes as the size asked for.

    So little is cut off. Rows of several grids come out; a training batch holds one of them, and what fills no batch of
    its grid sits an epoch out, so few grids are better than many.
    """

    def __init__(self, max_aspect: float = 2.0, step: int = 4) -> None:
        """
        Args:
            max_aspect: Longest grid, long side over short; pictures beyond it lose their ends.
            step: Grids have multiples of so many codes along each side (the size asked for itself always counts).
        """
        self.max_aspect, self.step = max_aspect, step

    def grids(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Grids (h, w) in codes with at most rows × columns codes, as wide as that allows, sorted."""
        codes, found = rows * columns, {(rows, columns)}
        for height in range(self.step, codes // self.step + 1, self.step):
            width = codes // height // self.step * self.step
            if width and max(height / width, width / height) <= self.max_aspect:
                found.add((height, width))
        return sorted(found)

    def __call__(self, image: Image.Image, key: str, size: tuple[int, int], downsample: int) -> Pixels:
        grids = self.grids(size[0] // downsample, size[1] // downsample)
        nearest = min(grids, key=lambda grid: abs(math.log(grid[1] / grid[0] * image.height / image.width)))
        return resize_and_crop(image, nearest[0] * downsample, nearest[1] * downsample)
