"""A sample to the pixels that are encoded, or the reason that it is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from simplear.data.prepare.crops import CentreCrop, Crop
from simplear.data.prepare.filters import Filter
from simplear.data.sample import NO_CAPTION, Drop, Pixels, Sample
from simplear.errors import UserError
from simplear.hashing import Int64


@dataclass(frozen=True)
class Preparation:
    """What happens to a sample before it is encoded."""

    size: tuple[int, int] | None
    """Height and width to crop to; None keeps each picture's own."""
    downsample: int
    codebook_size: int
    crop: Crop = field(default_factory=CentreCrop)
    filters: Sequence[Filter] = ()

    def __call__(self, sample: Sample) -> Pixels | Int64:
        """Pixels to encode, uint8 (H, W, 3), or the codes (h, w) that the sample has already.

        Raises:
            Drop: it is to be left out.
            ValueError: codes outside the codebook, or of another grid than height and width ask for; names the sample.
        """
        if not sample.captions:
            raise Drop(NO_CAPTION)
        for filter_ in self.filters:
            filter_.check(sample)
        if sample.codes is not None:
            self._require_codes(sample.key, sample.codes)
            return sample.codes
        image = sample.image
        pixels = np.asarray(image) if self.size is None else self.crop(image, sample.key, self.size, self.downsample)
        if pixels.shape[0] % self.downsample or pixels.shape[1] % self.downsample:
            raise Drop(f"sides are no multiples of {self.downsample}, and no height and width to crop to")
        return pixels

    def _require_codes(self, key: str, codes: Int64) -> None:
        wanted = codes.shape if self.size is None else tuple(side // self.downsample for side in self.size)
        if codes.shape != wanted:
            raise UserError(f"{key} has the grid {codes.shape}, height and width ask for {wanted}: leave them out.")
        outside = codes[(codes < 0) | (codes >= self.codebook_size)]
        if len(outside):
            raise UserError(
                f"{key} has the code {outside[0]}, outside [0, {self.codebook_size}): it is of another visual "
                "tokenizer, or damaged. Name the tokenizer that made it, or take the file out."
            )
