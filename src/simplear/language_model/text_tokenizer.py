"""Training a small byte-level BPE text tokenizer, for corpora that need no pretrained one.

It is a Qwen2 tokenizer with merges of its own (same normalisation, same splitting), so that whatever loads a Qwen2
checkpoint by its ``model_type`` encodes captions as training did. The demo's captions use some seventy words, so a
small vocabulary gives about one token a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import Qwen2Tokenizer

from simplear.errors import UserError
from simplear.sequence import add_special_tokens

SMALLEST_VOCABULARY = 257
"""256 bytes and ``<|endoftext|>``."""


def train_text_tokenizer(captions: Iterable[str], vocab_size: int, directory: str | Path) -> Qwen2Tokenizer:
    """Train a byte-level BPE and save it as a Hugging Face tokenizer directory, the seven special tokens included.

    Args:
        captions: the training text; deterministic in its order.
        vocab_size: at most this many ids, the seven not counted; at least `SMALLEST_VOCABULARY`.
        directory: where the tokenizer is written.

    Raises:
        ValueError: a vocabulary too small to hold every byte.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"vocab_size {vocab_size} is below {SMALLEST_VOCABULARY}: 256 bytes and <|endoftext|>.")
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(iter(captions), vocab_size, show_progress=False)
    add_special_tokens(tokenizer)
    tokenizer.save_pretrained(directory)
    return tokenizer
