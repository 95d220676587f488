from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from corpora import pictures, write_folder, write_webdataset
from simplear.data import ImageFolderSource, ScenesSource, WebDatasetSource, train_text_tokenizer_on
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


def test_pictures_whose_captions_are_not_used_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("with", "without"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "with.txt").write_text("a black square")
    train_text_tokenizer_on(ImageFolderSource(str(tmp_path)), str(tmp_path / "text"), vocab_size=300)
    assert "1 pictures dropped: no caption" in caplog.text


def test_no_picture_is_decoded_for_its_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    write_folder(tmp_path / "pictures", pictures(3))
    write_webdataset(tmp_path / "x.tar", pictures(3))
    monkeypatch.setattr("simplear.data.sample.open_rgb", decode)
    sources = [ImageFolderSource(str(tmp_path / "pictures")), WebDatasetSource(str(tmp_path / "x.tar"))]
    for number, source in enumerate(sources):
        train_text_tokenizer_on(source, str(tmp_path / f"text{number}"), vocab_size=300)
    texts = [load_text_tokenizer(str(tmp_path / f"text{number}")).get_vocab() for number in range(2)]
    assert texts[0] == texts[1]
