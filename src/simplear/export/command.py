"""`simplear export`: a checkpoint to publish, from a training state or from a checkpoint directory.

A state holds weights and no configuration. That, the text tokenizer and ``simplear.json`` come from a checkpoint
directory of the same model: the one that training keeps beside each state, or one that is named. The directory is
written under a temporary name and renamed when all of it is there; nothing in a state is run.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from simplear.artefacts import what_is
from simplear.atomic import require_writable, whole_directory
from simplear.errors import ExistingFileError, UserError
from simplear.evaluation import Cell, image_grid
from simplear.export.card import CARD_FILE, SAMPLES_FILE, CardContent, model_card, read_card_inputs
from simplear.generation import SimpleARPipeline
from simplear.language_model import (
    Adapter,
    Checkpoint,
    CheckpointError,
    add_adapter,
    checkpoint_hash,
    find_checkpoint,
    load_checkpoint,
    merged_model,
    trained_names,
    write_checkpoint,
)
from simplear.states import SHARDS_METADATA, damage, read_state
from simplear.text_files import FreeText
from simplear.visual_tokenizer import VisualTokenizer, load_visual_tokenizer, save_visual_tokenizer

MODULE = "language_model."
"""Where a stage keeps its language model."""
SHARD_SIZE = "5GB"
"""What hubs and slow connections take well."""
FROZEN_DTYPES = {"float32": None, "float64": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Of the weights beside an adapter, from those that are loaded, by the state's word."""
WEIGHTS_ALONE = (".safetensors", ".bin", ".gguf")
"""Suffixes of files that are never training states."""
SIZE = r"[1-9]\d*(KB|MB|GB)"


@dataclass
class _Source:
    checkpoint: Checkpoint
    origin: str
    """In words, for the card."""


