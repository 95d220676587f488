"""Pictures to grids of discrete codes and back.

`VisualTokenizer` is what the rest of the system asks for, `FSQAutoencoder` the one that is trained here, and
`save_visual_tokenizer` and `load_visual_tokenizer` its directory on disk. This package knows nothing of captions, of
sequences or of training.

Place of the pretrained tokenizer of the paper, Cosmos DV8x16x16 (FSQ levels 8, 8, 8, 5, 5, 5 = 64,000 codes, 16 pixels
a code along each side): a class here with the same methods and an ``init_args`` that names its weights. Nothing else
changes, for directories record the class by its path.
"""

from simplear.visual_tokenizer.checkpoint import load_visual_tokenizer, save_visual_tokenizer
from simplear.visual_tokenizer.fsq import FSQAutoencoder
from simplear.visual_tokenizer.protocol import VisualTokenizer, to_pixels

__all__ = ["FSQAutoencoder", "VisualTokenizer", "load_visual_tokenizer", "save_visual_tokenizer", "to_pixels"]
