"""Drawing and judging the images of a benchmark, prompt by prompt, as a Lightning prediction.

Both are the same kind of work: a file or directory is made for each prompt, on the rank's own device, and appears
complete or not at all. What a batch holds depends on the list of prompts alone, and ranks share the batches of which
something is missing. So the results depend neither on the number of processes nor on stops in between, not even by the
rounding of another batch shape.

An image follows from (seed, prompt, its number among the prompt's images), the checkpoint and the settings of
generation, which ``settings.json`` beside the images records.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from simplear.atomic import claim_directory, require_writable, whole_directory, whole_file
from simplear.data.jobs.units import RanksTogether, make_trainer
from simplear.errors import UserError
from simplear.evaluation.scenes import image_seed
from simplear.generation import DrawingOptions, SimpleARPipeline
from simplear.language_model import checkpoint_hash, find_checkpoint, load_checkpoint
from simplear.progress import progress_bar
from simplear.text_files import read_objects
from simplear.visual_tokenizer import load_visual_tokenizer

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"

Row = Mapping[str, Any]
Make = Callable[[Sequence[int]], Sequence[Any]]
"""Makes the results of a batch of prompts, which are given by their numbers in the list of all prompts."""


@dataclass(frozen=True)
class DrawnPrompts:
    """Images that are all there, and what they were drawn with."""

    rows: Sequence[Row]
    """The prompts, as given, up to the limit."""
    paths: Sequence[Path]
    """Directory or file of each prompt."""
    settings: dict[str, Any]
    """As in ``settings.json``: seed, samples, generation settings with the checkpoint's defaults filled in, engine, and
    the checkpoint's hash.
    """
    trainer: lightning.Trainer
    """For work on the images with the same processes; its ``is_global_zero`` says who writes the report."""
    all_prompts: int
    """Number of prompts without the limit."""

    def report_settings(self, benchmark: str, **judging: Any) -> dict[str, Any]:
        """Settings of the run's report; a warning says if only some of the benchmark's prompts were drawn."""
        if len(self.rows) < self.all_prompts:
            logger.warning(
                "only the first %d of %d prompts: not a number of %s.", len(self.rows), self.all_prompts, benchmark
            )
        return {"benchmark": benchmark, **judging, **self.settings, "prompts": len(self.rows)}


def draw_prompts(
    checkpoint: str,
    prompts: Sequence[Row],
    directory: Path,
    names: Sequence[str],
    write: Callable[[Path, Row, Sequence[Image.Image]], None],
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
    """Draw the images that are missing; returns on each rank when all images are there.

    Args:
        checkpoint: directory or hub id of the checkpoint.
        prompts: rows with a "prompt", and whatever else `write` needs.
        directory: of the images; ``settings.json`` in it records what they are drawn with.
        names: of each prompt's file (with a suffix) or directory (without), below `directory`.
        write: writes a prompt's images as that file, or into that directory, whose path is a temporary one.
        samples: images of each prompt.
        limit: draw only the first so many prompts; the rest can be drawn later.
        seed: of the images; an image's own seed follows from this, its prompt and its number among the images of all
            equal prompts.
        accelerator: "cpu", "gpu" or "auto".
        devices: processes on each machine.
        num_nodes: machines.
        strategy: Lightning's strategy; "auto" takes "ddp" for several processes.
        drawing: see `simplear.generation.DrawingOptions`; the batch size is that of each device.

    Raises:
        CheckpointError: missing or damaged files of the checkpoint.
        ValueError: the directory holds images of other settings, a prompt cannot be drawn, or a number is out of its
            range.
        OSError: the directory cannot be written.
    """
    options = DrawingOptions(**drawing)
    if samples < 1 or (limit is not None and limit < 1):
        raise UserError(f"samples {samples} and limit {limit} must be at least 1.")
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
    paths = [directory / name for name in names[: len(rows)]]
    images: list[tuple[str, int]] = []
    """Prompt and seed of each image."""
    earlier: Counter[str] = Counter()
    for row in rows:
        for _ in range(samples):
            images.append((row["prompt"], image_seed(seed, row["prompt"], earlier[row["prompt"]])))
            earlier[row["prompt"]] += 1

    def load(device: torch.device) -> Make:
        pipeline = options.pipeline(source, device)
        _ = pipeline.visual_tokenizer  # raises before the first image if it is missing

        def draw(numbers: Sequence[int]) -> Sequence[Any]:
            batch = images[numbers[0] * samples : (numbers[-1] + 1) * samples]
            texts, seeds = map(list, zip(*batch, strict=True))
            drawn: Any = pipeline(texts, seed=seeds, **options.arguments()).images
            return [drawn[start : start + samples] for start in range(0, len(drawn), samples)]

        return draw

    trainer = make_trainer(accelerator, devices, num_nodes, strategy, inference_mode=False)
    module = PromptModule(
        "drawing", paths, max(1, options.batch_size // samples), load, lambda path, k, made: write(path, rows[k], made)
    )
    predict_prompts(trainer, module)
    return DrawnPrompts(rows, paths, settings, trainer, len(prompts))


def judge_prompts(
    drawn: DrawnPrompts, title: str, directory: Path, load: Callable[[torch.device], Callable[[int], Sequence[Row]]]
) -> list[dict[str, Any]] | None:
    """Judge the images that have no verdict yet, which are kept in a file of JSON lines for each prompt.

    Args:
        drawn: the images.
        title: of the progress bar.
        directory: of the verdicts.
        load: given the rank's device, loads the judge, which returns the rows of the prompt of a number.

    Returns:
        the rows of all prompts, on the first rank; None on the others.
    """
    paths = [directory / f"{path.stem}.jsonl" for path in drawn.paths]

    def write(path: Path, number: int, rows: Sequence[Row]) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load_judge(device: torch.device) -> Make:
        judge = load(device)
        return lambda numbers: [judge(number) for number in numbers]

    predict_prompts(drawn.trainer, PromptModule(title, paths, 1, load_judge, write))
    if not drawn.trainer.is_global_zero:
        return None
    return [row for path in paths for _, row in read_objects(path)]


def predict_prompts(trainer: lightning.Trainer, module: PromptModule) -> None:
    """Make what is missing for each prompt; returns on every rank when all ranks are done.

    Args:
        trainer: of `simplear.data.jobs.units.make_trainer`, without inference mode, since engines use no_grad by
            themselves and compile for it; it can be used several times.
        module: what to make.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", "predict returned None.*")
        trainer.predict(module, return_predictions=False)


