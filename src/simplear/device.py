"""Devices by name, threads of a small model, and dtypes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from simplear.errors import UserError, first_line

logger = logging.getLogger(__name__)

SMALL_MODEL = 50_000_000
"""Parameters below which matrices are too small to share among many threads."""
SMALL_MODEL_THREADS = 4

DType = Literal["float32", "bfloat16"]
"""To draw in. float16 is missing on purpose: activations of Qwen2.5 exceed its range."""


def default_dtype(device: torch.device) -> DType:
    """What a device draws in by default: bfloat16 on GPUs, where it halves what is read."""
    return "bfloat16" if device.type == "cuda" else "float32"


def resolve_device(name: str | torch.device | None = None) -> torch.device:
    """The device of this name; None takes the GPU if there is one.

    Raises UserError for a name that PyTorch does not know and for a device that this machine does not have.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = "unknown"
    try:
        device = torch.device(name)
        problem = "not available on this machine"
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a PyTorch without it
        raise UserError(f"device {str(name)!r} is {problem}: {first_line(error)}") from error
    return device


def limit_threads(parameters: int) -> None:
    """On a CPU, give a small model only a few of many threads, and say so, unless OMP_NUM_THREADS is set."""
    available = torch.get_num_threads()
    if parameters < SMALL_MODEL and available > SMALL_MODEL_THREADS and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(SMALL_MODEL_THREADS)
        message = "the model is small: %d of %d threads; OMP_NUM_THREADS sets their number"
        logger.info(message, SMALL_MODEL_THREADS, available)


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Whatever is built inside is float32, even in a training in bf16-true, whose default dtype is bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
