"""Where and how precisely to compute: the device a user names, and the dtype of what is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from simplear.errors import UserError

DType = Literal["float32", "bfloat16"]
"""To draw in. float16 is missing on purpose: activations of Qwen2.5 exceed its range."""


def default_dtype(device: torch.device) -> DType:
    """What a device draws in unless it is told otherwise: bfloat16 on GPUs, where it halves what is read."""
    return "bfloat16" if device.type == "cuda" else "float32"


def resolve_device(name: str | torch.device | None = None) -> torch.device:
    """The device of this name; None takes the GPU where there is one.

    Raises UserError for a name that PyTorch does not know and for a device that this machine does not have.
    """
    there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    there += ["mps"] if torch.backends.mps.is_available() else []
    if name is None:
        return torch.device("cuda" if len(there) > 1 and there[1].startswith("cuda") else "cpu")
    known = f"this machine has {', '.join(there)}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {str(name)!r} is unknown; {known}.") from error
    if device.type == "meta":
        return device
    if device.type not in {each.partition(":")[0] for each in there} or (device.index and str(device) not in there):
        raise UserError(f"device {str(name)!r} is not available (or PyTorch was installed without it); {known}.")
    return device


@contextmanager
def float32_by_default() -> Iterator[None]:
    """What is built inside is float32, also within a training in bf16-true, whose default dtype is bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
