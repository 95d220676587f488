"""How a picture becomes one of the sizes that are encoded: its centre, a random part, or the grid nearest its shape.

A crop is a pure function of the picture's size and key, so shards do not depend on who made them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
from PIL import Image
from xxhash import xxh3_64_intdigest

from simplear.data.sample import Pixels
from simplear.described import Described
from simplear.errors import UserError

CENTRE = (0.5, 0.5)


def resize_and_crop(
    image: Image.Image | Pixels, height: int, width: int, place: tuple[float, float] = CENTRE
) -> Pixels:
    """A part of the picture at (height, width), as large a part as has that aspect; uint8 (height, width, 3).

    Lanczos resampling; a picture of that size already is returned as it is.

    Args:
        image: RGB.
        height: pixels.
        width: pixels.
        place: where the part lies in what is left over, down and across: 0 at top and left, 1 at bottom and right.
    """
    if isinstance(image, np.ndarray):
        if image.shape[:2] == (height, width):
            return image
        image = Image.fromarray(image)
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        left, top = (image.width - width * scale) * place[1], (image.height - height * scale) * place[0]
        box = (left, top, left + width * scale, top + height * scale)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(image)


class Crop(Described, ABC):
    """Resizes and cuts; derive from it and name the class by its path."""

    @abstractmethod
    def __call__(self, image: Image.Image | Pixels, key: str, size: tuple[int, int], downsample: int) -> Pixels:
        """uint8 (h, w, 3), h and w multiples of `downsample`.

        Args:
            image: RGB.
            key: the sample's.
            size: height and width asked for, multiples of `downsample`.
            downsample: pixels of a code along each side.
        """


class CentreCrop(Crop):
    """The middle of the picture, as large a part as has the aspect asked for."""

    def __call__(self, image: Image.Image | Pixels, key: str, size: tuple[int, int], downsample: int) -> Pixels:
        return resize_and_crop(image, *size)


class RandomCrop(Crop):
    """A part as large as that of `CentreCrop`, at a place that follows from seed and key."""

    def __init__(self, seed: int = 0) -> None:
        """
        Args:
            seed: Of the places.
        """
        self.seed = seed

    def __call__(self, image: Image.Image | Pixels, key: str, size: tuple[int, int], downsample: int) -> Pixels:
        return resize_and_crop(image, *size, place=self.place(key))

    def place(self, key: str) -> tuple[float, float]:
        """Where the part lies, down and across, each uniform in [0, 1]."""
        down, across = (xxh3_64_intdigest(f"{axis}\0{key}".encode(), self.seed % 2**64) for axis in ("down", "across"))
        return down / (2**64 - 1), across / (2**64 - 1)


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
        if max_aspect < 1 or step < 1:
            raise UserError(f"max_aspect {max_aspect} and step {step} must be at least 1.")
        self.max_aspect, self.step = max_aspect, step

    def grids(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Grids (h, w) in codes with at most rows × columns codes, as wide as that allows, sorted."""
        codes, found = rows * columns, {(rows, columns)}
        for height in range(self.step, codes // self.step + 1, self.step):
            width = codes // height // self.step * self.step
            if width and max(height / width, width / height) <= self.max_aspect:
                found.add((height, width))
        return sorted(found)

    def __call__(self, image: Image.Image | Pixels, key: str, size: tuple[int, int], downsample: int) -> Pixels:
        width, height = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
        grids = self.grids(size[0] // downsample, size[1] // downsample)
        # Of two equally near ones the first, so that nothing hangs on the order of a set.
        nearest = min(grids, key=lambda grid: abs(math.log(grid[1] / grid[0] * height / width)))
        return resize_and_crop(image, nearest[0] * downsample, nearest[1] * downsample, CENTRE)
