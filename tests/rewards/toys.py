"""A CLIP of a few thousand weights besides its token table, under a name that open_clip knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image

NAME = "tiny-test-clip"
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def register(directory: Path) -> str:
    """Make `NAME` a model of open_clip; returns the name."""
    (directory / f"{NAME}.json").write_text(json.dumps(ARCHITECTURE))
    open_clip.add_model_config(directory / f"{NAME}.json")
    return NAME


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(open_clip.create_model(NAME, load_weights=False).state_dict())


def pictures(count: int, height: int, width: int, seed: int = 0) -> tuple[list[Image.Image], torch.Tensor]:
    """Smooth random pictures, as PIL and as (B, 3, H, W) in [0, 1]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 5, 7, 3), dtype=np.uint8)
    images = [Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC) for picture in coarse]
    return images, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
