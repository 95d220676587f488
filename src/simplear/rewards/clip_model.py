"""CLIP models through open_clip: loading from a name, a file, a directory or the hub; saving; preprocessing of tensors.

A directory is in open_clip's own format, ``open_clip_config.json`` (architecture and preprocessing) and
``open_clip_model.safetensors``, with the text tokenizer's files where it is not open_clip's built-in one: what
``open_clip.create_model("local-dir:…")`` reads, and what model repositories on the hub hold. Weights are read as
safetensors or as tensors alone (``weights_only``), and a configuration cannot ask for code of its repository
(``trust_remote_code``), which open_clip would hand on to transformers: no file can run code.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from simplear.atomic import whole_directory
from simplear.device import float32_by_default
from simplear.errors import MissingFileError, UserError
from simplear.text_files import read_object

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
HUB = "hf-hub:"
DIRECTORY = "local-dir:"
LARGEST_PIXEL = 255
"""open_clip states the colour of padding as an 8-bit value."""


class RemoteCodeError(UserError):
    """A model that wants code of its own to be run."""


@dataclass(frozen=True)
class LoadedCLIP:
    """A frozen CLIP in evaluation mode, with what goes in front of it."""

    network: Any
    """An open_clip model: ``encode_image`` and ``encode_text``."""
    tokenizer: Any
    """Texts to ids (B, context length)."""
    preprocessing: Any
    """`open_clip.transform.PreprocessCfg`: size, resizing, mean and standard deviation."""
    dtype: torch.dtype = torch.float32
    """Of the pixels that the network takes."""


def load_clip(model: str, pretrained: str | None = None, precision: str = "fp32") -> LoadedCLIP:
    """A CLIP model with its weights, on the CPU.

    Args:
        model: a directory in open_clip's format; ``hf-hub:OWNER/REPOSITORY`` of such a directory; or a name of
            `open_clip.list_models`, such as "ViT-H-14".
        pretrained: for a name only: a file of weights, ``hf-hub:OWNER/REPOSITORY/FILE``, or a tag of
            `open_clip.list_pretrained`, such as "laion2b_s32b_b79k".
        precision: open_clip's: "fp32", "fp16" and "bf16" (norms in float32), "pure_fp16", "pure_bf16".

    Raises:
        FileNotFoundError: directory, file or download cannot be had.
        ValueError: the name is unknown, weights are not named or named twice, or they are damaged or another model's.
    """
    import open_clip
    from open_clip.model import get_input_dtype
    from open_clip.transform import PreprocessCfg

    source = _directory(model) if _is_directory(model) else model
    if source.startswith((DIRECTORY, HUB)):
        if pretrained is not None:
            raise UserError(f"{model} holds weights of its own: leave pretrained {pretrained!r} out.")
        file = None
    else:
        file = _weights(model, pretrained)
    try:
        if file is None:
            _refuse_remote_code(source)
        with _root_logger_quiet():
            with float32_by_default():
                network = open_clip.create_model(source, file, precision=precision, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:  # open_clip, safetensors, pickle and the hub raise a dozen kinds
        if isinstance(error, RemoteCodeError):
            raise
        what = " with ".join(part for part in (model, pretrained) if part)
        if source.startswith(HUB) or (file and not Path(file).is_file()):
            raise MissingFileError(
                f"{what} is not in the local cache and could not be downloaded ({error}). Download it where there is a "
                "network, and name the directory as model, or the file as pretrained."
            ) from error
        raise UserError(f"{what} could not be loaded: damaged, or weights of another model ({error}).") from error
    network.eval().requires_grad_(False)
    preprocessing = PreprocessCfg(**network.visual.preprocess_cfg)
    return LoadedCLIP(network, tokenizer, preprocessing, get_input_dtype(precision) or torch.float32)


def _refuse_remote_code(source: str) -> None:
    """Raises RemoteCodeError where the configuration has the text tokenizer run code that comes with the model."""
    if source.startswith(HUB):
        file = Path(_downloaded(f"{source}/{CONFIG_FILE}"))
    else:
        file = Path(source.removeprefix(DIRECTORY)) / CONFIG_FILE
    if "trust_remote_code" in json.dumps(read_object(file)):
        raise RemoteCodeError(
            f"{file} asks for trust_remote_code: its text tokenizer would run code that comes with the model. Remove "
            "the key, if the tokenizer works without it, or take another model."
        )


def _is_directory(model: str) -> bool:
    return model.startswith(DIRECTORY) or Path(model).is_dir()


def _directory(model: str) -> str:
    """The model as open_clip names a directory, with the files that it needs; open_clip would go on without weights."""
    directory = Path(model.removeprefix(DIRECTORY))
    if not (directory / CONFIG_FILE).is_file() or not any(directory.glob("*.safetensors")):
        raise MissingFileError(
            f"{directory} is no CLIP model: it must hold {CONFIG_FILE} and {WEIGHTS_FILE}. Train one (the demo's: "
            "simplear fit --config configs/demo/clip.yaml), or name a model of open_clip and its weights."
        )
    return f"{DIRECTORY}{directory}"


def _weights(model: str, pretrained: str | None) -> str:
    """A file or a tag for a model that open_clip knows by name."""
    import open_clip

    if model not in open_clip.list_models():
        near = difflib.get_close_matches(model, open_clip.list_models(), n=1)
        raise UserError(
            f"CLIP model {model!r} is no directory and no model of open_clip"
            + (f"; did you mean {near[0]!r}?" if near else "; open_clip.list_models() names them.")
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None:
        raise UserError(f"{model} needs pretrained weights: a file, {HUB}OWNER/REPOSITORY/FILE, or one of {tags}.")
    if pretrained.startswith(HUB):
        return _downloaded(pretrained)
    if pretrained not in tags and not Path(pretrained).is_file():
        raise MissingFileError(
            f"pretrained {pretrained!r} for {model} is no file here and none of open_clip's tags {tags}: check the "
            "path, or download the weights."
        )
    return pretrained


def _downloaded(name: str) -> str:
    """Path of ``hf-hub:OWNER/REPOSITORY/FILE`` in the hub's cache."""
    from huggingface_hub import hf_hub_download

    owner, repository, file = name.removeprefix(HUB).split("/", 2)
    try:
        return hf_hub_download(f"{owner}/{repository}", file)
    except Exception as error:
        raise MissingFileError(
            f"{file} of {owner}/{repository} is not in the local cache and could not be downloaded ({error}). "
            f"Download https://huggingface.co/{owner}/{repository} where there is a network, and name the file's path."
        ) from error


