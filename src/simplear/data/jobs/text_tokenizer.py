"""A text tokenizer from a source's captions: ``simplear train-text-tokenizer``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from simplear.atomic import whole_directory
from simplear.data.sample import Dropped, warn_of_drops
from simplear.data.sources.base import Source
from simplear.errors import ExistingFileError, UserError
from simplear.language_model import train_text_tokenizer


def train_text_tokenizer_on(source: Source, out: str, *, vocab_size: int = 512) -> None:
    """Train a small byte-level BPE on all captions of a source; for corpora that need no pretrained tokenizer.

    Args:
        source: Pictures and captions: ScenesSource, ImageFolderSource, WebDatasetSource, or a class path.
        out: Directory for the tokenizer; must not exist.
        vocab_size: At most this many ids, special tokens not counted; 257 or more.

    Raises:
        FileExistsError: the directory exists; token ids of an earlier training would change their meaning.
        ValueError: the source has no captions.
    """
    directory = Path(out)
    if directory.exists():
        raise ExistingFileError(
            f"{out} exists: checkpoints may depend on it. Remove it first, or name another directory."
        )
    captions = list(_captions(source))
    if not captions:
        raise UserError(f"the {type(source).__name__} has no captions to train on.")
    with whole_directory(directory) as partial:
        train_text_tokenizer(captions, vocab_size, partial)
    print(f"text tokenizer trained on {len(captions)} captions: {directory}")


def _captions(source: Source) -> Iterator[str]:
    dropped: list[Dropped] = []
    for unit in source.units():
        for sample in source.read(unit, dropped):  # pictures stay undecoded
            yield from sample.captions
    warn_of_drops(Counter(reason for _, reason in dropped))