class _Batches(IterableDataset[list[int]]):
    """Without a length: Lightning leaves out ranks whose length is 0, and the others would wait for them."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class PromptModule(lightning.LightningModule):
    """Makes a file or directory for each prompt.

    Args:
        title: of the progress bar.
        paths: of each prompt's file (with a suffix) or directory (without); the ones that exist are done.
        prompts_per_batch: prompts made at once.
        load: given the rank's device, loads what the work needs; called only on ranks with work left.
        write: given a temporary path, the prompt's number and the result.
    """

    def __init__(
        self,
        title: str,
        paths: Sequence[Path],
        prompts_per_batch: int,
        load: Callable[[torch.device], Make],
        write: Callable[[Path, int, Any], None],
    ) -> None:
        super().__init__()
        self.title, self.paths, self.prompts_per_batch = title, paths, prompts_per_batch
        self.load, self.write = load, write
        self.batches: list[list[int]] = []
        """This rank's share of the work."""

    def setup(self, stage: str) -> None:
        """Take this rank's share, and load. Lightning lets no rank continue before all have been here."""
        numbers, size = range(len(self.paths)), self.prompts_per_batch
        batches = [list(numbers[start : start + size]) for start in numbers[::size]]
        unfinished = [batch for batch in batches if not all(self.paths[number].exists() for number in batch)]
        self.batches = unfinished[self.trainer.global_rank :: self.trainer.world_size]
        if self.batches:
            self.make = self.load(self.trainer.strategy.root_device)

    def predict_dataloader(self) -> DataLoader[list[int]]:
        """This rank's batches."""
        return DataLoader(_Batches(self.batches), batch_size=None)

    def on_predict_start(self) -> None:
        """Open the progress bar, over the first rank's share."""
        self.ranks = RanksTogether()
        shown = bool(self.batches) and self.trainer.is_global_zero
        self.bar = progress_bar(sum(map(len, self.batches)), self.title, " prompts", shown=shown)

    def predict_step(self, batch: list[int]) -> None:
        """Make all of a batch, since its shape must be the same after a stop, and write what is missing."""
        for number, made in zip(batch, self.make(batch), strict=True):
            path = self.paths[number]
            if not path.exists():
                with whole_file(path) if path.suffix else whole_directory(path) as partial:
                    self.write(partial, number, made)
        self.bar.update(len(batch))

    def on_predict_end(self) -> None:
        """Wait for all ranks: what follows reads what each of them made."""
        self.bar.close()
        self.ranks.wait()
        self.ranks.close()
