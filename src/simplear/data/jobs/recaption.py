"""Pictures to long and short captions by a vision-language model, as a Lightning prediction: ``simplear recaption``.

As in `simplear.data.jobs.tokenize`, each rank takes its share of the units that are not finished, and a prediction
writer commits a unit when its last batch has come. Batches never reach over the end of a unit and decoding is greedy,
so a run that was killed, or ran on more processes, gives the same bytes. An answer that is no caption (empty, cut off,
too long, broken) is never used: its reason is counted and stands in its row. `RecaptionedSource` reads the result.
"""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from PIL import Image
from torch.utils.data import DataLoader

from simplear.data.jobs.captioners import Answer, Captioner
from simplear.data.jobs.units import (
    UnitBatch,
    UnitDataset,
    UnitEnd,
    UnitModule,
    UnitWriter,
    make_trainer,
    predict_units,
)
from simplear.data.sample import NO_PICTURE, Drop, Dropped, Sample
from simplear.data.shards import claim_directory
from simplear.data.sources.base import Source, Unit
from simplear.data.sources.recaptioned import FORMAT_VERSION, write_captions
from simplear.errors import UserError

logger = logging.getLogger(__name__)

LONG_PROMPT = (
    "Describe this picture in one paragraph for someone who has to draw it: every object with its colour, material, "
    "number and place, what the people or animals do, the background, the light and the style. Write only what can be "
    "seen."
)
SHORT_PROMPT = "Describe this picture in one short sentence. Write only what can be seen."
REPLACEMENT = "�"
"""What decoding puts for bytes that are no text."""
NO_TEXT = ("Cc", "Cs")
"""Unicode's categories of control characters and of halves of surrogate pairs, which no file can hold."""


@dataclass(frozen=True)
class Wanted:
    """One kind of caption."""

    prompt: str
    tokens: int
    """An answer that has not ended by then is cut off."""
    characters: int
    """Longer ones are no captions."""


def caption_of(answer: Answer, wanted: Wanted) -> tuple[str | None, str | None]:
    """The caption of an answer, with single spaces, and None; or None and what is wrong with the answer."""
    text = " ".join(answer.text.split())
    if answer.refusal:
        return None, answer.refusal
    if not answer.finished:
        return None, f"cut off after {wanted.tokens} tokens"
    if not text:
        return None, "empty"
    if len(text) > wanted.characters:
        return None, f"longer than {wanted.characters} characters"
    if REPLACEMENT in text or any(unicodedata.category(character) in NO_TEXT for character in text):
        return None, "characters that are no text"
    return text, None


class PictureBatches(UnitDataset):
    """Batches of pictures to look at."""

    def __init__(self, source: Source, units: Sequence[Unit], batch_size: int, max_pixels: int) -> None:
        super().__init__(units)
        self.source, self.batch_size, self.max_pixels = source, batch_size, max_pixels

    def batches(self, unit: Unit, dropped: list[Dropped]) -> Iterator[UnitBatch]:
        """Images are lists of Pillow's."""
        rows = list[tuple[int, Sample, Image.Image]]()
        for index, sample in enumerate(self.source.read(unit, dropped)):
            try:
                image = shrunk(sample.image, self.max_pixels)
            except Drop as reason:
                dropped.append((sample.key, str(reason)))
                continue
            rows.append((index, Sample(sample.key, NO_PICTURE, sample.captions), image))
            if len(rows) == self.batch_size:
                yield _batch(unit, rows)
                rows = []
        if rows:
            yield _batch(unit, rows)


def _batch(unit: Unit, rows: list[tuple[int, Sample, Image.Image]]) -> UnitBatch:
    indices, samples, images = zip(*rows, strict=True)
    return UnitBatch(unit.name, samples, list(images), indices)


def shrunk(image: Any, max_pixels: int) -> Image.Image:
    """The picture, with the same aspect and at most `max_pixels` pixels; smaller ones stay as they are."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    scale = (max_pixels / (picture.width * picture.height)) ** 0.5
    if scale >= 1:
        return picture
    size = max(1, int(picture.width * scale)), max(1, int(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


class RecaptionModule(UnitModule):
    """Asks the captioner."""

    def __init__(
        self,
        source: Source,
        captioner: Captioner,
        out: Path,
        wanted: Mapping[str, Wanted],
        batch_size: int,
        num_workers: int,
        max_pixels: int,
    ) -> None:
        super().__init__(source, out)
        self.captioner, self.wanted = captioner, wanted
        self.batch_size, self.num_workers, self.max_pixels = batch_size, num_workers, max_pixels

    def predict_dataloader(self) -> DataLoader[UnitBatch]:
        """Batches of this rank's units."""
        self.take_share()
        return self.loader(PictureBatches(self.source, self.units, self.batch_size, self.max_pixels), self.num_workers)

    def on_predict_start(self) -> None:
        """Load the model, if there is anything to do."""
        if self.units:
            self.captioner.prepare(self.device)

    def predict_step(self, batch: UnitBatch) -> list[dict[str, Any]]:
        """A row of `SCHEMA` for each picture."""
        rows = [{"key": sample.key, "captions": list(sample.captions)} for sample in batch.samples]
        for kind, wanted in self.wanted.items() if rows else ():
            answers = self.captioner.answer(batch.images, wanted.prompt, wanted.tokens)
            for row, answer in zip(rows, answers, strict=True):
                row[kind], row[f"{kind}_problem"] = caption_of(answer, wanted)  # type: ignore[assignment]
        return rows


