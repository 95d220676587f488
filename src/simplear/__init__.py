"""SimpleAR: autoregressive text-to-image generation with a plain decoder. Importing this imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simplear.generation import SimpleARPipeline as SimpleARPipeline

__version__ = "0.1.0"
__all__ = ["SimpleARPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "SimpleARPipeline":
        from simplear.generation import SimpleARPipeline

        return SimpleARPipeline
    raise AttributeError(f"module 'simplear' has no attribute {name!r}")
