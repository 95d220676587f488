"""The checkpoint: a Hugging Face directory, to stock transformers and vLLM a plain Qwen2, plus ``simplear.json``.

    config.json  generation_config.json  tokenizer.json  tokenizer_config.json
    model.safetensors      or model-00001-of-….safetensors and model.safetensors.index.json, which says what is where
    simplear.json          where codes begin, the grid, RoPE kind, defaults of generation, which visual tokenizer
    visual_tokenizer/      the visual tokenizer itself, where there is one to carry

A directory released with the paper (architecture ``SimpARForCausalLM``, no ``simplear.json``) loads as it is: its
layout follows from its text tokenizer and vocabulary, its generation defaults are the release's.
Lightning's own .ckpt files are for resuming alone and are not read here.

A directory may come from anywhere, and nothing in it is run: weights are safetensors, and of config.json the keys that
name code elsewhere are dropped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from simplear.artefacts import is_visual_tokenizer, what_is
from simplear.atomic import whole_directory
from simplear.errors import UserError
from simplear.hashing import sha256_of_all
from simplear.hub import is_hub_id, missing_on_hub
from simplear.language_model.model import (
    _CLASSES,
    LanguageModel,
    RopeKind,
    load_decoder,
    load_text_tokenizer,
)
from simplear.sequence import MAX_TEXT_TOKENS, SPECIAL_TOKENS, token_layout
from simplear.text_files import read_object

logger = logging.getLogger(__name__)

SETTINGS_FILE = "simplear.json"
VISUAL_TOKENIZER_FOLDER = "visual_tokenizer"
FORMAT_VERSION = 1
MAX_SHARD_SIZE = "50GB"
"""Of a weights file, where nothing else is asked for: transformers' own."""
RELEASED_ARCHITECTURE = "SimpARForCausalLM"
RELEASED_DOWNSAMPLE = 16
RELEASED_VISUAL_TOKENIZER = "nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"
"""As the release's own instructions name it on the hub; its directories carry none."""
RELEASED_CODEBOOK = 64_000
"""That of its visual tokenizer."""
RELEASED_GRID = (64, 64)
"""1024 px. With fewer positions than that needs, a model still draws the smaller grids that it is asked for."""
RELEASED_PREFIX = "A highly realistic image of "
RELEASED_NEGATIVE_PROMPT = (
    "An image of aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, "
    "bad eyes, bad limbs, distortion"
)


PADDED_TO = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Multiples of rows to which other programs pad embeddings (``resize_token_embeddings(pad_to_multiple_of=…)``)."""
NOT_READ = ("architectures", "model_type", "auto_map", "attn_implementation", "_attn_implementation")
"""Keys of config.json: the class is this project's, and the name of an attention kernel can be that of a repository
whose code transformers would fetch."""


class CheckpointError(UserError):
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

    @property
    def default_visual_tokenizer(self) -> str | Path | None:
        """What decodes the checkpoint's codes where nobody names another: its own; for released directories Cosmos."""
        released = not (self.directory / SETTINGS_FILE).exists()
        return RELEASED_VISUAL_TOKENIZER if released else self.visual_tokenizer_path


def save_checkpoint(
    directory: str | Path,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: CheckpointSettings,
    **options: Any,
) -> None:
    """Write a checkpoint directory whole or not at all; an existing one is replaced once the new one is complete.

    Args:
        options: of `write_checkpoint`.

    Raises OSError, naming the directory, when the disk takes no more.
    """
    with whole_directory(directory) as partial:
        write_checkpoint(partial, model, tokenizer, settings, **options)


