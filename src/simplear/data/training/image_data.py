"""Pictures and captions as training batches, for the visual tokenizer and for CLIP: the same order and position as
`TokenDataModule`, over pictures in memory or read when they are needed.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import numpy as np
import torch

from simplear.data.prepare.crops import resize_and_crop
from simplear.data.sample import Drop, Dropped, Pixels, Sample, warn_of_drops
from simplear.data.sources.base import IndexedSource, Source, decoded
from simplear.data.training.order import Batch, choose_captions
from simplear.data.training.ordered_data import BatchDataset, OrderedDataModule
from simplear.errors import UserError
from simplear.visual_tokenizer import to_pixels

logger = logging.getLogger(__name__)


class ImageBatches(BatchDataset):
    """Micro-batches of pictures of one size."""

    def __init__(self, source: Source, height: int, width: int, seed: int, cache: bool) -> None:
        self.source, self.height, self.width, self.seed = source, height, width, seed
        self.cached: list[tuple[str, list[str], Pixels]] | None = None
        if cache:
            dropped: list[Dropped] = []
            samples = (sample for unit in source.units() for sample in source.read(unit, dropped))
            self.cached = [self._row(sample) for sample in decoded(samples, dropped)]
            warn_of_drops(Counter(reason for _, reason in dropped))
            self.bucket_sizes = (len(self.cached),)
        elif isinstance(source, IndexedSource):
            self.bucket_sizes = (len(source),)
        else:
            raise UserError(f"{type(source).__name__} cannot be read in random order: set cache to true, or unpack it.")

    def make_batch(self, micro_batch: Batch) -> dict[str, Any]:
        """See `ImageDataModule`."""
        rows = micro_batch.positions
        keys, captions, images = zip(*map(self._read, rows.tolist()), strict=True)
        return {
            "pixels": torch.from_numpy(to_pixels(np.stack(images))),
            "captions": choose_captions(captions, self.seed, micro_batch.epoch, rows),
            "keys": list(keys),
        }

    def _read(self, row: int) -> tuple[str, list[str], Pixels]:
        """A row, or with a line the next one that can be used, so that numbers and order do not change."""
        if self.cached is not None:
            return self.cached[row]
        source = self.source
        assert isinstance(source, IndexedSource)
        for number in range(row, row + len(source)):
            try:
                return self._row(source.sample(number % len(source)))
            except Drop as reason:
                key = source.key(number % len(source))
                logger.warning("%s cannot be used (%s): the next takes its place", key, reason)
        raise UserError(f"none of the {len(source)} samples can be used: see what is wrong with them.")

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
                False reads each when it is needed, and the next one takes the place of a broken one, with a line.
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
