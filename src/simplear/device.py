"""Where and how precisely to compute: a device by its name, threads of a small model, the dtype of what is loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from simplear.errors import UserError

logger = logging.getLogger(__name__)

SMALL_MODEL = 50_000_000
"""Parameters below which matrices are too small to share among many threads."""
SMALL_MODEL_THREADS = 4


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


def cpu_threads(parameters: int, available: int, chosen: bool) -> int:
    """Threads to compute with on a CPU.

    Args:
        parameters: of the model.
        available: PyTorch's number, by default that of the cores.
        chosen: whether the user set it; then it stays.
    """
    return available if chosen or parameters >= SMALL_MODEL else min(available, SMALL_MODEL_THREADS)


def limit_threads(parameters: int) -> None:
    """Give a small model few of many cores, and say so; OMP_NUM_THREADS goes before."""
    available = torch.get_num_threads()
    threads = cpu_threads(parameters, available, "OMP_NUM_THREADS" in os.environ)
    if threads < available:
        torch.set_num_threads(threads)
        logger.info("the model is small: %d of %d threads; OMP_NUM_THREADS sets their number", threads, available)


@contextmanager
def float32_by_default() -> Iterator[None]:
    """What is built inside is float32, also within a training in bf16-true, whose default dtype is bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
