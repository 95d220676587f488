"""The text tokenizer of a corpus: a byte-level BPE trained on the captions of a source."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from simplear.data.sources import Source
from simplear.language_model import train_text_tokenizer


def train_text_tokenizer_on(*, source: Source, out: str, vocab_size: int = 512) -> None:
    """Train a text tokenizer on the captions of a source.

    Args:
        source: Captions, with their pictures: ScenesSource, ImageFolderSource, WebDatasetSource, or a class path.
        out: Directory of the text tokenizer; appears once it is complete.
        vocab_size: At most this many ids, special tokens not counted; at least 257.

    Raises:
        FileExistsError: `out` is there already.
    """
    directory = Path(out)
    if directory.exists():
        raise FileExistsError(f"{directory} exists: delete it to train the text tokenizer again.")
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    train_text_tokenizer(_captions(source), vocab_size, unfinished)
    unfinished.rename(directory)


def _captions(source: Source) -> Iterator[str]:
    for unit in source.units():
        for sample in source.read(unit, Counter()):
            yield from sample.captions
