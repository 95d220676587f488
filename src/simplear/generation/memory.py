"""Running out of memory becomes an error that says what to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from simplear.errors import UserError

Result = TypeVar("Result")


class OutOfMemoryError(MemoryError, UserError):
    """There is no room for this many images at once; the message suggests fewer."""


def with_memory_error(call: Callable[[], Result], task: str, images: int) -> Result:
    """The result of ``call``.

    Args:
        call: what may run out of memory.
        task: what it does, for the message.
        images: that it handles at once.

    Raises:
        OutOfMemoryError: PyTorch could not allocate memory. The memory that ``call`` had allocated is free again.
    """
    try:
        return call()
    except (RuntimeError, MemoryError) as error:
        # On a CPU, PyTorch raises a plain RuntimeError.
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
    # Outside the handler, because the handled error holds everything that was allocated.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    remedy = f"fewer at once (batch_size={images // 2})" if images > 1 else "a smaller picture or a smaller dtype"
    raise OutOfMemoryError(f"{task} {images} images at once ran out of memory: try {remedy}.")
