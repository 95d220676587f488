"""The small byte-level tokenizer that a corpus trains for itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from simplear.language_model import load_text_tokenizer, train_text_tokenizer
from simplear.sequence import SPECIAL_TOKENS, encode_captions
from toys import CAPTIONS


def test_it_encodes_any_text_and_gives_it_back(tiny_text_tokenizer: str) -> None:
    tokenizer = load_text_tokenizer(tiny_text_tokenizer)
    for text in ["a red circle", "größer 🟦 \n\t", "二つの青い四角", "<|soi|>", "<|endoftext|>"]:
        (ids,) = encode_captions(tokenizer, [text])
        assert tokenizer.decode(ids).strip() == text.strip()


def test_the_first_word_is_split_as_any_other(tiny_text_tokenizer: str) -> None:
    tokenizer = load_text_tokenizer(tiny_text_tokenizer)
    first, later = encode_captions(tokenizer, ["two", "blue two"])
    assert later[-len(first) :] == first


def test_ids_are_the_same_at_each_training_and_the_special_ones_come_last(tmp_path: Path) -> None:
    made = [train_text_tokenizer(CAPTIONS, 280, tmp_path / name) for name in ("a", "b")]
    assert made[0].get_vocab() == made[1].get_vocab()
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    assert made[0].convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(280, 287))
    with pytest.raises(ValueError, match="vocab_size 256 is below 257"):
        train_text_tokenizer(CAPTIONS, 256, tmp_path / "c")
