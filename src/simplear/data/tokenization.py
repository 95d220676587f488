"""Pictures to token shards, as a Lightning prediction: ``simplear tokenize``.

Each rank takes its share of the units that have no committed shard yet; a prediction writer gathers the codes of a
unit and commits it. Batches never reach over the end of a unit, so the shards do not depend on how many processes
made them or on how often they were killed. When all units are committed, rank 0 merges the manifest.

From a command line, a source is a class and its arguments: ``--source ScenesSource --source.count 1000
--source.resolution 64``; one of your own is named by its full class path.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from simplear.data.pictures import Pixels, resize_and_crop, warn_of_drops
from simplear.data.shards import (
    MAX_CODEBOOK_SIZE,
    TokenRow,
    claim_directory,
    is_committed,
    merge_manifest,
    remove_abandoned,
    write_shard,
)
from simplear.data.sources import Sample, Source, Unit
from simplear.visual_tokenizer import VisualTokenizer, load_visual_tokenizer

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10
"""Of progress, where there is no terminal to draw a bar on."""


@dataclass(frozen=True)
class UnitBatch:
    """Some pictures of one unit and one size; the last batch of a unit is empty."""

    unit: str
    images: Tensor
    """(B, H, W, 3) uint8"""
    indices: list[int]
    """Places of the samples in the unit."""
    samples: list[Sample]
    """Without their pictures."""
    drops: Counter[str] | None = None
    """Of the whole unit, in its last batch."""


class UnitBatches(IterableDataset[UnitBatch]):
    """Batches of pictures of units, one unit after another in each loader process."""

    def __init__(
        self,
        source: Source,
        units: Sequence[Unit],
        batch_size: int,
        size: tuple[int, int] | None,
        downsample: int,
    ) -> None:
        self.source, self.units, self.batch_size = source, units, batch_size
        self.size, self.downsample = size, downsample

    def __iter__(self) -> Iterator[UnitBatch]:
        worker = get_worker_info()
        for unit in self.units if worker is None else self.units[worker.id :: worker.num_workers]:
            yield from self._batches(unit)

    def _batches(self, unit: Unit) -> Iterator[UnitBatch]:
        drops: Counter[str] = Counter()
        # Pictures that keep their own size are gathered by size.
        pending: dict[tuple[int, ...], list[tuple[int, Sample, Pixels]]] = {}
        for index, sample in enumerate(self.source.read(unit, drops)):
            image = sample.image
            pixels = np.asarray(image) if self.size is None else resize_and_crop(image, *self.size)
            if pixels.shape[0] % self.downsample or pixels.shape[1] % self.downsample:
                drops[f"sides are no multiples of {self.downsample}, and no height and width to crop to"] += 1
                continue
            bare = Sample(sample.key, np.empty((0, 0, 3), np.uint8), sample.captions, sample.metadata)
            same_size = pending.setdefault(pixels.shape, [])
            same_size.append((index, bare, pixels))
            if len(same_size) == self.batch_size:
                yield self._batch(unit, pending.pop(pixels.shape))
        for rows in pending.values():
            yield self._batch(unit, rows)
        yield UnitBatch(unit.name, torch.empty((0, 0, 0, 3), dtype=torch.uint8), [], [], drops)

    def _batch(self, unit: Unit, rows: list[tuple[int, Sample, Pixels]]) -> UnitBatch:
        indices, samples, images = zip(*rows, strict=True)
        return UnitBatch(unit.name, torch.from_numpy(np.stack(images)), list(indices), list(samples))


class TokenizeModule(lightning.LightningModule):
    """Encodes pictures, and divides the unfinished units over ranks."""

    def __init__(
        self,
        source: Source,
        visual_tokenizer: VisualTokenizer,
        out: Path,
        size: tuple[int, int] | None,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.source, self.visual_tokenizer, self.out = source, visual_tokenizer, out
        self.size, self.batch_size, self.num_workers = size, batch_size, num_workers
        self.units: list[Unit] = []
        """This rank's share."""
        self.committed_before = 0
        """Units that need no work, of all ranks."""

    def predict_dataloader(self) -> DataLoader[UnitBatch]:
        """Batches of this rank's units. Lightning lets no rank begin before all have looked which units are left."""
        units = self.source.units()
        unfinished = [unit for unit in units if not is_committed(self.out, unit.name)]
        self.committed_before = len(units) - len(unfinished)
        self.units = unfinished[self.trainer.global_rank :: self.trainer.world_size]
        batches = UnitBatches(self.source, self.units, self.batch_size, self.size, self.visual_tokenizer.downsample)
        return DataLoader(batches, batch_size=None, num_workers=min(self.num_workers, len(self.units)))

    def transfer_batch_to_device(self, batch: UnitBatch, device: torch.device, dataloader_idx: int) -> UnitBatch:
        """Pictures move to the device by themselves: captions and metadata need no walk through them."""
        return batch

    def predict_step(self, batch: UnitBatch) -> np.ndarray:
        """Codes (B, h, w) uint16 of the batch's pictures."""
        if not batch.samples:
            return np.empty((0, 0, 0), np.uint16)
        pixels = batch.images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        codes = self.visual_tokenizer.encode(pixels)
        if int(codes.min()) < 0 or int(codes.max()) >= self.visual_tokenizer.codebook_size:
            raise ValueError(
                f"the visual tokenizer gave codes in [{int(codes.min())}, {int(codes.max())}] but states a codebook of "
                f"{self.visual_tokenizer.codebook_size}."
            )
        return codes.cpu().numpy().astype(np.uint16)


