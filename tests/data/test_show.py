from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simplear.cli import main
from simplear.data.jobs.texts import write_texts
from simplear.data.shards import (
    TokenRow,
    TokenShards,
    claim_directory,
    merge_manifest,
    read_manifest,
    write_shard,
)
from simplear.data.shards.show import RowSample, facts_of, page_html, sample_rows

from .conftest import MeanTokenizer, make_rows, write_rows


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Rows whose codes are 0, 1, 2, 3 alike and nothing else, of two grids."""
    claim_directory(
        tmp_path,
        {
            "visual_tokenizer": MeanTokenizer.fingerprint,
            "codebook_size": 256,
            "downsample": 4,
            "source": {"name": "<s>"},
        },
    )
    square = [
        TokenRow(f"k{n}", np.array([[0, 1], [2, 3]], np.uint16), ["short", f"a <b>long</b> one & ${n}"])
        for n in range(9)
    ]
    wide = [TokenRow(f"w{n}", np.array([[3, 2, 1, 0]], np.uint16), ["one two three"]) for n in range(3)]
    write_shard(tmp_path, "a", square, {"no caption": 2, "not a picture": 1})
    write_shard(tmp_path, "b", wide, {"no caption": 5})
    merge_manifest(tmp_path, "ab")
    return tmp_path


def sampled(directory: Path, tokenizer: MeanTokenizer | None, pictures: int, rows: int) -> tuple[RowSample, str]:
    """The sample, and the page with it."""
    shards, manifest = TokenShards(directory), read_manifest(directory)
    sample = sample_rows(shards, tokenizer, pictures, rows)
    return sample, page_html(str(directory), manifest, facts_of(shards, manifest, sample), sample)


def test_what_is_counted(directory: Path) -> None:
    sample, page = sampled(directory, None, 4, 100)
    assert sample.rows == 12 and sample.code_counts[:5].tolist() == [12, 12, 12, 12, 0]
    assert sorted(set(sample.words)) == [1, 3, 5]
    assert "4 of 256 occur; entropy 2.00 of 8.00 bits, perplexity 4" in page
    assert "7 no caption, 1 not a picture" in page and "1 × 4: 3, 2 × 2: 9" in page
    assert {len(captions) for _, captions, _ in sample.examples} == {1, 2}


def test_the_page_is_complete_and_shows_the_decoded_codes(directory: Path) -> None:
    sample, page = sampled(directory, MeanTokenizer(), 12, 12)
    assert "a &lt;b&gt;long&lt;/b&gt; one &amp; $0" in page and "&lt;s&gt;" in page and "<b>" not in page
    assert "<script" not in page
    images = re.findall(r'<img[^>]*src="([^"]*)"', page)
    assert len(images) == 12 + 1 and all(image.startswith("data:image/png;base64,") for image in images)
    keys = [key for key, *_ in sample.examples]
    image = Image.open(io.BytesIO(base64.b64decode(images[keys.index("k0")].partition(",")[2])))
    assert image.size == (8, 8) and np.asarray(image)[::4, ::4, 0].tolist() == [[0, 1], [2, 3]]


def test_a_sample_is_spread_over_the_set(tmp_path: Path) -> None:
    write_rows(tmp_path, {"a": make_rows(900, (2, 2))})
    sample, _ = sampled(tmp_path, None, 3, 100)
    numbers = [int(key.removeprefix("row")) for key, *_ in sample.examples]
    assert sample.rows == 100 and sample.code_counts.sum() == 400 and max(numbers) - min(numbers) > 100


def test_the_verb_writes_a_page(
    tiny_shards: str, tiny_visual_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["data", "show", tiny_shards, "--visual-tokenizer", tiny_visual_tokenizer, "--out", str(tmp_path)])
    assert "entropy" in capsys.readouterr().out
    page = (tmp_path / "overview.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and page.count("<img") > 1


def test_texts_have_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words\nof a text")
    write_texts([str(tmp_path / "a.txt")], str(tmp_path / "set"))
    main(["data", "show", str(tmp_path / "set")])
    page = (tmp_path / "set" / "overview.html").read_text()
    assert "some words" in page and "none: texts alone" in page and "entropy" not in page


def test_another_visual_tokenizer_is_refused(directory: Path, tiny_visual_tokenizer: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["data", "show", str(directory), "--visual-tokenizer", tiny_visual_tokenizer])
    assert stopped.value.code == 2 and not (directory / "overview.html").exists()
