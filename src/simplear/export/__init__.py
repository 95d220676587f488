"""What leaves the project: a directory that stock transformers and vLLM load, with a card that says what it is."""

from simplear.export.command import export

__all__ = ["export"]
