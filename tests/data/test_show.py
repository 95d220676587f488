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
from simplear.data.shards import TokenRow, claim_directory, merge_manifest, write_shard
from simplear.data.shards.show import look, page

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


def test_what_is_counted(directory: Path) -> None:
    overview = look(directory, None, 4, 100)
    assert overview.sampled == 12 and overview.code_counts[:5].tolist() == [12, 12, 12, 12, 0]
    assert overview.entropy == 2.0
    assert "4 of 256 occur, 252 do not; entropy 2.00 of 8.00 bits, perplexity 4" in overview.facts["codes"]
    assert overview.drops == {"no caption": 7, "not a picture": 1}
    assert sorted(set(overview.words)) == [1, 3, 5] and overview.captions_a_row == {2: 9, 1: 3}
    assert overview.facts["grids"] == "1 × 4: 3, 2 × 2: 9"
    assert {len(captions) for _, captions, _ in overview.pictures} == {1, 2}


def test_the_page_is_complete_and_shows_the_decoded_codes(directory: Path) -> None:
    tokenizer = MeanTokenizer()
    overview = look(directory, tokenizer, 12, 12)
    text = page(overview)
    assert "a &lt;b&gt;long&lt;/b&gt; one &amp; $0" in text and "&lt;s&gt;" in text and "<b>" not in text
    assert "not a picture" in text and "<script" not in text
    sources = re.findall(r'<img[^>]*src="([^"]*)"', text)
    assert len(sources) == 12 + 1 and all(source.startswith("data:image/png;base64,") for source in sources)
    keys = [key for key, *_ in overview.pictures]
    image = Image.open(io.BytesIO(base64.b64decode(sources[keys.index("k0")].partition(",")[2])))
    assert image.size == (8, 8) and np.asarray(image)[::4, ::4, 0].tolist() == [[0, 1], [2, 3]]


def test_a_sample_is_spread_over_the_set(tmp_path: Path) -> None:
    write_rows(tmp_path, {"a": make_rows(900, (2, 2))})
    overview = look(tmp_path, None, 3, 100)
    numbers = [int(key.removeprefix("row")) for key, *_ in overview.pictures]
    assert overview.sampled == 100 and overview.code_counts.sum() == 400 and max(numbers) - min(numbers) > 100
    assert "100 rows, spread over the set" in overview.facts["looked at"]


def test_the_verb_writes_page_and_picture(
    tiny_shards: str, tiny_visual_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["data", "show", tiny_shards, "--visual-tokenizer", tiny_visual_tokenizer, "--out", str(tmp_path)])
    assert "entropy" in capsys.readouterr().out
    assert (tmp_path / "overview.html").read_text().startswith("<!DOCTYPE html>")
    picture = Image.open(tmp_path / "overview.png")
    assert picture.width > 1000 and len(picture.convert("L").getcolors() or []) > 20


def test_texts_have_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words\nof a text")
    write_texts([str(tmp_path / "a.txt")], str(tmp_path / "set"))
    overview = look(tmp_path / "set", None, 3, 10)
    assert overview.facts["visual tokenizer"] == "none: texts alone" and "codes" not in overview.facts
    assert "some words" in page(overview)
    main(["data", "show", str(tmp_path / "set")])
    assert (tmp_path / "set" / "overview.png").exists()


def test_another_visual_tokenizer_is_refused(directory: Path, tiny_visual_tokenizer: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["data", "show", str(directory), "--visual-tokenizer", tiny_visual_tokenizer])
    assert stopped.value.code == 2 and not (directory / "overview.html").exists()
