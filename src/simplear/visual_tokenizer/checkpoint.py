"""A visual tokenizer as a directory: ``config.json`` (class and arguments) and ``model.safetensors`` (weights).

``config.json`` also holds the tokenizer's fingerprint, which loading compares, so weights that are damaged or belong
to another configuration are an error and never strange pictures. Token shards and checkpoints refer to a tokenizer by
that fingerprint. Any class works that is an ``nn.Module``, has the methods of `VisualTokenizer`, and keeps the
arguments of its constructor, as plain JSON values, in ``init_args``. One whose weights are files of another kind has
``save_files(directory)`` and ``from_directory(directory, **init_args)``, which take the place of ``model.safetensors``.

Directories and hub ids of two pretrained tokenizers load as they are: Cosmos DV8x16x16, and Janus's in transformers'
layout.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from simplear.atomic import whole_directory
from simplear.errors import MissingFileError, UserError
from simplear.hub import is_hub_id
from simplear.visual_tokenizer import cosmos, janus
from simplear.visual_tokenizer.protocol import VisualTokenizer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PRETRAINED_FILES = [CONFIG_FILE, "*.safetensors", "*.safetensors.index.json", *cosmos.FILES]
"""What is downloaded of a repository on the hub."""


def save_visual_tokenizer(tokenizer: VisualTokenizer, directory: str | Path) -> None:
    """Write a tokenizer to `directory`, which appears complete or not at all; one already there is replaced.

    Raises ValueError when the tokenizer keeps no ``init_args`` to build it from again, and OSError, naming the
    directory, when the disk takes no more.
    """
    if not hasattr(tokenizer, "init_args"):
        raise UserError(
            f"{type(tokenizer).__name__} has no init_args: keep the constructor's arguments in self.init_args (plain "
            "JSON values), so that the directory can rebuild it."
        )
    assert isinstance(tokenizer, nn.Module)
    save_files = getattr(tokenizer, "save_files", None)
    config = {
        "class_path": _class_path(type(tokenizer)),
        "init_args": tokenizer.init_args,
        "fingerprint": tokenizer.fingerprint,
    }
    with whole_directory(directory) as partial:
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        if callable(save_files):
            save_files(partial)
        else:
            weights = {name: weight.detach().cpu().contiguous() for name, weight in tokenizer.state_dict().items()}
            save_file(weights, partial / WEIGHTS_FILE)


def copy_visual_tokenizer(path: str | Path, directory: str | Path) -> None:
    """Put the tokenizer of `load_visual_tokenizer`'s `path` into a new directory, so that it can be carried along.

    Raises what loading and `save_visual_tokenizer` raise.
    """
    source = find_visual_tokenizer(path)
    if _is_own(source):
        shutil.copytree(source, directory)
    else:
        save_visual_tokenizer(load_visual_tokenizer(source), directory)


def find_visual_tokenizer(path: str | Path) -> Path:
    """The local directory of a tokenizer; a hub id is downloaded or taken from the cache.

    Raises FileNotFoundError where there is neither.
    """
    if Path(path).is_dir() or not is_hub_id(path):
        return Path(path)
    try:
        return Path(snapshot_download(str(path), allow_patterns=PRETRAINED_FILES))
    except Exception as error:
        raise MissingFileError(
            f"no visual tokenizer at {path}: no such directory, and the hub did not give it ({type(error).__name__}). "
            "Download it where there is a network, and name its directory (visual_tokenizer=…)."
        ) from error


def load_visual_tokenizer(path: str | Path, device: str | torch.device | None = None) -> Any:
    """The tokenizer of a directory or hub id, in evaluation mode and frozen, on `device` (default: CPU).

    Raises FileNotFoundError for a directory or file that is missing, and ValueError, naming the file, for one that is
    truncated, damaged or fits no class.
    """
    directory = find_visual_tokenizer(path)
    tokenizer = _load_own(directory) if _is_own(directory) else _load_pretrained(directory)
    return tokenizer.to(device or "cpu").eval().requires_grad_(False)


def _is_own(directory: Path) -> bool:
    """Whether `save_visual_tokenizer` wrote the directory; True also where nothing says who did."""
    has_cosmos = any((directory / name).is_file() for name in cosmos.FILES)
    return "class_path" in _config_of(directory) or not (has_cosmos or _is_janus(directory))


def _is_janus(directory: Path) -> bool:
    return _config_of(directory).get("model_type") in janus.MODEL_TYPES


def _config_of(directory: Path) -> dict[str, Any]:
    """config.json; empty where it cannot be read, of which loading says more."""
    try:
        content = json.loads((directory / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _load_pretrained(directory: Path) -> Any:
    if _is_janus(directory):
        return janus.JanusTokenizer.from_pretrained(directory)
    return cosmos.CosmosTokenizer.from_directory(directory)


def _load_own(directory: Path) -> Any:
    config_file, weights_file = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    _require_file(config_file)
    config = _read_config(config_file)
    tokenizer_class = _import_class(config["class_path"], config_file)
    if hasattr(tokenizer_class, "from_directory"):
        tokenizer = tokenizer_class.from_directory(directory, **config["init_args"])
    else:
        _require_file(weights_file)
        tokenizer = tokenizer_class(**config["init_args"])
        try:
            tokenizer.load_state_dict(load_file(weights_file))
        except (SafetensorError, RuntimeError) as error:
            raise UserError(
                f"{weights_file} is damaged or of another configuration: {error}. Export it again."
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
            f"{file} is missing: {file.parent} is no visual tokenizer. Train one (the demo's: make train-tokenizer), "
            "or give the directory that an earlier training exported."
        )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is no JSON, perhaps cut short: {error}. Export the tokenizer again.") from error
    for key in ("class_path", "init_args", "fingerprint"):
        if key not in config:
            raise UserError(f"{file} has no key {key!r}: it describes no visual tokenizer.")
    return config


def _class_path(tokenizer_class: type) -> str:
    """Where to import the class from: its package, when that exports it, else the module that defines it."""
    module, name = tokenizer_class.__module__, tokenizer_class.__qualname__
    package = module.rpartition(".")[0]
    return f"{package if getattr(sys.modules.get(package), name, None) is tokenizer_class else module}.{name}"


def _import_class(class_path: str, file: Path) -> Any:
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{file} names the class {class_path}, which cannot be imported: {error}.") from error
