"""Pictures to token shards, as a Lightning prediction: ``simplear tokenize``.

Each rank takes its share of the units that have no committed shard yet; a prediction writer gathers the codes of a
unit and commits it. Batches never reach over the end of a unit, so the shards do not depend on how many processes
made them or on how often they were killed. When all units are committed, rank 0 merges the manifest, the list of what
was left out and its picture.

From a command line, a source is a class and its arguments: ``--source ScenesSource --source.count 1000
--source.resolution 64``; one of your own is named by its full class path. Filters and a crop are too.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from simplear.data.jobs.units import (
    UnitBatch,
    UnitDataset,
    UnitEnd,
    UnitModule,
    UnitWriter,
    make_trainer,
    predict_units,
)
from simplear.data.prepare.crops import CentreCrop, Crop
from simplear.data.prepare.filters import Filter, MinimumScore
from simplear.data.prepare.preparation import Preparation
from simplear.data.sample import NO_PICTURE, Drop, Dropped, Pixels, Sample
from simplear.data.shards import MAX_CODEBOOK_SIZE, TokenRow, claim_directory, write_shard
from simplear.data.shards.drops import draw_funnel, merge_drops, write_unit_drops
from simplear.data.sources.base import Source, Unit
from simplear.errors import UserError
from simplear.visual_tokenizer import VisualTokenizer, load_visual_tokenizer

logger = logging.getLogger(__name__)


class EncoderBatches(UnitDataset):
    """Pictures of one size each batch."""

    def __init__(self, source: Source, units: Sequence[Unit], batch_size: int, preparation: Preparation) -> None:
        super().__init__(units)
        self.source, self.batch_size, self.preparation = source, batch_size, preparation

    def batches(self, unit: Unit, dropped: list[Dropped]) -> Iterator[UnitBatch]:
        """Images are tensors (B, H, W, 3) uint8."""
        seen = set[str]()
        # Pictures that keep their own size, or get the grid nearest their shape, are gathered by size.
        pending: dict[tuple[int, ...], list[tuple[int, Sample, Pixels]]] = {}
        for index, sample in enumerate(self.source.read(unit, dropped)):
            try:
                if sample.key in seen:
                    raise Drop("duplicate key")
                seen.add(sample.key)
                prepared = self.preparation(sample)
            except Drop as reason:
                dropped.append((sample.key, str(reason)))
                continue
            same_size = pending.setdefault(prepared.shape, [])
            same_size.append((index, replace(sample, picture=NO_PICTURE), prepared))
            if len(same_size) == self.batch_size:
                yield _batch(unit, pending.pop(prepared.shape))
        for rows in pending.values():
            yield _batch(unit, rows)


def _batch(unit: Unit, rows: list[tuple[int, Sample, Pixels]]) -> UnitBatch:
    indices, samples, images = zip(*rows, strict=True)
    return UnitBatch(unit.name, samples, torch.from_numpy(np.stack(images)), indices)


@dataclass(frozen=True)
class Encoded:
    """Codes of a batch, and which of its pictures a score has left out."""

    codes: npt.NDArray[np.uint16]
    """(K, h, w) of the pictures kept, in their order."""
    dropped: list[str | None]
    """For each picture of the batch the reason to drop it; None for the kept ones."""


class TokenizeModule(UnitModule):
    """Encodes pictures."""

    def __init__(
        self,
        source: Source,
        visual_tokenizer: VisualTokenizer,
        out: Path,
        preparation: Preparation,
        batch_size: int,
        num_workers: int,
        compile: bool = False,
    ) -> None:
        super().__init__(source, out)
        self.visual_tokenizer = visual_tokenizer
        self.preparation, self.batch_size, self.num_workers = preparation, batch_size, num_workers
        self.encode = torch.compile(visual_tokenizer.encode) if compile else visual_tokenizer.encode
        self.scores = [filter_ for filter_ in preparation.filters if isinstance(filter_, MinimumScore)]

    def on_predict_start(self) -> None:
        """Rewards that have weights read them now."""
        for score in self.scores:
            if hasattr(score.scorer, "to"):
                score.scorer.to(self.device)

    def predict_dataloader(self) -> DataLoader[UnitBatch]:
        """Batches of this rank's units."""
        self.take_share()
        batches = EncoderBatches(self.source, self.units, self.batch_size, self.preparation)
        return self.loader(batches, self.num_workers)

    def predict_step(self, batch: UnitBatch) -> Encoded:
        """Codes of the batch's pictures, scored first where a filter asks for it."""
        if not batch.samples:
            return Encoded(np.empty((0, 0, 0), np.uint16), [])
        pixels = batch.images.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        pixels, dropped = self._scored(pixels, batch.samples)
        if not len(pixels):
            return Encoded(np.empty((0, 0, 0), np.uint16), dropped)
        codes = self.encode(pixels / 127.5 - 1)
        outside = ((codes < 0) | (codes >= self.visual_tokenizer.codebook_size)).flatten(1).any(1)
        if outside.any():
            kept = [sample for sample, reason in zip(batch.samples, dropped, strict=True) if reason is None]
            first = kept[int(outside.nonzero()[0])]
            raise UserError(
                f"the visual tokenizer gave codes in [{int(codes.min())}, {int(codes.max())}] but states a codebook of "
                f"{self.visual_tokenizer.codebook_size}; picture {first.key!r} of {batch.unit} is one."
            )
        return Encoded(codes.cpu().numpy().astype(np.uint16), dropped)

    def _scored(self, pixels: Tensor, samples: Sequence[Sample]) -> tuple[Tensor, list[str | None]]:
        """The pictures (K, 3, H, W) in [0, 255] that every score keeps, and for each of the batch why it is not."""
        dropped: list[str | None] = [None] * len(samples)
        for score in self.scores:
            places = [place for place, reason in enumerate(dropped) if reason is None]
            if not places:
                break
            keep = score.keep(pixels / 255, [samples[place] for place in places])
            for place, kept in zip(places, keep.tolist(), strict=True):
                dropped[place] = None if kept else score.reason
            pixels = pixels[keep]
        return pixels, dropped