class CaptionWriter(UnitWriter):
    """Gathers rows by unit, and commits a unit's table."""

    def __init__(self, out: Path) -> None:
        super().__init__(out, "recaption")
        self._rows: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def keep(self, batch: UnitBatch, prediction: list[dict[str, Any]]) -> None:
        """The rows; batches of a unit come in their order."""
        self._rows[batch.unit] += prediction

    def commit(self, unit: str, end: UnitEnd) -> None:
        """A table."""
        drops = Counter(reason for _, reason in end.dropped)
        write_captions(self.out, unit, self._rows.pop(unit, []), drops, end.identity)

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say what had to be asked again, then as all writers."""
        assert isinstance(pl_module, RecaptionModule)
        for reason, count in sorted(pl_module.captioner.retries.items()):
            logger.warning("%d requests tried again on rank %d: %s", count, trainer.global_rank, reason)
        super().on_predict_end(trainer, pl_module)

    def conclude(self, module: RecaptionModule, manifest: dict[str, Any]) -> None:
        """Count what is no caption."""
        problems: Counter[str] = Counter()
        for unit in manifest["shards"]:
            problems.update(unit["problems"])
        for problem, count in sorted(problems.items()):
            logger.warning("%d of %d captions not usable: %s", count, manifest["rows"], problem)
        logger.info("captions of %d pictures in %s", manifest["rows"], self.out)


def recaption(
    *,
    source: Source,
    captioner: Captioner,
    out: str,
    long_prompt: str = LONG_PROMPT,
    short_prompt: str = SHORT_PROMPT,
    long_tokens: int = 256,
    short_tokens: int = 64,
    long_characters: int = 2000,
    short_characters: int = 300,
    max_pixels: int = 1024 * 1024,
    batch_size: int = 8,
    num_workers: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
) -> None:
    """Write a long and a short caption of every picture; run again after a stop, it goes on where it was.

    Args:
        source: Pictures and captions: ScenesSource, ImageFolderSource, WebDatasetSource, or a class path.
        captioner: TransformersCaptioner, ServerCaptioner, or a class path.
        out: Directory for the captions; RecaptionedSource reads it.
        long_prompt: What is asked for the long caption.
        short_prompt: What is asked for the short caption.
        long_tokens: A long answer that has not ended by then is cut off, and no caption.
        short_tokens: Likewise for short ones.
        long_characters: A longer answer is no caption.
        short_characters: Likewise for short ones.
        max_pixels: Larger pictures are shrunk before they are looked at.
        batch_size: Pictures looked at at once.
        num_workers: Loader processes on each rank that read pictures; 0 reads in the same process.
        accelerator: "cpu", "gpu" or "auto".
        devices: Processes on each machine.
        num_nodes: Machines.
        strategy: Lightning's strategy; "auto" takes "ddp" for several processes.

    Raises:
        ValueError: numbers out of range, or a directory that holds captions made with other settings.
    """
    if min(long_tokens, short_tokens, long_characters, short_characters, max_pixels, batch_size) < 1:
        raise UserError("tokens, characters, max_pixels and batch_size are 1 or more.")
    directory = Path(out)
    settings = {
        "format_version": FORMAT_VERSION,
        "captioner": captioner.describe(),
        "long": {"prompt": long_prompt, "tokens": long_tokens, "characters": long_characters},
        "short": {"prompt": short_prompt, "tokens": short_tokens, "characters": short_characters},
        "max_pixels": max_pixels,
        "batch_size": batch_size,  # in reduced precision the batch may decide a word
        "source": source.describe(),
    }
    claim_directory(directory, settings)
    trainer = make_trainer(accelerator, devices, num_nodes, strategy, callbacks=[CaptionWriter(directory)])
    wanted = {
        "long": Wanted(long_prompt, long_tokens, long_characters),
        "short": Wanted(short_prompt, short_tokens, short_characters),
    }
    module = RecaptionModule(source, captioner, directory, wanted, batch_size, num_workers, max_pixels)
    predict_units(trainer, module)
