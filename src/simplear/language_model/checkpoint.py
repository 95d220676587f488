"""The checkpoint: a Hugging Face directory that stock transformers and vLLM load as plain Qwen2, plus ``simplear.json``.

    config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json
    simplear.json          where codes begin, the grid, RoPE kind, defaults of generation, which visual tokenizer
    visual_tokenizer/      the visual tokenizer itself, where there is one to carry

A directory released with the paper (architecture ``SimpARForCausalLM``, no ``simplear.json``) loads as it is: its
layout follows from its text tokenizer and vocabulary, its generation defaults are the release's.
Lightning's own .ckpt files are for resuming alone and are not read here.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2Config

from simplear.language_model.model import _CLASSES, LanguageModel, RopeKind, load_text_tokenizer
from simplear.sequence import MAX_TEXT_TOKENS, SPECIAL_TOKENS, token_layout

SETTINGS_FILE = "simplear.json"
VISUAL_TOKENIZER_FOLDER = "visual_tokenizer"
FORMAT_VERSION = 1
RELEASED_ARCHITECTURE = "SimpARForCausalLM"
RELEASED_DOWNSAMPLE = 16
RELEASED_PREFIX = "A highly realistic image of "
RELEASED_NEGATIVE_PROMPT = (
    "An image of aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, "
    "bad eyes, bad limbs, distortion"
)


class CheckpointError(ValueError):
    """A checkpoint directory that cannot be used; the message names file and remedy."""


@dataclass
class GenerationDefaults:
    """What the pipeline uses where its caller says nothing."""

    prompt_prefix: str = ""
    """Put before every prompt, never before a negative prompt."""
    negative_prompt: str = ""
    """Caption of the unconditional row; empty is what condition dropout trains."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none."""
    temperature: float = 1.0
    """Divides the guided log-probabilities; above 0."""
    top_k: int | None = None
    """Keep the k most probable codes; None keeps all."""
    top_p: float | None = None
    """Keep the smallest set of codes with at least this probability; None keeps all."""


@dataclass
class CheckpointSettings:
    """The content of ``simplear.json``."""

    image_token_offset: int
    codebook_size: int
    grid: tuple[int, int]
    """Rows and columns of codes that the model was last trained on."""
    downsample: int
    """Pixels a code, along each side."""
    rope: RopeKind = "1d"
    max_text_tokens: int = MAX_TEXT_TOKENS
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    visual_tokenizer: str | None = None
    """Path of the visual tokenizer, relative to the checkpoint if inside it; None: the user names one."""
    visual_tokenizer_fingerprint: str | None = None
    """SHA-256 of the visual tokenizer whose codes the model learned."""


@dataclass
class Checkpoint:
    """A loaded checkpoint."""

    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    settings: CheckpointSettings
    directory: Path

    @property
    def visual_tokenizer_path(self) -> Path | None:
        """Directory of the visual tokenizer that belongs to the checkpoint, None if it names none."""
        name = self.settings.visual_tokenizer
        return None if name is None else self.directory / name