@contextlib.contextmanager
def _root_logger_quiet() -> Iterator[None]:
    """open_clip logs a dozen lines a model to the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def save_clip(network: Any, architecture: dict[str, Any], tokenizer: Any, directory: str | Path) -> None:
    """Write a model as a directory in open_clip's format; it appears whole or not at all, in place of an older one.

    Args:
        network: an open_clip model with ``visual.preprocess_cfg``.
        architecture: the arguments it was built with, open_clip's ``model_cfg``.
        tokenizer: saved too if it can be (`open_clip.tokenizer.HFTokenizer`); the built-in one needs no files.
        directory: to write.

    Raises OSError, naming the directory, when the disk takes no more.
    """
    preprocessing = {key: value for key, value in network.visual.preprocess_cfg.items() if key != "size"}
    config = {"model_cfg": architecture, "preprocess_cfg": preprocessing}
    weights = {name: weight.detach().cpu().contiguous() for name, weight in network.state_dict().items()}
    with whole_directory(directory) as partial:
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(partial)
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        save_file(weights, partial / WEIGHTS_FILE)


def preprocess(images: Tensor, preprocessing: Any) -> Tensor:
    """What open_clip does to a PIL picture before its model, done to tensors.

    Resizing is antialiased as PIL's is, and clamped to [0, 1] as PIL's 8-bit pixels are; it differs from PIL's by their
    rounding alone.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        preprocessing: `open_clip.transform.PreprocessCfg`: ``size``; ``resize_mode`` "shortest" (resize the shorter
            side, cut the middle out), "longest" (the longer side, pad) or "squash"; ``interpolation``,
            ``fill_color``, ``mean``, ``std``.

    Returns:
        (B, 3, size, size), normalised.
    """
    from open_clip.transform import center_crop_or_pad
    from torchvision.transforms import functional as transforms

    _, height, width = preprocessing.input_size
    size = _resized(tuple(images.shape[-2:]), height, width, preprocessing.resize_mode)
    mode = transforms.InterpolationMode("bilinear" if preprocessing.interpolation == "bilinear" else "bicubic")
    if images.shape[-2:] != size:
        images = transforms.resize(images.float(), list(size), mode, antialias=True).clamp(0, 1)
    images = center_crop_or_pad(images, [height, width], fill=preprocessing.fill_color / LARGEST_PIXEL)
    return transforms.normalize(images, list(preprocessing.mean), list(preprocessing.std))


def _resized(size: tuple[int, ...], height: int, width: int, mode: str) -> tuple[int, int]:
    """Size before crop and padding, rounded as open_clip rounds it in each of its cases."""
    if mode == "squash":
        return height, width
    ratios = size[0] / height, size[1] / width
    if mode == "shortest" and height == width:
        short = min(size)
        return int(height * size[0] / short), int(width * size[1] / short)
    ratio = max(ratios) if mode == "longest" else min(ratios)
    return round(size[0] / ratio), round(size[1] / ratio)


def text_ids(loaded: LoadedCLIP, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids (B, context length) int64, and which captions were too long and cut (B,) bool."""
    length = loaded.tokenizer.context_length
    ids = loaded.tokenizer(captions, context_length=length)
    # With room for one more token, a caption that fits is the same and one more pad long.
    longer = loaded.tokenizer(captions, context_length=length + 1)
    return ids, (longer[:, :length] != ids).any(dim=1)
