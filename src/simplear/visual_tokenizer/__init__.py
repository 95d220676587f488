"""Pictures to grids of discrete codes and back.

`VisualTokenizer` is what the rest of the system asks for, `FSQAutoencoder` the one that is trained here,
`CosmosTokenizer` and `JanusTokenizer` pretrained ones, and `save_visual_tokenizer` and `load_visual_tokenizer` a
tokenizer's directory on disk. This package knows nothing of captions, of sequences or of training.
"""

from simplear.visual_tokenizer.checkpoint import (
    copy_visual_tokenizer,
    load_visual_tokenizer,
    register_visual_tokenizer,
    save_visual_tokenizer,
)
from simplear.visual_tokenizer.cosmos import CosmosTokenizer
from simplear.visual_tokenizer.fsq import FSQAutoencoder
from simplear.visual_tokenizer.janus import JanusTokenizer
from simplear.visual_tokenizer.protocol import VisualTokenizer, to_pixels

__all__ = [
    "CosmosTokenizer",
    "FSQAutoencoder",
    "JanusTokenizer",
    "VisualTokenizer",
    "copy_visual_tokenizer",
    "load_visual_tokenizer",
    "register_visual_tokenizer",
    "save_visual_tokenizer",
    "to_pixels",
]