def export(
    checkpoint: str,
    *,
    out: str,
    like: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    max_shard_size: str = SHARD_SIZE,
    visual_tokenizer: str | None = None,
    prompt: FreeText | list[FreeText] | None = None,
    report: str | None = None,
    runs: list[str] | None = None,
    data: list[str] | None = None,
    training_config: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write a directory that stock transformers and vLLM load as Qwen2, with a model card.

    Args:
        checkpoint: state of a language model's training (a .ckpt file, or a directory as FSDP2 writes it), or a
            checkpoint directory or hub id.
        out: directory to write; it must not exist.
        like: checkpoint directory of the same model, whose configuration, text tokenizer and settings a state goes
            with; if not given, the one beside the state (``last/`` for ``last.ckpt``). For the state of an adapter's
            training the checkpoint that it began from; if not given, where that was.
        dtype: of the weights; the source's if not given.
        max_shard_size: of a weights file, such as 5GB or 500MB.
        visual_tokenizer: directory or hub id of the one to put in; the checkpoint's own if not given.
        prompt: captions to draw, an image each, for the card's picture; none if not given.
        report: report.json of an evaluation, or its directory, for the card's table.
        runs: the report's runs to show, such as [sft]; all of them if not given.
        data: directories of token shards that the model was trained on, for the card.
        training_config: config.yaml of the training run, for the card.
        license: of the weights, by the name that the Hugging Face hub uses, such as apache-2.0.
        base_model: hub id of the model that training started from, for the card.

    Raises:
        ValueError: a state that is damaged, of another stage or of another model, a report, a configuration or a size
            that cannot be read, or a caption that cannot be drawn.
        CheckpointError: no checkpoint to take the configuration from, or one that is damaged.
        FileExistsError: there is something at ``out``.
        OSError: the disk takes no more.
    """
    directory = Path(out)
    if os.path.lexists(directory):
        raise ExistingFileError(f"{directory} is there already: name another directory (--out), or remove that one.")
    if not re.fullmatch(SIZE, max_shard_size):
        raise UserError(f"max_shard_size {max_shard_size!r} is not a size: give a number and KB, MB or GB, as in 5GB.")
    require_writable(directory.absolute().parent, "the checkpoint", "--out")
    inputs = read_card_inputs(report, runs, data or [], training_config)
    source = _source(checkpoint, like)
    loaded = source.checkpoint
    decoder = _visual_tokenizer(loaded, visual_tokenizer)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if prompts and decoder is None:
        raise UserError(
            "the checkpoint carries no visual tokenizer to draw the card's picture with: name one "
            "(--visual-tokenizer), or leave out --prompt."
        )
    # What would fail after minutes of writing.
    SimpleARPipeline(loaded.model, loaded.tokenizer, loaded.settings).check_prompts(prompts)
    if dtype is not None:
        loaded.model.to(getattr(torch, dtype))
    with whole_directory(directory) as unfinished:
        write_checkpoint(
            unfinished,
            loaded.model,
            loaded.tokenizer,
            loaded.settings,
            visual_tokenizer=None if decoder is None else partial(save_visual_tokenizer, decoder),
            max_shard_size=max_shard_size,
        )
        if prompts:
            _draw_samples(unfinished, prompts)
        content = CardContent(
            name=directory.name,
            checkpoint=loaded,
            checkpoint_hash=checkpoint_hash(unfinished),
            origin=source.origin,
            inputs=inputs,
            prompts=prompts,
            license=license,
            base_model=base_model,
        )
        (unfinished / CARD_FILE).write_text(model_card(content), encoding="utf-8")
    files = sorted(directory.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    without = "" if decoder else "; no visual tokenizer: name one to draw with (--visual-tokenizer)"
    print(f"{directory}: {len(files)} weights file{'s' * (len(files) > 1)}, {size / 2**20:,.1f} MiB{without}")


def _source(path: str, like: str | None) -> _Source:
    state = Path(path)
    if state.is_file() and state.suffix in WEIGHTS_ALONE:
        raise UserError(f"{path} is not a training state but {what_is(state)}.")
    if state.is_file() or (state / SHARDS_METADATA).is_file():
        return _from_state(state, like)
    if like is not None:
        raise UserError(f"{path} is not a training state, so it brings its own configuration: leave out --like.")
    return _Source(load_checkpoint(find_checkpoint(path)), f"the checkpoint `{state.absolute().name}`")


def _from_state(state: Path, like: str | None) -> _Source:
    if (reason := damage(state)) is not None:
        raise UserError(
            f"{state} is damaged or no training state ({reason}): fetch it again, or name another, such as "
            "previous.ckpt."
        )
    try:
        weights, rest = read_state(state, MODULE)
    except Exception as error:  # of torch, pickle and zipfile
        raise UserError(f"{state} is no training state whose weights can be read safely: {error}") from error
    if not weights:
        raise UserError(
            f"{state} holds no language model, so it is the state of another stage: a visual tokenizer's training "
            "writes its directory itself (export_dir)."
        )
    beside = state.with_suffix("") if state.suffix == ".ckpt" else None
    if beside is None or not (beside / "config.json").is_file():
        beside = None
    adapter = rest.get("adapter")
    if adapter is not None:
        loaded = _with_adapter(state, weights, adapter, like, beside)
    else:
        loaded = load_checkpoint(find_checkpoint(_configuration(state, like, beside)), with_weights=False)
        _require_same(state, loaded, loaded.model.state_dict(), weights)
        loaded.model.load_state_dict(weights, assign=True)
        loaded.model.decoder.tie_weights()
    if rest.get("grid") is not None:
        loaded.settings = dataclasses.replace(loaded.settings, grid=tuple(rest["grid"]))
    return _Source(loaded, f"the training state `{state.name}` after {_steps(rest)} optimizer steps")


def _configuration(state: Path, like: str | None, beside: Path | None) -> Path:
    if like is None and beside is None:
        kept = state.with_suffix("")
        expected = f" ({kept}, which training keeps beside it, is not there)" if state.suffix == ".ckpt" else ""
        raise CheckpointError(
            f"{state} has weights and no configuration{expected}: name a checkpoint directory of the same model "
            "(--like), such as the one that the training began from."
        )
    return Path(like) if like is not None else cast(Path, beside)


def _with_adapter(
    state: Path, weights: dict[str, Tensor], record: dict[str, Any], like: str | None, beside: Path | None
) -> Checkpoint:
    """The checkpoint that an adapter's training began from, with the state's weights merged into its own."""
    settings = dict(record)
    try:
        added_to, directory, dtype = (settings.pop(name) for name in ("added_to", "directory", "dtype"))
        adapter, frozen = Adapter(**settings), FROZEN_DTYPES[dtype]
    except (KeyError, TypeError) as error:
        raise UserError(f"{state} says of its adapter what this release does not know ({error}): upgrade.") from error
    try:
        start = find_checkpoint(like or directory)
    except CheckpointError as error:
        raise CheckpointError(f"{state} holds an adapter alone. {error} Name what it was added to (--like).") from error
    if checkpoint_hash(start) != added_to:
        raise UserError(
            f"{state} holds an adapter for another checkpoint than {start} is (SHA-256 {added_to[:12]}…): name the one "
            "that its training began from (--like)."
        )
    loaded = load_checkpoint(start, dtype=torch.float32)
    add_adapter(loaded.model, adapter, frozen)
    own = loaded.model.state_dict()
    _require_same(state, loaded, {name: own[name] for name in trained_names(loaded.model)}, weights)
    loaded.model.load_state_dict(weights, assign=True, strict=False)
    model = merged_model(loaded.model)
    # What training set, such as the grid and defaults of generation, is in the directory that it kept.
    loaded = loaded if beside is None else load_checkpoint(beside, with_weights=False)
    loaded.model = model
    return loaded


def _require_same(
    state: Path, checkpoint: Checkpoint, expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> None:
    shapes = {name: weight.shape for name, weight in expected.items()}
    wrong = sorted(
        name
        for name in shapes.keys() | weights.keys()
        if name not in weights or shapes.get(name) != weights[name].shape
    )
    if wrong:
        raise UserError(
            f"{state} and {checkpoint.directory} are of different models: {len(wrong)} weights are missing or of "
            f"another shape, the first is {wrong[0]}. Name another checkpoint directory (--like)."
        )


def _steps(rest: Mapping[str, Any]) -> str:
    return f"{rest['global_step']:,}" if "global_step" in rest else "an unknown number of"


def _visual_tokenizer(loaded: Checkpoint, named: str | None) -> VisualTokenizer | None:
    """The visual tokenizer to put in, None without; its fingerprint is in the settings then."""
    source = loaded.default_visual_tokenizer if named is None else named
    if source is None:
        return None
    try:
        tokenizer: VisualTokenizer = load_visual_tokenizer(source)
    except FileNotFoundError as error:
        raise CheckpointError(f"{error} Name it with --visual-tokenizer.") from error
    wanted = loaded.settings.visual_tokenizer_fingerprint
    if wanted not in (None, tokenizer.fingerprint):
        raise CheckpointError(
            f"the visual tokenizer {source} has fingerprint {tokenizer.fingerprint[:12]}…, but the checkpoint learned "
            f"the codes of {str(wanted)[:12]}…: name the one that belongs to it (--visual-tokenizer)."
        )
    loaded.settings = dataclasses.replace(loaded.settings, visual_tokenizer_fingerprint=tokenizer.fingerprint)
    return tokenizer


def _draw_samples(directory: Path, prompts: Sequence[str]) -> None:
    """Draw with what has been written, so that the picture is the published checkpoint's own."""
    drawn = SimpleARPipeline.from_pretrained(directory)(list(prompts), seed=0)
    assert isinstance(drawn.images, list)
    cells = [Cell(prompt, (image,)) for prompt, image in zip(prompts, drawn.images, strict=True)]
    size = max(128, *(min(256, max(image.size)) for image in drawn.images))
    image_grid({"": cells}, image_size=size).save(directory / SAMPLES_FILE)
