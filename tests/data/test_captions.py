from __future__ import annotations

from pathlib import Path

import pytest

from simplear.data import ScenesSource, train_text_tokenizer_on
from simplear.language_model import load_text_tokenizer
from simplear.sequence import SPECIAL_TOKENS, encode_captions


def test_captions_of_the_corpus_take_about_one_token_a_word(tmp_path: Path) -> None:
    source = ScenesSource(300, 8)
    train_text_tokenizer_on(source, str(tmp_path / "text"), vocab_size=400)
    tokenizer = load_text_tokenizer(str(tmp_path / "text"))
    captions = list(source.sample(7).captions)
    ids = encode_captions(tokenizer, captions)
    assert [tokenizer.decode(row).strip() for row in ids] == captions
    assert sum(map(len, ids)) <= 1.3 * sum(len(caption.replace(",", " ,").split()) for caption in captions)
    assert set(SPECIAL_TOKENS) <= set(tokenizer.get_vocab())
    with pytest.raises(FileExistsError, match=r"text exists"):
        train_text_tokenizer_on(source, str(tmp_path / "text"))
