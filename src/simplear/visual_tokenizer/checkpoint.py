"""A visual tokenizer as a directory: ``config.json`` (class and arguments) and ``model.safetensors`` (weights).

``config.json`` also holds the tokenizer's fingerprint, which loading compares, so weights that are damaged or belong
to another configuration are an error and never strange pictures. Token shards and checkpoints refer to a tokenizer by
that fingerprint. Any class works that is an ``nn.Module``, has the methods of `VisualTokenizer`, and keeps the
arguments of its constructor, as plain JSON values, in ``init_args``. One whose weights are files of another kind has
``save_files(directory)`` and ``from_directory(directory, **init_args)``, which take the place of ``model.safetensors``.

A directory can come from anywhere, so it cannot have code imported: it names a class of this package, or one that the
program at hand has registered (`register_visual_tokenizer`).

Directories and hub ids of two pretrained tokenizers load as they are: Cosmos DV8x16x16, and Janus's in transformers'
layout.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from simplear.artefacts import what_is
from simplear.atomic import whole_directory
from simplear.device import float32_by_default
from simplear.errors import MissingFileError, UserError
from simplear.hub import is_hub_id, missing_on_hub
from simplear.text_files import read_object
from simplear.visual_tokenizer import cosmos, janus
from simplear.visual_tokenizer.fsq import FSQAutoencoder
from simplear.visual_tokenizer.protocol import VisualTokenizer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PRETRAINED_FILES = [CONFIG_FILE, "*.safetensors", "*.safetensors.index.json", *cosmos.FILES]
"""What is downloaded of a repository on the hub."""
PACKAGE = __name__.rpartition(".")[0]

Class = TypeVar("Class", bound=type)
_CLASSES: dict[str, type] = {}
"""What directories may name, by import path."""


def register_visual_tokenizer(tokenizer_class: Class) -> Class:
    """Let directories name this class, in this process; also a decorator.

    On the command line, ``--import MODULE`` imports the module that registers it.
    """
    module, name = tokenizer_class.__module__, tokenizer_class.__qualname__
    # Directories name a class by its module, or by the package that exports it.
    _CLASSES.update(dict.fromkeys((f"{module}.{name}", f"{module.rpartition('.')[0]}.{name}"), tokenizer_class))
    return tokenizer_class


def _class_path(tokenizer_class: type) -> str:
    module, name = tokenizer_class.__module__, tokenizer_class.__qualname__
    return f"{PACKAGE if module.startswith(f'{PACKAGE}.') else module}.{name}"


for _own in (FSQAutoencoder, cosmos.CosmosTokenizer, janus.JanusTokenizer):
    register_visual_tokenizer(_own)


def save_visual_tokenizer(tokenizer: VisualTokenizer, directory: str | Path) -> None:
    """Write a tokenizer to `directory`, which appears complete or not at all; one already there is replaced.

    Raises ValueError when the tokenizer has no ``init_args`` to rebuild it from, and OSError, naming the directory,
    when the disk is full.
    """
    if not hasattr(tokenizer, "init_args"):
        raise UserError(
            f"{type(tokenizer).__name__} has no init_args: keep the constructor's arguments in self.init_args (plain "
            "JSON values), so that the directory can rebuild it."
        )
    assert isinstance(tokenizer, nn.Module)
    config = {
        "class_path": _class_path(type(tokenizer)),
        "init_args": tokenizer.init_args,
        "fingerprint": tokenizer.fingerprint,
    }
    with whole_directory(directory) as partial:
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        if callable(save_files := getattr(tokenizer, "save_files", None)):
            save_files(partial)
        else:
            weights = {name: weight.detach().cpu().contiguous() for name, weight in tokenizer.state_dict().items()}
            save_file(weights, partial / WEIGHTS_FILE)


def copy_visual_tokenizer(path: str | Path, directory: str | Path) -> None:
    """Put the tokenizer of `load_visual_tokenizer`'s `path` into a new directory, so that it can be carried along.

    Raises what loading and `save_visual_tokenizer` raise.
    """
    source = find_visual_tokenizer(path)
    if "class_path" in _config_of(source):
        shutil.copytree(source, directory)
    else:
        save_visual_tokenizer(load_visual_tokenizer(source), directory)


def find_visual_tokenizer(path: str | Path) -> Path:
    """The local directory of a tokenizer; a hub id is downloaded or taken from the cache.

    Raises FileNotFoundError if there is neither.
    """
    if Path(path).is_dir() or not is_hub_id(path):
        return Path(path)
    try:
        return Path(snapshot_download(str(path), allow_patterns=PRETRAINED_FILES))
    except Exception as error:
        raise MissingFileError(
            f"no visual tokenizer at {path}: {missing_on_hub(path, error)}. Correct the path, or download it where "
            "there is a network and name its directory (visual_tokenizer=…)."
        ) from error


def load_visual_tokenizer(path: str | Path, device: str | torch.device | None = None) -> Any:
    """The tokenizer of a directory or hub id, in evaluation mode and frozen, on `device` (default: CPU).

    Raises FileNotFoundError for a directory or file that is missing, and ValueError, naming the file, for one that is
    truncated, damaged or fits no class.
    """
    directory = find_visual_tokenizer(path)
    config, loaded = _config_of(directory), _load_own
    if config.get("model_type") in janus.MODEL_TYPES:
        loaded = janus.JanusTokenizer.from_pretrained
    elif "class_path" not in config and any((directory / name).is_file() for name in cosmos.FILES):
        loaded = cosmos.CosmosTokenizer.from_directory
    with float32_by_default():
        tokenizer: Any = loaded(directory)
    return tokenizer.to(device or "cpu").eval().requires_grad_(False)


def _config_of(directory: Path) -> dict[str, Any]:
    """config.json; empty if it cannot be read, which loading reports."""
    try:
        return read_object(directory / CONFIG_FILE)
    except (OSError, UserError):
        return {}


def _load_own(directory: Path) -> Any:
    """The tokenizer of a directory that `save_visual_tokenizer` wrote."""
    config_file, weights_file = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    _require_file(config_file)
    config = read_object(config_file)
    for key in ("class_path", "init_args", "fingerprint"):
        if key not in config:
            raise UserError(f"{config_file} has no key {key!r}; {directory} is {what_is(directory)}.")
    tokenizer_class = _registered_class(config["class_path"], config_file)
    try:
        if hasattr(tokenizer_class, "from_directory"):
            tokenizer = tokenizer_class.from_directory(directory, **config["init_args"])
        else:
            _require_file(weights_file)
            tokenizer = tokenizer_class(**config["init_args"])
            tokenizer.load_state_dict(load_file(weights_file))
    except (TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{weights_file} is damaged, or it does not fit the init_args in {config_file}: {error}. Export it again."
        ) from error
    if tokenizer.fingerprint != config["fingerprint"]:
        raise UserError(
            f"{directory} does not have the fingerprint that its {CONFIG_FILE} names: weights or arguments were "
            "changed or damaged. Export the tokenizer again."
        )
    return tokenizer


def _require_file(file: Path) -> None:
    if not file.is_file():
        raise MissingFileError(
            f"{file} is missing, so {file.parent} is not a visual tokenizer; it is {what_is(file.parent)}. Train one "
            "(the demo's: make train-tokenizer), or give the directory that an earlier training exported."
        )


def _registered_class(class_path: Any, file: Path) -> Any:
    """The class of this name; nothing is imported because a file names it."""
    if isinstance(class_path, str) and class_path in _CLASSES:
        return _CLASSES[class_path]
    raise UserError(
        f"{file} names the class {class_path!r}, which is neither one of this package's visual tokenizers nor "
        "registered. No code is imported because a file names it. If the class is yours, register it "
        "(@simplear.visual_tokenizer.register_visual_tokenizer) and import its module first (--import MODULE)."
    )