def write_checkpoint(
    directory: Path,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: CheckpointSettings,
    *,
    state_dict: dict[str, Tensor] | None = None,
    visual_tokenizer: str | Path | Callable[[Path], None] | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Fill an empty directory, for whoever puts more into it before it gets its name; else as `save_checkpoint`.

    Args:
        state_dict: gathered weights of ``model`` (the `LanguageModel`), for a sharded one; None takes the model's own.
        visual_tokenizer: directory to copy into the checkpoint, or a function that makes one of the path it is given.
        max_shard_size: of a weights file, as "5GB"; more weights than that are several files and an index.
    """
    weights = model.state_dict() if state_dict is None else state_dict
    prefix = "decoder."
    model.decoder.save_pretrained(
        directory,
        state_dict={name.removeprefix(prefix): weight for name, weight in weights.items()},
        max_shard_size=max_shard_size,
    )
    tokenizer.save_pretrained(directory)
    if visual_tokenizer is not None:
        if callable(visual_tokenizer):
            visual_tokenizer(directory / VISUAL_TOKENIZER_FOLDER)
        else:
            shutil.copytree(visual_tokenizer, directory / VISUAL_TOKENIZER_FOLDER)
        settings = dataclasses.replace(settings, visual_tokenizer=VISUAL_TOKENIZER_FOLDER)
    content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(settings)}
    (directory / SETTINGS_FILE).write_text(json.dumps(content, indent=2) + "\n")


def load_checkpoint(path: str | Path, *, dtype: torch.dtype | None = None, with_weights: bool = True) -> Checkpoint:
    """Load a checkpoint directory or hub id, on CPU and in evaluation mode.

    Args:
        path: our layout or the paper's released one.
        dtype: of the weights; None keeps the file's.
        with_weights: False leaves the model on the meta device, for callers that fill it otherwise.

    Raises:
        CheckpointError: missing or damaged files, or parts that do not fit together; the message says which.
    """
    directory = find_checkpoint(path)
    with _reading(str(directory / "config.json")):
        content = read_object(directory / "config.json")
    _require_readable(directory, content)
    tokenizer = _read_tokenizer(directory)
    settings = _read_settings(directory, tokenizer, content)
    layout = token_layout(tokenizer, settings.codebook_size)
    rows: Any = content.get("vocab_size")
    if rows != layout.vocab_size and not _is_padded(rows, layout.vocab_size):
        raise CheckpointError(
            f"{directory / SETTINGS_FILE} says {layout.image_token_offset} text ids and {layout.codebook_size} codes, "
            f"but config.json a vocabulary of {rows}: the files come from different checkpoints."
        )
    config_class, model_class = _CLASSES[settings.rope]
    fields = {key: value for key, value in content.items() if key not in NOT_READ}
    with _reading(f"the weights (model.safetensors or its parts, config.json) in {directory}"):
        if with_weights:
            decoder = load_decoder(model_class, directory, config_class(**fields), dtype or "auto")
            if rows != layout.vocab_size:
                logger.info("%s: %d padding rows of the vocabulary left out", directory, rows - layout.vocab_size)
                decoder.resize_token_embeddings(layout.vocab_size, mean_resizing=False)
        else:
            config = config_class(**{**fields, "vocab_size": layout.vocab_size})
            with torch.device("meta"):
                decoder = model_class(config).type(dtype or config.dtype or torch.float32)
            if (directory / "generation_config.json").is_file():
                decoder.generation_config = GenerationConfig.from_pretrained(str(directory))
    return Checkpoint(LanguageModel(decoder, layout).eval(), tokenizer, settings, directory)


@contextmanager
def _reading(files: str) -> Iterator[None]:
    """Inside, any error means that the files are damaged: the libraries raise a dozen kinds."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"cannot read {files}: {error} Export or download the checkpoint again.") from error


def _is_padded(rows: Any, used: int) -> bool:
    """Whether embeddings of so many rows are those that are used, padded to a multiple."""
    return any(rows == -(-used // multiple) * multiple for multiple in PADDED_TO)


def _require_readable(directory: Path, config: dict[str, Any]) -> None:
    if is_visual_tokenizer(directory):
        raise CheckpointError(f"{directory} is not a checkpoint directory; it is {what_is(directory)}.")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{directory} is quantized (quantization_config in config.json), which this project does not read: take "
            "the checkpoint that it was made from."
        )
    if not any(directory.glob("*.safetensors")):
        raise CheckpointError(
            f"{directory} has no weights (model.safetensors or its parts): export or download it again. Pickles (*.bin "
            "and *.pt) are not read, since they can run code. Convert one that you trust: from transformers "
            "import AutoModelForCausalLM as Model; "
            f'Model.from_pretrained("{directory}").save_pretrained("{directory}")'
        )


def find_checkpoint(path: str | Path) -> Path:
    """The local directory of a checkpoint; a hub id is downloaded or taken from the cache.

    Raises CheckpointError where there is neither.
    """
    directory = Path(path)
    if (directory / "config.json").exists():
        return directory
    if directory.exists():
        raise CheckpointError(f"{path} is not a checkpoint directory but {what_is(directory)} (no config.json).")
    if not is_hub_id(path):
        raise CheckpointError(
            f"no checkpoint at {path}: there is no directory {directory.absolute()}. Train one (the demo's: make "
            "pretrain, make train-sft), or give a hub id."
        )
    try:
        return Path(snapshot_download(str(path)))
    except Exception as error:
        raise CheckpointError(f"no checkpoint at {path}: {missing_on_hub(path, error)}.") from error


def checkpoint_hash(directory: str | Path) -> str:
    """SHA-256, in hexadecimal, of what a checkpoint draws with: its weights file or files and ``simplear.json``.

    It is what ``LC_ALL=C sha256sum *.safetensors simplear.json | sha256sum`` prints in the directory (without
    ``simplear.json`` in one released with the paper). Reads all weights: a second or so a gigabyte.

    Raises CheckpointError where there are no weights.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} has no *.safetensors: it is not a checkpoint directory, or has no weights.")
    return sha256_of_all(file for file in (*files, Path(directory) / SETTINGS_FILE) if file.exists())


def _read_settings(directory: Path, tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]) -> CheckpointSettings:
    """``simplear.json``, or what the release implies; checked against the text tokenizer and config.json."""
    file = directory / SETTINGS_FILE
    if not file.exists():
        if RELEASED_ARCHITECTURE in config.get("architectures", []):
            return _released_settings(tokenizer, config)
        raise CheckpointError(
            f"{directory} has no {SETTINGS_FILE} and is not of the released architecture {RELEASED_ARCHITECTURE}, so "
            f"it is not a text-to-image checkpoint. If another program saved one, copy {SETTINGS_FILE} and "
            f"{VISUAL_TOKENIZER_FOLDER}/ from the original. A plain language model is a start for pretraining "
            "(--model.init_args.language_model.pretrained)."
        )
    with _reading(str(file)):
        content = read_object(file)
    settings = _parse_settings(content, file)
    if config.get("model_type") != _CLASSES[settings.rope][0].model_type:
        raise CheckpointError(
            f"{file} says {settings.rope} RoPE, but config.json has model type {config.get('model_type')}: the files "
            "come from different checkpoints."
        )
    if len(tokenizer) != settings.image_token_offset:
        last = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
        raise CheckpointError(
            f"{file} says that codes begin at id {settings.image_token_offset}, but the text tokenizer beside it has "
            f"{len(tokenizer)} ids, the last being {last!r}: the files come from different checkpoints, or tokens were "
            "added to it. Copy tokenizer.json and tokenizer_config.json from the original."
        )
    return settings


def _parse_settings(content: dict[str, Any], file: Path) -> CheckpointSettings:
    """The fields of ``simplear.json``, by type; null stands for the default."""
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{file} has format version {version}; this release reads {FORMAT_VERSION}: upgrade.")
    generation = {name: value for name, value in content.get("generation", {}).items() if value is not None}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CheckpointSettings, "settings")
    try:
        settings: CheckpointSettings = parser.instantiate(
            parser.parse_object({"settings": {**content, "generation": generation}})
        ).settings
    except ArgumentError as error:
        raise CheckpointError(f"{file}: {' '.join(str(error).split())}") from error
    if min(settings.codebook_size, settings.downsample, settings.max_text_tokens, *settings.grid) < 1:
        raise CheckpointError(f"{file}: codebook_size, downsample, max_text_tokens and grid must be above 0.")
    return settings


def _released_settings(tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]) -> CheckpointSettings:
    """Settings of a directory released with the paper, which writes none."""
    padded = _is_padded(config["vocab_size"], len(tokenizer) + RELEASED_CODEBOOK)
    codebook_size = RELEASED_CODEBOOK if padded else config["vocab_size"] - len(tokenizer)
    return CheckpointSettings(
        image_token_offset=len(tokenizer),
        codebook_size=codebook_size,
        grid=RELEASED_GRID,
        downsample=RELEASED_DOWNSAMPLE,
        generation=GenerationDefaults(
            prompt_prefix=RELEASED_PREFIX,
            negative_prompt=RELEASED_NEGATIVE_PROMPT,
            guidance_scale=6.0,
            top_k=min(64_000, codebook_size),
        ),
    )


def _read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The text tokenizer. Those of the seven tokens that it has are marked special, so that captions cannot type them;
    no token is added.
    """
    with _reading(f"the text tokenizer (tokenizer.json, tokenizer_config.json) in {directory}"):
        tokenizer = load_text_tokenizer(str(directory))
        tokens = [token for token in SPECIAL_TOKENS if token in tokenizer.get_vocab()]
        tokenizer.add_tokens(tokens, special_tokens=True)
        token_layout(tokenizer, codebook_size=1)
    return tokenizer