class ShardWriter(BasePredictionWriter):
    """Gathers codes by unit, commits a unit when its last batch has come, and at the end merges the manifest."""

    def __init__(self, out: Path) -> None:
        super().__init__(write_interval="batch")
        self.out = out
        self.drops: Counter[str] = Counter()
        self._rows: dict[str, list[tuple[int, TokenRow]]] = {}
        self._progress: tqdm | None = None
        self._counts: dict[str, int] | None = None

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the progress bar: pictures of this rank's units, or units where their sizes are unknown."""
        assert isinstance(pl_module, TokenizeModule)
        self.by_picture = all(unit.count is not None for unit in pl_module.units)
        total = sum(unit.count or 0 for unit in pl_module.units) if self.by_picture else len(pl_module.units)
        noun = " pictures" if self.by_picture else " units"
        self._progress = tqdm(
            total=total,
            unit=noun,
            desc="tokenize",
            disable=not (total and trainer.is_global_zero),
            mininterval=0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES,
        )

    def write_on_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        prediction: np.ndarray,
        batch_indices: Sequence[int] | None,
        batch: UnitBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep the batch's rows; commit the unit after its last batch."""
        assert self._progress is not None
        rows = self._rows.setdefault(batch.unit, [])
        for index, sample, codes in zip(batch.indices, batch.samples, prediction, strict=True):
            rows.append((index, TokenRow(sample.key, codes, sample.captions, sample.metadata, batch.unit)))
        finished = len(batch.samples)
        if batch.drops is not None:
            rows.sort(key=lambda row: row[0])
            write_shard(self.out, batch.unit, [row for _, row in rows], batch.drops)
            del self._rows[batch.unit]
            self.drops += batch.drops
            finished = batch.drops.total()
        self._progress.update(finished if self.by_picture else int(batch.drops is not None))

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Wait for all ranks, then merge."""
        assert self._progress is not None and isinstance(pl_module, TokenizeModule)
        self._progress.close()
        warn_of_drops(self.drops, f" on rank {trainer.global_rank}")
        trainer.strategy.barrier("tokenized")
        if trainer.is_global_zero:
            remove_abandoned(self.out)
            manifest = merge_manifest(self.out, [unit.name for unit in pl_module.source.units()])
            logger.info("%d rows in %s", manifest["rows"], self.out)
            if pl_module.committed_before:
                # A source is known by its settings: pictures or captions that changed since are not seen.
                logger.info(
                    "%d of %d units were there already; remove the directory to tokenize them anew",
                    pl_module.committed_before,
                    len(manifest["shards"]),
                )
        trainer.strategy.barrier("merged")


def tokenize(
    *,
    source: Source,
    visual_tokenizer: str | VisualTokenizer,
    out: str,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
) -> None:
    """Turn pictures into token shards; run again after a stop, it goes on where it was.

    Args:
        source: Pictures and captions: ScenesSource, ImageFolderSource, WebDatasetSource, or a class path.
        visual_tokenizer: Directory of the visual tokenizer.
        out: Directory for the token shards.
        height: Pixels; pictures are resized and cropped to it. Without it each keeps its own size.
        width: Pixels; like height.
        batch_size: Pictures encoded at once.
        num_workers: Loader processes on each rank that read and crop; 0 does it in the encoding process.
        accelerator: "cpu", "gpu" or "auto".
        devices: Processes on each machine.
        num_nodes: Machines.
        strategy: Lightning's strategy; "auto" takes "ddp" for several processes.

    Raises:
        ValueError: sizes that the tokenizer cannot encode, a codebook too large for uint16, or a directory that holds
            shards made with other settings.
    """
    tokenizer = load_visual_tokenizer(visual_tokenizer) if isinstance(visual_tokenizer, str) else visual_tokenizer
    size = _size(height, width, tokenizer.downsample)
    if tokenizer.codebook_size > MAX_CODEBOOK_SIZE:
        raise ValueError(f"{tokenizer.codebook_size} codes do not fit the {MAX_CODEBOOK_SIZE} of a token shard.")
    directory = Path(out)
    settings = {
        "visual_tokenizer": tokenizer.fingerprint,
        "codebook_size": tokenizer.codebook_size,
        "downsample": tokenizer.downsample,
        "height": height,
        "width": width,
        "source": source.describe(),
    }
    claim_directory(directory, settings)
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        callbacks=[ShardWriter(directory)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = TokenizeModule(source, tokenizer, directory, size, batch_size, num_workers)
    with warnings.catch_warnings():
        # Batches know their rows themselves, and processes take few units each.
        warnings.filterwarnings("ignore", "Couldn't infer the batch indices.*")
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        trainer.predict(module, return_predictions=False)


def _size(height: int | None, width: int | None, downsample: int) -> tuple[int, int] | None:
    if height is None or width is None:
        if height is not width:
            raise ValueError(f"height {height} and width {width}: give both, or neither.")
        return None
    if height % downsample or width % downsample:
        raise ValueError(
            f"{height} x {width} pixels are no multiples of the tokenizer's {downsample}: change height and width."
        )
    return height, width
