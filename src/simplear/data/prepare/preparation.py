"""What happens to samples before they are encoded: filters, crop, and batches of one size, in loader processes.

Whether a sample is used follows from the sample alone (and from the keys before it in its unit), so batches do not
depend on who makes them. Nothing here knows of encoders or shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from simplear.data.jobs.unit_batches import UnitBatch, UnitDataset
from simplear.data.prepare.crops import CentreCrop, Crop
from simplear.data.prepare.filters import Filter
from simplear.data.sample import Drop, Pixels
from simplear.data.shards.drops import Dropped, Drops, drop
from simplear.data.sources import Sample, Source, Unit
from simplear.data.sources.base import NO_CAPTION, NO_PICTURE
from simplear.errors import UserError

Int64 = npt.NDArray[np.int64]


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
        outside = np.argwhere((codes < 0) | (codes >= self.codebook_size))
        if len(outside):
            row, column = outside[0].tolist()
            raise UserError(
                f"{key} has the code {codes[row, column]} in row {row}, column {column}, outside "
                f"[0, {self.codebook_size}): it is of another visual tokenizer, or damaged. Name the tokenizer that "
                "made it, or take the file out."
            )


class EncoderBatches(UnitDataset):
    """Pictures of one size each batch, or codes (B, h, w) int64 of pictures that are tokenized already."""

    def __init__(self, source: Source, units: Sequence[Unit], batch_size: int, preparation: Preparation) -> None:
        super().__init__(units)
        self.source, self.batch_size, self.preparation = source, batch_size, preparation

    def batches(self, unit: Unit, dropped: list[Dropped]) -> Iterator[UnitBatch]:
        """Images are tensors (B, H, W, 3) uint8."""
        drops, seen = Drops(), set[str]()
        # Pictures that keep their own size, or get the grid nearest their shape, are gathered by size.
        pending: dict[tuple[int, ...], list[tuple[int, Sample, Pixels | Int64]]] = {}
        for index, sample in enumerate(self.source.candidates(unit, drops)):
            try:
                if sample.key in seen:
                    raise Drop("duplicate key")
                seen.add(sample.key)
                prepared = self.preparation(sample)
            except Drop as reason:
                drop(drops, sample.key, reason)
                continue
            same_size = pending.setdefault(prepared.shape, [])
            same_size.append((index, replace(sample, picture=NO_PICTURE, codes=None), prepared))
            if len(same_size) == self.batch_size:
                yield _batch(unit, pending.pop(prepared.shape))
        for rows in pending.values():
            yield _batch(unit, rows)
        dropped += drops.listed()


def _batch(unit: Unit, rows: list[tuple[int, Sample, Pixels | Int64]]) -> UnitBatch:
    indices, samples, images = zip(*rows, strict=True)
    return UnitBatch(unit.name, samples, torch.from_numpy(np.stack(images)), indices)
