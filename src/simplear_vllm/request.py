"""What a vLLM request says of the image that it draws: the ``extra_args`` of its sampling parameters, as plain values.

The scheduler and the worker read it from there. Nothing here imports vLLM.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from simplear.generation.sampling import SamplingSettings

Role = Literal["conditional", "negative"]
KEY = "simplear"
"""Name of our values among a request's extra arguments."""


@dataclass(frozen=True)
class ImageRequest:
    """One row of one image."""

    codes: int
    """Codes to draw."""
    seed: int
    """In [0, 2**64)."""
    image_token_offset: int
    """Id of code 0."""
    codebook_size: int
    sampling: SamplingSettings
    pair: str | None = None
    """A name that only the two rows of a guided image share; None without guidance."""
    role: Role = "conditional"
    fixed_codes: list[int] | None = None
    """Codes to keep in raster order, -1 where one is drawn."""

    def extra_args(self) -> dict[str, Any]:
        """As a request carries it."""
        return {KEY: dataclasses.asdict(self)}

    @classmethod
    def of(cls, params: Any) -> ImageRequest:
        """Read from vLLM's sampling parameters. Raises ValueError if they do not ask for an image."""
        values = (params.extra_args or {}).get(KEY)
        if values is None:
            raise ValueError(f"this engine only draws images, and the request has no {KEY!r} in its extra arguments.")
        return cls(**{**values, "sampling": SamplingSettings(**values["sampling"])})
