"""A visual tokenizer as a directory: ``config.json`` (class and arguments) and ``model.safetensors`` (weights).

``config.json`` also holds the tokenizer's fingerprint, which loading compares, so weights that are damaged or belong
to another configuration are an error and never strange pictures. Token shards and checkpoints refer to a tokenizer by
that fingerprint. Any class works that is an ``nn.Module``, has the methods of `VisualTokenizer`, and keeps the
arguments of its constructor, as plain JSON values, in ``init_args``.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from simplear.atomic import whole_directory
from simplear.visual_tokenizer.protocol import VisualTokenizer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def save_visual_tokenizer(tokenizer: VisualTokenizer, directory: str | Path) -> None:
    """Write a tokenizer to `directory`, which appears complete or not at all; one already there is replaced.

    Raises ValueError when the tokenizer keeps no ``init_args`` to build it from again, and OSError, naming the
    directory, when the disk takes no more.
    """
    if not hasattr(tokenizer, "init_args"):
        raise ValueError(
            f"{type(tokenizer).__name__} has no init_args: keep the constructor's arguments in self.init_args (plain "
            "JSON values), so that the directory can rebuild it."
        )
    assert isinstance(tokenizer, nn.Module)
    config = {
        "class_path": _class_path(type(tokenizer)),
        "init_args": tokenizer.init_args,
        "fingerprint": tokenizer.fingerprint,
    }
    weights = {name: weight.detach().cpu().contiguous() for name, weight in tokenizer.state_dict().items()}
    with whole_directory(directory) as partial:
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        save_file(weights, partial / WEIGHTS_FILE)


def load_visual_tokenizer(path: str | Path, device: str | torch.device | None = None) -> Any:
    """The tokenizer of a directory, in evaluation mode and frozen, on `device` (default: CPU).

    Raises FileNotFoundError for a directory or file that is missing, and ValueError, naming the file, for one that is
    truncated, damaged or fits no class.
    """
    directory = Path(path)
    for file in (directory / CONFIG_FILE, directory / WEIGHTS_FILE):
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: {directory} is no visual tokenizer. Train one (the demo's: make train-tokenizer), "
                "or give the directory that an earlier training exported."
            )
    config = _read_config(directory / CONFIG_FILE)
    tokenizer = _import_class(config["class_path"], directory / CONFIG_FILE)(**config["init_args"])
    weights_file = directory / WEIGHTS_FILE
    try:
        tokenizer.load_state_dict(load_file(weights_file))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights_file} is damaged or of another configuration: {error}. Export it again.") from error
    if tokenizer.fingerprint != config["fingerprint"]:
        raise ValueError(
            f"{weights_file} does not have the fingerprint that {CONFIG_FILE} names: one of the two was changed or "
            "damaged. Export the tokenizer again."
        )
    return tokenizer.to(device or "cpu").eval().requires_grad_(False)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON, perhaps cut short: {error}. Export the tokenizer again.") from error
    for key in ("class_path", "init_args", "fingerprint"):
        if key not in config:
            raise ValueError(f"{file} has no key {key!r}: it describes no visual tokenizer.")
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
        raise ValueError(f"{file} names the class {class_path}, which cannot be imported: {error}.") from error
