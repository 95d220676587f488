"""CLIP models through open_clip: loading from a name, a file, a directory or the hub; saving; preprocessing of tensors.

A directory is in open_clip's own format, ``open_clip_config.json`` (architecture and preprocessing) and
``open_clip_model.safetensors``, with the text tokenizer's files unless it is open_clip's built-in one: what
``open_clip.create_model("local-dir:…")`` reads, and what model repositories on the hub hold. Weights are read as
safetensors or as tensors alone (``weights_only``), and a configuration that asks for code of its repository
(``trust_remote_code``), which open_clip would hand on to transformers, is refused: no file can run code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from simplear.atomic import whole_directory
from simplear.device import float32_by_default
from simplear.errors import UserError
from simplear.text_files import read_object

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
HUB = "hf-hub:"
DIRECTORY = "local-dir:"


@dataclass(frozen=True)
class LoadedCLIP:
    """A frozen CLIP in evaluation mode, with what goes in front of it.

    Attributes:
        network: an open_clip model: ``encode_image`` and ``encode_text``.
        tokenizer: texts to ids (B, context length).
        preprocessing: `open_clip.transform.PreprocessCfg`: size, resizing, mean and standard deviation.
        dtype: of the pixels that the network takes.
    """

    network: Any
    tokenizer: Any
    preprocessing: Any
    dtype: torch.dtype = torch.float32


def load_clip(model: str, pretrained: str | None = None, precision: str = "fp32") -> LoadedCLIP:
    """A CLIP model with its weights, on the CPU.

    Args:
        model: a directory in open_clip's format; ``hf-hub:OWNER/REPOSITORY`` of such a directory; or a name of
            `open_clip.list_models`, such as "ViT-H-14".
        pretrained: for a name only: a file of weights, ``hf-hub:OWNER/REPOSITORY/FILE``, or a tag of
            `open_clip.list_pretrained`, such as "laion2b_s32b_b79k".
        precision: open_clip's: "fp32", "fp16" and "bf16" (norms in float32), "pure_fp16", "pure_bf16".

    Raises:
        UserError: the name is unknown; directory, file or download are missing; weights are not named or named twice;
            or they are damaged or another model's.
    """
    import open_clip
    from huggingface_hub import hf_hub_download
    from open_clip.model import get_input_dtype
    from open_clip.transform import PreprocessCfg

    source = f"{DIRECTORY}{model}" if Path(model).is_dir() else model
    try:
        if source.startswith((DIRECTORY, HUB)):
            if pretrained is not None:
                raise UserError(f"{model} has its own weights: leave pretrained {pretrained!r} out.")
            _refuse_remote_code(source)
        elif pretrained is None:  # before open_clip builds the whole model
            raise RuntimeError("pretrained weights are required")
        weights = pretrained
        if pretrained and pretrained.startswith(HUB):
            owner, repository, file = pretrained.removeprefix(HUB).split("/", 2)
            weights = hf_hub_download(f"{owner}/{repository}", file)
        with float32_by_default():
            network = open_clip.create_model(source, weights, precision=precision, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(source)
    except UserError:
        raise
    except Exception as error:  # open_clip, safetensors, pickle and the hub raise a dozen kinds
        what = " with ".join(part for part in (model, pretrained) if part)
        raise UserError(
            f"CLIP model {what} could not be loaded ({str(error).partition(' Available')[0]}). Give a directory of "
            f"open_clip's format ({CONFIG_FILE}, {WEIGHTS_FILE}), or a name of open_clip.list_models() and as "
            f"pretrained one of its tags (open_clip.list_pretrained()), a file, or {HUB}OWNER/REPOSITORY/FILE. Without "
            "a network, download the weights elsewhere (https://huggingface.co/OWNER/REPOSITORY) and give the file."
        ) from error
    network.eval().requires_grad_(False)
    preprocessing = PreprocessCfg(**network.visual.preprocess_cfg)
    return LoadedCLIP(network, tokenizer, preprocessing, get_input_dtype(precision) or torch.float32)


def _refuse_remote_code(source: str) -> None:
    """Raises UserError if the configuration has the text tokenizer run code that comes with the model."""
    from huggingface_hub import hf_hub_download

    schema, _, name = source.partition(":")
    file = hf_hub_download(name, CONFIG_FILE) if f"{schema}:" == HUB else Path(name) / CONFIG_FILE
    if "trust_remote_code" in json.dumps(read_object(Path(file))):
        raise UserError(
            f"{file} asks for trust_remote_code: its text tokenizer would run code that comes with the model. Remove "
            "the key, if the tokenizer works without it, or take another model."
        )


def save_clip(network: Any, architecture: dict[str, Any], tokenizer: Any, directory: str | Path) -> None:
    """Write a model as a directory in open_clip's format, complete or not at all; an older one is replaced.

    Args:
        network: an open_clip model with ``visual.preprocess_cfg``.
        architecture: the arguments it was built with, open_clip's ``model_cfg``.
        tokenizer: saved too if it can be (`open_clip.tokenizer.HFTokenizer`); the built-in one needs no files.
        directory: to write.

    Raises OSError, naming the directory, if the disk is full.
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
    """open_clip's own preprocessing of a PIL image before its model, applied to tensors.

    Resizing is antialiased as PIL's is, and clamped to [0, 1] as PIL's 8-bit pixels are; the result differs from PIL's
    only by their rounding.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        preprocessing: `open_clip.transform.PreprocessCfg`.

    Returns:
        (B, 3, height, width) float32 for ``encode_image``.
    """
    from open_clip.transform import ResizeKeepRatio, image_transform_v2
    from torchvision.transforms.functional import resize

    # open_clip states the colour of padding as an 8-bit value.
    preprocessing = replace(preprocessing, fill_color=preprocessing.fill_color / 255)
    *steps, normalization = image_transform_v2(preprocessing, is_train=False).transforms
    for step in steps:
        if isinstance(step, ResizeKeepRatio):  # the only one that does not take tensors
            like_pil: Any = SimpleNamespace(size=(images.shape[-1], images.shape[-2]))
            images = resize(images, step.get_params(like_pil, step.size, step.longest), step.interpolation)
        else:
            images = step(images)
    return normalization(images.clamp(0, 1))
