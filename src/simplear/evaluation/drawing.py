"""Images of a benchmark's prompts, in the folders that the benchmark wants.

An image follows from (seed, prompt, its number among the prompt's images), the checkpoint and the settings of
generation, which ``settings.json`` beside the images keeps. Drawing is prediction (`prediction.py`): on any number of
processes, and after a stop it goes on with the prompts that are not there.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
from PIL import Image

from simplear.atomic import claim_directory, require_writable, whole_directory, whole_file
from simplear.data.jobs.units import make_trainer
from simplear.errors import UserError
from simplear.evaluation.prediction import predict_prompts
from simplear.evaluation.scenes import image_seed
from simplear.generation import DrawingOptions, SimpleARPipeline
from simplear.language_model import checkpoint_hash, find_checkpoint, load_checkpoint
from simplear.visual_tokenizer import load_visual_tokenizer

SETTINGS_FILE = "settings.json"


class Layout(Protocol):
    """Where a benchmark wants the images of a prompt: in a directory of their own, or together in one file."""

    is_folder: bool
    """Whether it is a directory."""

    def name(self, number: int, row: Mapping[str, Any]) -> str:
        """Of the directory or file, below the benchmark's directory, for the prompt of this number and row."""

    def write(self, path: Path, row: Mapping[str, Any], images: Sequence[Image.Image]) -> None:
        """Fill the empty directory ``path``, or write the file, which gets its name (and suffix) only afterwards."""

    def is_whole(self, path: Path, samples: int) -> bool:
        """Whether all that belongs to a prompt of so many images is at ``path``."""


@dataclass(frozen=True)
class DrawnPrompts:
    """Images that are all there, and what they were drawn with."""

    rows: Sequence[dict[str, Any]]
    """The prompts, as given, those beyond the limit left out."""
    paths: list[Path]
    """Directory or file of each of them."""
    settings: dict[str, Any]
    """As in ``settings.json``: seed, samples, generation settings with the checkpoint's defaults filled in, engine, and
    the checkpoint's hash.
    """
    trainer: lightning.Trainer
    """For work on the images with the same processes; its ``is_global_zero`` says who writes the report."""


def draw_prompts(
    checkpoint: str,
    prompts: Sequence[dict[str, Any]],
    directory: Path,
    layout: Layout,
    *,
    samples: int = 4,
    limit: int | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    **drawing: Any,
) -> DrawnPrompts:
    """Draw what is not drawn yet; returns on each rank when all images are there.

    Args:
        checkpoint: directory or hub id of the checkpoint.
        prompts: rows with a "prompt", and whatever else the layout writes.
        directory: of the images; ``settings.json`` in it says what they are drawn with.
        layout: the benchmark's folders.
        samples: images of each prompt.
        limit: draw only the first so many prompts; without it, or with a larger one, the rest can be drawn later.
        seed: of the images; an image's own seed follows from this, its prompt and its number among the prompt's images,
            those of equal prompts further up counted.
        accelerator: "cpu", "gpu" or "auto".
        devices: processes on each machine.
        num_nodes: machines.
        strategy: Lightning's strategy; "auto" takes "ddp" for several processes.
        drawing: see `simplear.generation.DrawingOptions`; the batch size is that of each device.

    Raises:
        CheckpointError: missing or damaged files of the checkpoint.
        ValueError: the directory holds images of other settings, a prompt that cannot be drawn, or a number out of
            its range.
        OSError: the directory cannot be written.
    """
    options = DrawingOptions(**drawing)
    for name, value in (("samples", samples), ("limit", 1 if limit is None else limit)):
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1.")
    require_writable(directory, "images", "out")
    source = find_checkpoint(checkpoint)
    loaded = load_checkpoint(source, with_weights=False)
    fingerprint = loaded.settings.visual_tokenizer_fingerprint
    if options.visual_tokenizer is not None:
        fingerprint = load_visual_tokenizer(options.visual_tokenizer).fingerprint
    settings = {
        "checkpoint_sha256": checkpoint_hash(source),
        "visual_tokenizer": fingerprint,
        "prompts_sha256": hashlib.sha256(json.dumps(list(prompts), sort_keys=True).encode()).hexdigest(),
        "samples": samples,
        "seed": seed,
        **options.stated(loaded.settings),
    }
    rows = list(prompts)[:limit]
    # Before the directory is bound to settings with which nothing can be drawn.
    SimpleARPipeline(loaded.model, loaded.tokenizer, loaded.settings).check_prompts(
        [row["prompt"] for row in rows], options.prompt_prefix, options.height, options.width
    )
    claim_directory(directory / SETTINGS_FILE, settings)
    paths = [directory / layout.name(number, row) for number, row in enumerate(rows)]
    task = _Drawing(source, rows, paths, layout, samples, seed, options)
    trainer = make_trainer(accelerator, devices, num_nodes, strategy, inference_mode=False)
    predict_prompts(trainer, task, len(rows), max(1, options.batch_size // samples))
    return DrawnPrompts(rows, paths, settings, trainer)


class _Drawing:
    """The task: images of prompts, written in the layout."""

    title = "drawing"

    def __init__(
        self,
        checkpoint: Path,
        rows: Sequence[dict[str, Any]],
        paths: Sequence[Path],
        layout: Layout,
        samples: int,
        seed: int,
        options: DrawingOptions,
    ) -> None:
        self.checkpoint, self.rows, self.paths, self.layout = checkpoint, rows, paths, layout
        self.samples, self.seed, self.options = samples, seed, options
        self.pipeline: SimpleARPipeline | None = None
        counts: Counter[str] = Counter()
        self.earlier: list[int] = []
        """Rows of the same prompt before each row, so that equal prompts get different images."""
        for row in rows:
            self.earlier.append(counts[row["prompt"]])
            counts[row["prompt"]] += 1

    def setup(self, device: torch.device) -> None:
        """Load the checkpoint."""
        self.pipeline = self.options.pipeline(self.checkpoint, device)
        _ = self.pipeline.visual_tokenizer  # one that is missing is missed before the first image

    def is_finished(self, number: int) -> bool:
        """Whether all images of the prompt are there."""
        return self.layout.is_whole(self.paths[number], self.samples)

    def run(self, numbers: Sequence[int]) -> None:
        """Draw a batch of prompts. All of it: the shape of a batch is what a drawing in one go has."""
        assert self.pipeline is not None
        samples = self.samples
        asked = [
            (self.rows[number]["prompt"], self.earlier[number] * samples + sample)
            for number in numbers
            for sample in range(samples)
        ]
        images: Any = self.pipeline(
            [prompt for prompt, _ in asked],
            seed=[image_seed(self.seed, prompt, sample) for prompt, sample in asked],
            **self.options.arguments(),
        ).images
        for place, number in enumerate(numbers):
            if not self.is_finished(number):
                path = self.paths[number]
                whole: AbstractContextManager[Path]
                whole = whole_directory(path) if self.layout.is_folder else whole_file(path)
                with whole as partial:
                    self.layout.write(partial, self.rows[number], images[place * samples : (place + 1) * samples])
