"""The options of drawing that `simplear generate` and the evaluations share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from simplear.device import DType
from simplear.errors import UserError
from simplear.generation.engine import engine_class
from simplear.generation.pipeline import SimpleARPipeline
from simplear.generation.sampling import SamplingSettings
from simplear.language_model import CheckpointSettings
from simplear.text_files import FreeText

LOADING = ("engine", "engine_options", "visual_tokenizer", "dtype")
"""Options that decide how a checkpoint is loaded; the others are arguments of a call of the pipeline."""


@dataclass(frozen=True)
class DrawingOptions:
    """How a checkpoint draws.

    Args:
        guidance_scale: classifier-free guidance; the checkpoint's default if not given.
        do_sample: false takes the most probable code each time.
        temperature: the checkpoint's default if not given.
        top_k: the checkpoint's default if not given.
        top_p: the checkpoint's default if not given.
        negative_prompt: the checkpoint's default if not given.
        prompt_prefix: put before every prompt; the checkpoint's default if not given.
        height: pixels; the checkpoint's grid if not given.
        width: pixels; the checkpoint's grid if not given.
        engine: how codes are drawn.
        engine_options: of the engine, as ``'{window: 7}'`` for jacobi.
        visual_tokenizer: directory or hub id to use in place of the checkpoint's own.
        batch_size: images drawn at once.
        dtype: of the language model; if not given the checkpoint's own; with `simplear generate` bfloat16 on a GPU
            and float32 elsewhere.

    Raises ValueError for a batch size below 1, and for an unknown engine or unknown options of an engine.
    """

    guidance_scale: float | None = None
    do_sample: bool = True
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    negative_prompt: FreeText | None = None
    prompt_prefix: FreeText | None = None
    height: int | None = None
    width: int | None = None
    engine: str = "fused"
    engine_options: dict[str, Any] | None = None
    visual_tokenizer: str | None = None
    batch_size: int = 32
    dtype: DType | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size {self.batch_size} must be at least 1.")
        engine_class(self.engine, self.engine_options or {})

    def pipeline(self, checkpoint: str | Path, device: str | torch.device | None = None) -> SimpleARPipeline:
        """The checkpoint's pipeline. Errors: see `SimpleARPipeline.from_pretrained`."""
        loading = {name: getattr(self, name) for name in LOADING}
        loading["dtype"] = None if self.dtype is None else getattr(torch, self.dtype)
        return SimpleARPipeline.from_pretrained(checkpoint, device=device, **loading)

    def arguments(self) -> dict[str, Any]:
        """Of a call of the pipeline."""
        return {name: value for name, value in vars(self).items() if name not in LOADING}

    def stated(self, checkpoint: CheckpointSettings) -> dict[str, Any]:
        """The settings that decide the pictures, with the checkpoint's defaults; for reports, and to compare later.

        Options that older reports do not have are left out at their default. Raises ValueError for a number outside
        its range.
        """
        height, width = (side * checkpoint.downsample for side in checkpoint.grid)
        defaults = {**dataclasses.asdict(checkpoint.generation), "height": height, "width": width}
        stated = {
            name: value if getattr(self, name) is None else getattr(self, name) for name, value in defaults.items()
        }
        SamplingSettings(**{name: stated[name] for name in ("guidance_scale", "temperature", "top_k", "top_p")})
        stated |= {"engine": self.engine, "engine_options": self.engine_options or {}}
        stated |= {} if self.dtype is None else {"dtype": self.dtype}
        return stated if self.do_sample else {**stated, "do_sample": False}
