"""`simplear export`: a checkpoint to publish, with a model card.

Training writes a checkpoint directory beside each of its states (`simplear.callbacks.HuggingFaceCheckpoint`), so a
state is exported from there. The directory is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from simplear.artefacts import STATE
from simplear.atomic import require_writable, whole_directory
from simplear.errors import ExistingFileError, MissingFileError, UserError
from simplear.evaluation import Cell, image_grid, read_report
from simplear.evaluation.report import REPORT_FILE
from simplear.export.card import CARD_FILE, SAMPLES_FILE, model_card
from simplear.generation import SimpleARPipeline
from simplear.language_model import checkpoint_hash, load_checkpoint, write_checkpoint
from simplear.text_files import FreeText
from simplear.visual_tokenizer import save_visual_tokenizer

SHARD_SIZE = "5GB"
"""Of a file of weights: hubs and slow connections handle it well."""


def export(
    checkpoint: str,
    *,
    out: str,
    dtype: Literal["float32", "bfloat16"] | None = None,
    visual_tokenizer: str | None = None,
    prompt: FreeText | list[FreeText] | None = None,
    report: str | None = None,
    runs: list[str] | None = None,
    license: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write a directory that stock transformers and vLLM load as Qwen2, with a model card.

    Args:
        checkpoint: checkpoint directory or hub id, or a training state (last.ckpt) with its directory (last/).
        out: directory to write; it must not exist.
        dtype: of the weights; the checkpoint's if not given.
        visual_tokenizer: directory or hub id of the one to include; the checkpoint's own if not given.
        prompt: captions to draw, one image each, for the card's picture; none if not given.
        report: report.json of an evaluation, or its directory, for the card's table.
        runs: the report's runs to show, such as [sft]; all of them if not given.
        license: of the weights, by the name that the Hugging Face hub uses, such as apache-2.0.
        base_model: hub id of the model that training started from, for the card.

    Raises:
        ValueError: an unreadable report, a caption that cannot be drawn, or a visual tokenizer of other codes.
        CheckpointError: the checkpoint is missing or damaged.
        FileExistsError: ``out`` exists.
        OSError: the disk is full.
    """
    directory = Path(out)
    if os.path.lexists(directory):
        raise ExistingFileError(f"{directory} exists already: name another directory (--out), or remove that one.")
    require_writable(directory.absolute().parent, "the checkpoint", "--out")
    numbers = None if report is None else _report(Path(report), runs)
    source = Path(checkpoint)
    if source.suffix == STATE and source.with_suffix("").is_dir():
        source = source.with_suffix("")
    loaded = load_checkpoint(source)
    if dtype is not None:
        loaded.model.to(getattr(torch, dtype))
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    decoder = visual_tokenizer or loaded.default_visual_tokenizer
    pipeline = SimpleARPipeline(loaded.model, loaded.tokenizer, loaded.settings, decoder)
    pipeline.check_prompts(prompts)
    if decoder is not None:
        fingerprint = pipeline.visual_tokenizer.fingerprint
        loaded.settings = dataclasses.replace(loaded.settings, visual_tokenizer_fingerprint=fingerprint)
    with whole_directory(directory) as unfinished:
        write_checkpoint(
            unfinished,
            loaded.model,
            loaded.tokenizer,
            loaded.settings,
            visual_tokenizer=partial(save_visual_tokenizer, pipeline.visual_tokenizer) if decoder else None,
            max_shard_size=SHARD_SIZE,
        )
        if prompts:
            _draw_samples(unfinished, prompts)
        card = model_card(
            loaded,
            name=directory.name,
            source=source.absolute().name,
            sha256=checkpoint_hash(unfinished),
            prompts=prompts,
            report=numbers,
            license=license,
            base_model=base_model,
        )
        (unfinished / CARD_FILE).write_text(card, encoding="utf-8")
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    without = "" if decoder else "; no visual tokenizer: name one to draw with (--visual-tokenizer)"
    print(f"{directory}: {size / 2**20:,.1f} MiB of weights{without}")


def _report(file: Path, runs: list[str] | None) -> dict[str, Any]:
    file = file / REPORT_FILE if file.is_dir() else file
    if not file.is_file():
        raise MissingFileError(f"no report at {file}: name the report.json of an evaluation (--report).")
    report = read_report(file)
    if missing := set(runs or ()) - report["runs"].keys():
        raise UserError(f"{file} has no run {min(missing)!r}; it has: {', '.join(report['runs'])}.")
    return {**report, "runs": {name: report["runs"][name] for name in runs or report["runs"]}}


def _draw_samples(directory: Path, prompts: Sequence[str]) -> None:
    """Draw with the exported files, so that the picture is what a user of the published checkpoint gets."""
    images = SimpleARPipeline.from_pretrained(directory)(prompts, seed=0).images
    cells = [Cell(prompt, (image,)) for prompt, image in zip(prompts, images or [], strict=True)]
    image_grid({"": cells}, image_size=256).save(directory / SAMPLES_FILE)
