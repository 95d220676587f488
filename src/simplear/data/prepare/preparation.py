"""A sample to the pixels that are encoded, or the reason that it is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from simplear.data.prepare.crops import CentreCrop, Crop
from simplear.data.prepare.filters import Filter
from simplear.data.sample import NO_CAPTION, Drop, Pixels, Sample


@dataclass(frozen=True)
class Preparation:
    """What happens to a sample before it is encoded."""

    size: tuple[int, int] | None
    """Height and width to crop to; None keeps each picture's own."""
    downsample: int
    crop: Crop = field(default_factory=CentreCrop)
    filters: Sequence[Filter] = ()

    def __call__(self, sample: Sample) -> Pixels:
        """Pixels to encode, uint8 (H, W, 3). Raises `Drop` if the sample is to be left out."""
        if not sample.captions:
            raise Drop(NO_CAPTION)
        for filter_ in self.filters:
            filter_.check(sample)
        image = sample.image
        pixels = np.asarray(image) if self.size is None else self.crop(image, sample.key, self.size, self.downsample)
        if pixels.shape[0] % self.downsample or pixels.shape[1] % self.downsample:
            raise Drop(f"sides are not multiples of {self.downsample}, and there is no size to crop to")
        return pixels
