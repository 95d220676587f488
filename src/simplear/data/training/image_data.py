"""Pictures and captions as training batches, for the visual tokenizer and for CLIP: the same order and position as
`TokenDataModule`, over pictures in memory or read when they are needed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

from simplear.data.prepare.crops import resize_and_crop
from simplear.data.sample import Drop, Pixels, Sample, warn_of_drops
from simplear.data.sources.base import IndexedSource, Source
from simplear.data.training.order import MicroBatch, choose_captions
from simplear.data.training.ordered_data import BatchDataset, OrderedDataModule
from simplear.errors import UserError
from simplear.visual_tokenizer import to_pixels

MOST_UNUSABLE = 1000
"""Samples one after another that cannot be used, after which something else must be wrong."""


class ImageBatches(BatchDataset):
    """Micro-batches of pictures of one size."""

    def __init__(self, source: Source, height: int, width: int, seed: int, cache: bool) -> None:
        self.source, self.height, self.width, self.seed = source, height, width, seed
        self.cached: list[tuple[str, list[str], Pixels]] | None = None
        if cache:
            drops: Counter[str] = Counter()
            self.cached = [self._row(sample) for unit in source.units() for sample in source.read(unit, drops)]
            warn_of_drops(drops)
            self.bucket_sizes = (len(self.cached),)
        elif isinstance(source, IndexedSource):
            self.bucket_sizes = (len(source),)
        else:
            raise UserError(f"{type(source).__name__} cannot be read in random order: set cache to true, or unpack it.")

    def make_batch(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """See `ImageDataModule`."""
        rows = micro_batch.positions
        read, replaced = zip(*(self._read(int(row)) for row in rows), strict=True)
        keys, captions, images = zip(*read, strict=True)
        return {
            "pixels": torch.from_numpy(to_pixels(np.stack(images))),
            "captions": choose_captions(captions, self.seed, micro_batch.epoch, rows),
            "keys": list(keys),
            "replaced": [reason for reason in replaced if reason],
        }

    def _read(self, row: int) -> tuple[tuple[str, list[str], Pixels], str]:
        """A row, or the next that can be used, and why this one cannot; so numbers and order do not change."""
        if self.cached is not None:
            return self.cached[row], ""
        assert isinstance(self.source, IndexedSource)
        count, first = len(self.source), ""
        for number in range(row, row + min(count, MOST_UNUSABLE)):
            try:
                return self._row(self.source.sample(number % count)), first
            except Drop as reason:
                first = first or f"{self.source.key(row)} cannot be used ({reason})"
        raise UserError(
            f"{first}, nor can any of the {min(count, MOST_UNUSABLE)} samples from there on: see what is wrong with "
            "them, or set cache to true, which leaves out what cannot be used."
        )

    def _row(self, sample: Sample) -> tuple[str, list[str], Pixels]:
        return sample.key, list(sample.captions), resize_and_crop(sample.image, self.height, self.width)


class ImageDataModule(OrderedDataModule):
    """Batches of pictures, in an order that no restart and no number of processes changes.

    A batch is a dictionary of ``pixels`` (B, 3, height, width) float32 in [-1, 1], ``captions`` (one of each
    picture's, drawn again in each epoch) and ``keys``. B is the global batch size divided by ranks and accumulation.
    """

    def __init__(
        self,
        source: Source,
        global_batch_size: int,
        height: int,
        width: int,
        *,
        validation_source: Source | None = None,
        cache: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        shuffle: bool = True,
    ) -> None:
        """
        Args:
            source: Pictures and captions: ScenesSource, ImageFolderSource, WebDatasetSource, or a class path.
            global_batch_size: Pictures of one optimizer step, over all ranks and accumulated micro-batches.
            height: Pixels; pictures are resized and cropped to it.
            width: Pixels; like height.
            validation_source: Pictures for validation and test; none by default.
            cache: Read all pictures once and keep them in memory, 3 bytes a pixel; broken ones are dropped and counted.
                False reads each when it is needed, and the next one takes the place of a broken one, which is counted.
            seed: Of the order and of the choice of captions.
            num_workers: Data loader processes on each rank; 0 loads in the training process.
            shuffle: False takes the pictures in the source's order, in every epoch.
        """
        super().__init__(global_batch_size, seed, num_workers, shuffle)
        self.source, self.validation_source = source, validation_source
        self.height, self.width, self.cache = height, width, cache

    def setup(self, stage: str | None = None) -> None:
        """Open the sources, and read them when cached."""
        super().setup(stage)
        if stage in (None, "fit"):
            self.training = self._batches(self.source)
        if self.validation_source is not None:
            self.validation = self._batches(self.validation_source)

    def _batches(self, source: Source) -> ImageBatches:
        return ImageBatches(source, self.height, self.width, self.seed, self.cache)
