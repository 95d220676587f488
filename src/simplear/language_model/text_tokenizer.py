"""Training a small byte-level BPE text tokenizer, for corpora that need no pretrained one.

Like Qwen2.5's: NFC, GPT-style splitting, byte-level pieces, no unknown token; the first word is split as any other.
The demo's captions use some hundred words, so a small vocabulary gives about one token a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from simplear.sequence import add_special_tokens

END_OF_TEXT = "<|endoftext|>"
"""Qwen2.5's padding token; present so that tools that ask for one find it."""


def train_text_tokenizer(captions: Iterable[str], vocab_size: int, directory: str | Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE and save it as a Hugging Face tokenizer directory.

    Args:
        captions: the training text; deterministic in its order.
        vocab_size: at most this many ids, special tokens not counted; at least 257.
        directory: where the tokenizer is written.

    Raises:
        ValueError: a vocabulary too small to hold every byte.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size {vocab_size} is below 257: 256 bytes and {END_OF_TEXT}.")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    add_special_tokens(tokenizer)
    tokenizer.save_pretrained(directory)
    return tokenizer