class ShardWriter(UnitWriter):
    """Gathers codes by unit, and commits a unit's shard."""

    def __init__(self, out: Path) -> None:
        super().__init__(out, "tokenize")
        self._rows: dict[str, list[tuple[int, TokenRow]]] = {}
        self._scored: dict[str, list[tuple[int, Dropped]]] = {}
        self._pictures = 0
        self._began = time.monotonic()

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to count."""
        super().on_predict_start(trainer, pl_module)
        self._began = time.monotonic()

    def keep(self, batch: UnitBatch, prediction: Encoded) -> None:
        """Rows, and what a score left out, with their places in the unit."""
        rows, scored = self._rows.setdefault(batch.unit, []), self._scored.setdefault(batch.unit, [])
        codes = iter(prediction.codes)
        for index, sample, reason in zip(batch.indices, batch.samples, prediction.dropped, strict=True):
            if reason is None:
                row = TokenRow(sample.key, next(codes), sample.captions, sample.metadata, batch.unit)
                rows.append((index, row))
            else:
                scored.append((index, (sample.key, reason)))

    def commit(self, unit: str, end: UnitEnd) -> None:
        """A shard, and before it the list of what was dropped."""
        # Batches of several sizes overlap, so rows and scores come in another order than the source's.
        rows = [row for _, row in sorted(self._rows.pop(unit, []), key=lambda placed: placed[0])]
        scored = [entry for _, entry in sorted(self._scored.pop(unit, []), key=lambda placed: placed[0])]
        counts = Counter(reason for _, reason in scored)
        write_unit_drops(self.out, unit, [*end.dropped, *scored])
        write_shard(self.out, unit, rows, counts + Counter(reason for _, reason in end.dropped), identity=end.identity)
        self.drops += counts

    def advance(self, pictures: int, unit_is_done: bool) -> None:
        """Also show the rate, where the bar does not count pictures itself."""
        assert self._progress is not None
        self._pictures += pictures
        rate = self._pictures / max(time.monotonic() - self._began, 1e-9)
        if not self.by_picture:
            self._progress.set_postfix_str(f"{rate:.3g} pictures/s", refresh=False)
        super().advance(pictures, unit_is_done)

    def conclude(self, module: TokenizeModule, manifest: dict[str, Any]) -> None:
        """Say how many rows there are, and what was dropped."""
        logger.info("%d rows in %s", manifest["rows"], self.out)
        if any(shard["drops"] for shard in manifest["shards"]):
            listed = merge_drops(self.out, manifest["shards"])
            picture = draw_funnel(self.out, manifest, [])
            logger.info("what was dropped, by key: %s; by reason: %s", listed, picture)
        if module.committed_before:
            # A source is known by its settings: pictures or captions that changed since are not seen.
            logger.info(
                "%d of %d units were there already; remove the directory to tokenize them anew",
                module.committed_before,
                len(manifest["shards"]),
            )


def tokenize(
    *,
    source: Source,
    visual_tokenizer: str | VisualTokenizer,
    out: str,
    height: int | None = None,
    width: int | None = None,
    crop: Crop | None = None,
    filters: list[Filter] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    bf16: bool = False,
    compile: bool = False,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
) -> None:
    """Turn pictures into token shards; run again after a stop, it goes on where it was.

    Args:
        source: Pictures and captions: ScenesSource, ImageFolderSource, WebDatasetSource, HuggingFaceSource, or
            a class path.
        visual_tokenizer: Directory of the visual tokenizer.
        out: Directory for the token shards.
        height: Pixels; pictures are resized and cropped to it. Without it each keeps its own size.
        width: Pixels; like height.
        crop: CentreCrop (the default), AspectBuckets (grids near each picture's shape, of about
            height x width pixels), or a class path.
        filters: What to leave out, in this order: ShortEdge, AspectRatio, PixelLimit, CaptionLength, Column, Listed,
            MinimumScore, or class paths. Drops are counted by reason and listed in drops.parquet.
        batch_size: Pictures encoded at once.
        num_workers: Loader processes on each rank that read, filter, decode and crop; 0: the encoding process does.
        bf16: Encode in mixed bfloat16. Some codes differ from those of full precision.
        compile: Encode with torch.compile; takes minutes at first.
        accelerator: "cpu", "gpu" or "auto".
        devices: Processes on each machine.
        num_nodes: Machines.
        strategy: Lightning's strategy; "auto" takes "ddp" for several processes.

    Raises:
        ValueError: sizes that the tokenizer cannot encode, a codebook too large for uint16, a crop without a size,
            codes outside the codebook, or a directory that holds shards made with other settings.
        ChildProcessError: a loader process was killed.
    """
    tokenizer = load_visual_tokenizer(visual_tokenizer) if isinstance(visual_tokenizer, str) else visual_tokenizer
    size = _size(height, width, tokenizer.downsample)
    if size is None and crop is not None:
        raise UserError(f"a {type(crop).__name__} needs height and width to crop to.")
    if tokenizer.codebook_size > MAX_CODEBOOK_SIZE:
        raise UserError(f"{tokenizer.codebook_size} codes do not fit the {MAX_CODEBOOK_SIZE} of a token shard.")
    directory = Path(out)
    settings = {
        "visual_tokenizer": tokenizer.fingerprint,
        "codebook_size": tokenizer.codebook_size,
        "downsample": tokenizer.downsample,
        "height": height,
        "width": width,
        "source": source.describe(),
    }
    # What is left at its default is not written, so that directories begun before there was a choice go on.
    if crop is not None and not isinstance(crop, CentreCrop):
        settings["crop"] = crop.describe()
    if filters:
        settings["filters"] = [filter_.describe() for filter_ in filters]
    if bf16 or compile:
        settings["encoder"] = {"bf16": bf16, "compile": compile}
    claim_directory(directory, settings)
    precision = "bf16-mixed" if bf16 else "32-true"
    writer = ShardWriter(directory)
    trainer = make_trainer(accelerator, devices, num_nodes, strategy, callbacks=[writer], precision=precision)
    preparation = Preparation(size, tokenizer.downsample, crop or CentreCrop(), tuple(filters or ()))
    module = TokenizeModule(source, tokenizer, directory, preparation, batch_size, num_workers, compile)
    try:
        predict_units(trainer, module)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(
            f"a loader process was killed ({str(error).splitlines()[0]}): often memory has run out. Take fewer "
            "num_workers or a smaller batch_size, or leave out huge pictures by PixelLimit, and run it again: "
            f"{directory} goes on where it stopped."
        ) from error


def _size(height: int | None, width: int | None, downsample: int) -> tuple[int, int] | None:
    if height is None or width is None:
        if height is not width:
            raise UserError(f"height {height} and width {width}: give both, or neither.")
        return None
    if height % downsample or width % downsample:
        raise UserError(
            f"{height} x {width} pixels are no multiples of the tokenizer's {downsample}: change height and width."
        )
    return height, width
