"""Pictures to long and short captions by a vision-language model: ``simplear recaption``.

`units` divides the work and commits it; here a batch is described. Batches never reach over the end of a unit and
decoding is greedy, so a run that was killed, or ran on more processes, gives the same bytes. An answer that is not a
caption (empty, cut off, too long, broken) is never used: its reason is counted and stored in its row.
`RecaptionedSource` reads the result.
"""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from PIL import Image

from simplear.data.jobs.captioners import Answer, Captioner
from simplear.data.jobs.units import UnitBatch, UnitJob, run_units
from simplear.data.sample import Dropped, Sample
from simplear.data.shards import claim_directory
from simplear.data.sources.base import Source
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
class CaptionRequest:
    """What is asked for one kind of caption."""

    prompt: str
    tokens: int
    """An answer that has not ended by then is cut off."""
    characters: int
    """A longer answer is not used."""


def caption_of(answer: Answer, request: CaptionRequest) -> tuple[str | None, str | None]:
    """The caption of an answer, with single spaces, and None; or None and what is wrong with the answer."""
    text = " ".join(answer.text.split())
    if answer.refusal:
        return None, answer.refusal
    if not answer.finished:
        return None, f"cut off after {request.tokens} tokens"
    if not text:
        return None, "empty"
    if len(text) > request.characters:
        return None, f"longer than {request.characters} characters"
    if REPLACEMENT in text or any(unicodedata.category(character) in NO_TEXT for character in text):
        return None, "characters that are no text"
    return text, None


def shrunk(sample: Sample, max_pixels: int) -> Image.Image:
    """The sample's picture with at most `max_pixels` pixels, of the same aspect; smaller ones stay as they are.

    Raises `Drop` if it cannot be decoded.
    """
    picture = sample.image
    scale = (max_pixels / (picture.width * picture.height)) ** 0.5
    if scale >= 1:
        return picture
    size = max(1, int(picture.width * scale)), max(1, int(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


class RecaptionJob(UnitJob):
    """Asks the captioner for each kind of caption."""

    title = "recaption"

    def __init__(self, captioner: Captioner, out: Path, requests: Mapping[str, CaptionRequest]) -> None:
        self.captioner, self.out, self.requests = captioner, out, requests

    def load(self, device: torch.device) -> None:
        self.captioner.prepare(device)

    def compute(self, batch: UnitBatch) -> list[dict[str, Any]]:
        """A row of `simplear.data.sources.recaptioned.SCHEMA` for each picture."""
        rows: list[dict[str, Any]] = [
            {"key": sample.key, "captions": list(sample.captions)} for sample in batch.samples
        ]
        for kind, request in self.requests.items():
            answers = self.captioner.answer(batch.images, request.prompt, request.tokens)
            for row, answer in zip(rows, answers, strict=True):
                row[kind], row[f"{kind}_problem"] = caption_of(answer, request)
        return rows

    def commit(self, unit: str, rows: list[dict[str, Any]], dropped: list[Dropped], identity: str | None) -> None:
        write_captions(self.out, unit, rows, Counter(reason for _, reason in dropped), identity)


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
    """Write a long and a short caption of every picture. You can stop it at any time; run it again to resume.

    Args:
        source: Pictures and captions: ScenesSource, ImageFolderSource, WebDatasetSource, or a class path.
        captioner: TransformersCaptioner, ServerCaptioner, or a class path.
        out: Directory for the captions; RecaptionedSource reads it.
        long_prompt: What is asked for the long caption.
        short_prompt: What is asked for the short caption.
        long_tokens: A long answer that has not ended by then is cut off, and not used.
        short_tokens: Likewise for short ones.
        long_characters: A longer answer is not used.
        short_characters: Likewise for short ones.
        max_pixels: Larger pictures are shrunk before they are described.
        batch_size: Pictures described at once.
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
    requests = {
        "long": CaptionRequest(long_prompt, long_tokens, long_characters),
        "short": CaptionRequest(short_prompt, short_tokens, short_characters),
    }
    job, prepare = RecaptionJob(captioner, directory, requests), partial(shrunk, max_pixels=max_pixels)
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy)
    manifest = run_units(job, source, directory, prepare, batch_size, num_workers, fabric)
    if manifest is not None:
        problems = sum((Counter(unit["problems"]) for unit in manifest["shards"]), Counter[str]())
        for problem, count in sorted(problems.items()):
            logger.warning("%d of %d captions not usable: %s", count, manifest["rows"], problem)
        logger.info("captions of %d pictures in %s", manifest["rows"], directory)