def save_checkpoint(
    directory: str | Path,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: CheckpointSettings,
    *,
    state_dict: dict[str, Tensor] | None = None,
    visual_tokenizer: str | Path | None = None,
) -> None:
    """Write a checkpoint directory whole or not at all; an existing one is replaced once the new one is complete.

    Args:
        state_dict: gathered weights of ``model`` (the `LanguageModel`), for a sharded one; None takes the model's own.
        visual_tokenizer: directory to copy into the checkpoint.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    weights = model.state_dict() if state_dict is None else state_dict
    prefix = "decoder."
    model.decoder.save_pretrained(partial, state_dict={name.removeprefix(prefix): w for name, w in weights.items()})
    tokenizer.save_pretrained(partial)
    if visual_tokenizer is not None:
        shutil.copytree(visual_tokenizer, partial / VISUAL_TOKENIZER_FOLDER)
        settings = dataclasses.replace(settings, visual_tokenizer=VISUAL_TOKENIZER_FOLDER)
    content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(settings)}
    (partial / SETTINGS_FILE).write_text(json.dumps(content, indent=2) + "\n")
    replaced = directory.with_name(f".{directory.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        directory.rename(replaced)
    partial.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)


def load_checkpoint(path: str | Path, *, dtype: torch.dtype | None = None) -> Checkpoint:
    """Load a checkpoint directory or hub id, on CPU and in evaluation mode.

    Args:
        path: our layout or the paper's released one.
        dtype: of the weights; None keeps the file's.

    Raises:
        CheckpointError: missing or damaged files, or parts that do not fit together; the message says which.
    """
    directory = find_checkpoint(path)
    tokenizer = load_text_tokenizer(str(directory))
    content = _read_json(directory / "config.json")
    settings_file = directory / SETTINGS_FILE
    if settings_file.exists():
        settings = _settings(_read_json(settings_file), settings_file)
    elif RELEASED_ARCHITECTURE in content.get("architectures", []):
        settings = _released_settings(tokenizer, content)
    else:
        raise CheckpointError(
            f"{directory} has no {SETTINGS_FILE} and is not of the released architecture {RELEASED_ARCHITECTURE}: it "
            "is no text-to-image checkpoint. A plain language model is a start for pretraining "
            "(--model.init_args.language_model.pretrained)."
        )
    _mark_special(tokenizer)
    layout = token_layout(tokenizer, settings.codebook_size)
    if layout.image_token_offset != settings.image_token_offset:
        raise CheckpointError(
            f"{settings_file} says that codes begin at id {settings.image_token_offset}, but the text tokenizer beside "
            f"it has {layout.image_token_offset} ids: the files come from different checkpoints."
        )
    config_class, model_class = _CLASSES[settings.rope]
    known = {key: value for key, value in content.items() if key not in ("architectures", "model_type", "auto_map")}
    try:
        decoder = model_class.from_pretrained(directory, config=config_class(**known), dtype=dtype or "auto")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"cannot read the weights in {directory}: {error}. Export or download the checkpoint again."
        ) from error
    return Checkpoint(LanguageModel(decoder.eval(), layout), tokenizer, settings, directory)


def find_checkpoint(path: str | Path) -> Path:
    """The local directory of a checkpoint; a hub id is downloaded or taken from the cache.

    Raises CheckpointError where there is neither.
    """
    directory = Path(path)
    if directory.is_dir():
        if not (directory / "config.json").exists():
            raise CheckpointError(f"{directory} has no config.json: it is not a checkpoint directory.")
        return directory
    looks_like_hub_id = str(path).count("/") == 1 and not str(path).startswith((".", "/", "~"))
    if not looks_like_hub_id:
        raise CheckpointError(f"no checkpoint directory at {path}: train one, or give a hub id (owner/name).")
    try:
        return Path(snapshot_download(str(path)))
    except Exception as error:
        raise CheckpointError(
            f"{path} is neither a directory here nor to be had from the hub ({type(error).__name__})."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}. Export or download the checkpoint again.") from error


def _settings(content: dict[str, Any], source: Path) -> CheckpointSettings:
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{source} has format version {version}; this release reads {FORMAT_VERSION}: upgrade.")
    try:
        generation = GenerationDefaults(**content.pop("generation"))
        return CheckpointSettings(**{**content, "grid": tuple(content["grid"]), "generation": generation})
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{source} is incomplete or has an unknown key: {error}.") from error


def _released_settings(tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]) -> CheckpointSettings:
    """Settings of a directory released with the paper, which writes none. 64 × 64 codes are its 1024 px."""
    codebook_size = config["vocab_size"] - len(tokenizer)
    grid = (64, 64)
    positions = config.get("max_position_embeddings", Qwen2Config().max_position_embeddings)
    return CheckpointSettings(
        image_token_offset=len(tokenizer),
        codebook_size=codebook_size,
        grid=grid,
        downsample=RELEASED_DOWNSAMPLE,
        max_text_tokens=min(MAX_TEXT_TOKENS, positions - grid[0] * grid[1] - 2),
        generation=GenerationDefaults(
            prompt_prefix=RELEASED_PREFIX,
            negative_prompt=RELEASED_NEGATIVE_PROMPT,
            guidance_scale=6.0,
            top_k=min(64_000, codebook_size),
        ),
    )


def _mark_special(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the tokens that the tokenizer already holds treated as control tokens, so that captions cannot type them."""
    present = [token for token in SPECIAL_TOKENS if token in tokenizer.get_vocab()]
    tokenizer.add_tokens(present, special_tokens=True)
