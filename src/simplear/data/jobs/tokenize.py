"""Pictures to token shards: ``simplear tokenize``.

`units` divides the work and commits it; here a batch is encoded. Batches never reach over the end of a unit, so the
shards do not depend on how many processes made them or on how often they were killed.

From a command line, a source is a class and its arguments: ``--source ScenesSource --source.count 1000
--source.resolution 64``; one of your own is named by its full class path. Filters and a crop are given in the same way.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from lightning.fabric import Fabric
from torch import Tensor

from simplear.data.jobs.units import UnitBatch, UnitJob, run_units
from simplear.data.prepare.crops import CentreCrop, Crop
from simplear.data.prepare.filters import Filter, MinimumScore
from simplear.data.prepare.preparation import Preparation
from simplear.data.sample import Drop, Dropped
from simplear.data.shards import MAX_CODEBOOK_SIZE, TokenRow, claim_directory, write_shard
from simplear.data.shards.drops import merge_drops, write_unit_drops
from simplear.data.sources.base import Source
from simplear.errors import UserError
from simplear.visual_tokenizer import VisualTokenizer, load_visual_tokenizer

logger = logging.getLogger(__name__)


class TokenizeJob(UnitJob):
    """Encodes pictures, without those that have too low a score."""

    title = "tokenize"

    def __init__(
        self, visual_tokenizer: VisualTokenizer, out: Path, scores: list[MinimumScore], compile: bool = False
    ) -> None:
        self.visual_tokenizer, self.out, self.scores = visual_tokenizer, out, scores
        self.encode = torch.compile(visual_tokenizer.encode) if compile else visual_tokenizer.encode

    def load(self, device: torch.device) -> None:
        self.device = device
        for model in (self.visual_tokenizer, *(score.scorer for score in self.scores)):
            if hasattr(model, "to"):
                model.to(device)

    def compute(self, batch: UnitBatch) -> list[TokenRow | Drop]:
        """A row for each picture, or the reason of the first score that is too low."""
        reasons = [""] * len(batch.samples)
        images = batch.images.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        for score in self.scores:
            places = [place for place, reason in enumerate(reasons) if not reason]
            if places:
                keep = score.keep(images[places] / 255, [batch.samples[place] for place in places])
                for place in np.array(places)[~keep.cpu().numpy()]:
                    reasons[place] = score.reason
        places = [place for place, reason in enumerate(reasons) if not reason]
        codes = iter(self._encoded(images[places], [batch.samples[place].key for place in places]) if places else ())
        return [
            Drop(reason) if reason else TokenRow(sample.key, next(codes), sample.captions, sample.metadata, batch.unit)
            for sample, reason in zip(batch.samples, reasons, strict=True)
        ]

    def _encoded(self, images: Tensor, keys: list[str]) -> npt.NDArray[np.uint16]:
        """Codes (B, h, w) of pictures (B, 3, H, W) in [0, 255]."""
        codes = self.encode(images / 127.5 - 1)
        outside = ((codes < 0) | (codes >= self.visual_tokenizer.codebook_size)).flatten(1).any(1)
        if outside.any():
            raise UserError(
                f"the visual tokenizer gave codes in [{int(codes.min())}, {int(codes.max())}] but states a codebook of "
                f"{self.visual_tokenizer.codebook_size}; picture {keys[int(outside.nonzero()[0])]!r} is one."
            )
        return codes.cpu().numpy().astype(np.uint16)

    def commit(self, unit: str, rows: list[TokenRow], dropped: list[Dropped], identity: str | None) -> None:
        write_unit_drops(self.out, unit, dropped)
        write_shard(self.out, unit, rows, Counter(reason for _, reason in dropped), identity)


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
    """Turn pictures into token shards. You can stop it at any time; run it again to resume.

    Args:
        source: Pictures and captions: ScenesSource, ImageFolderSource, WebDatasetSource, HuggingFaceSource,
            or a class path.
        visual_tokenizer: Directory of the visual tokenizer.
        out: Directory for the token shards.
        height: Pixels; pictures are resized and cropped to it. Without it each keeps its own size.
        width: Pixels; like height.
        crop: CentreCrop (the default), AspectBuckets (grids near each picture's shape, of about
            height x width pixels), or a class path.
        filters: What to drop, in this order: ShortEdge, AspectRatio, PixelLimit, CaptionLength, Column, Listed,
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
    directory, filters = Path(out), filters or []
    settings = {
        "visual_tokenizer": tokenizer.fingerprint,
        "codebook_size": tokenizer.codebook_size,
        "downsample": tokenizer.downsample,
        "height": height,
        "width": width,
        "source": source.describe(),
    }
    # Defaults are not written, so that directories that were begun before there was a choice can be resumed.
    if crop is not None and not isinstance(crop, CentreCrop):
        settings["crop"] = crop.describe()
    if filters:
        settings["filters"] = [filter_.describe() for filter_ in filters]
    if bf16 or compile:
        settings["encoder"] = {"bf16": bf16, "compile": compile}
    claim_directory(directory, settings)
    scores = [filter_ for filter_ in filters if isinstance(filter_, MinimumScore)]
    job = TokenizeJob(tokenizer, directory, scores, compile)
    preparation = Preparation(size, tokenizer.downsample, crop or CentreCrop(), tuple(filters))
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision="bf16-mixed" if bf16 else "32-true",
    )
    manifest = run_units(job, source, directory, preparation, batch_size, num_workers, fabric)
    if manifest is not None:
        logger.info("%d rows in %s", manifest["rows"], directory)
        if any(shard["drops"] for shard in manifest["shards"]):
            units = [Path(shard["file"]).stem for shard in manifest["shards"]]
            logger.info("dropped pictures, by key: %s", merge_drops(directory, units))


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
