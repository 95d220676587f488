"""Real pictures from files to codes: crops of photographs give the same rows in every format, filters included."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePath

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from corpora import Picture, png, write_folder, write_parquet, write_webdataset
from data.vision_language import write_vision_language_model
from photographs import CAPTIONS, photographs
from simplear.cli import main
from simplear.data import (
    Column,
    Filter,
    HuggingFaceSource,
    ImageFolderSource,
    RecaptionedSource,
    ShortEdge,
    Source,
    TokenShards,
    TransformersCaptioner,
    WebDatasetSource,
    recaption,
    tokenize,
)
from simplear.data.shards.drops import DROPS_FILE
from simplear.generation import SimpleARPipeline
from toys import write_pretraining

SIDE, SMALLEST, DARKEST = 64, 40, 40.0
SIZE = 32


def crops() -> list[Picture]:
    """Every part of the photographs, also the narrow ones at their edges."""
    found = []
    for name, pixels in photographs().items():
        for top in range(0, pixels.shape[0], SIDE):
            for left in range(0, pixels.shape[1], SIDE):
                part = pixels[top : top + SIDE, left : left + SIDE]
                captions = [CAPTIONS[name], f"part of a photo of {CAPTIONS[name]}"]
                key = f"{name}-{top:04d}-{left:04d}"
                found.append(Picture(key, png(part), captions, {"brightness": float(part.mean())}))
    return found


def filters() -> list[Filter]:
    return [ShortEdge(SMALLEST), Column("brightness", minimum=DARKEST)]


Rows = dict[str, tuple[list[list[int]], list[str]]]


def tokenized(
    source: Source, out: Path, tokenizer: str, filters: list[Filter]
) -> tuple[Rows, Counter[tuple[str, str]]]:
    """Codes and captions by name, and the names and reasons of what is missing."""
    tokenize(
        source=source, visual_tokenizer=tokenizer, out=str(out), height=SIZE, width=SIZE, filters=filters,
        accelerator="cpu",
    )  # fmt: skip
    shards = TokenShards(out)
    shards.verify()
    read = shards.read(np.arange(len(shards)))
    names = [PurePath(key).stem for key in read.keys]
    rows = dict(zip(names, zip(read.codes.tolist(), read.captions, strict=True), strict=True))
    dropped = pq.read_table(out / DROPS_FILE).to_pylist() if (out / DROPS_FILE).exists() else []
    return rows, Counter((PurePath(row["key"]).stem, row["reason"]) for row in dropped)


@pytest.fixture(scope="module")
def corpus() -> list[Picture]:
    return crops()


def test_every_format_gives_the_same_rows_and_drops(
    corpus: list[Picture], tmp_path: Path, tiny_visual_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    parquet = str(write_parquet(tmp_path / "x.parquet", corpus))
    sources: dict[str, Source] = {
        "folder": ImageFolderSource(str(write_folder(tmp_path / "pictures", corpus)), rows_per_unit=len(corpus)),
        "tar": WebDatasetSource(str(write_webdataset(tmp_path / "x.tar", corpus))),
        "parquet": HuggingFaceSource("parquet", data_files=parquet, key="key", rows_per_unit=len(corpus)),
        "stream": HuggingFaceSource("parquet", data_files=parquet, key="key", streaming=True),
    }
    found = {
        name: tokenized(source, tmp_path / name, tiny_visual_tokenizer, filters()) for name, source in sources.items()
    }
    rows, dropped = found["folder"]
    assert all(other == (rows, dropped) for other in found.values())

    # What the filters should have done, from the pictures themselves.
    reasons = Counter(reason for _, reason in dropped.elements())
    narrow = {p.name for p in corpus if min(sides(p)) < SMALLEST}
    dark = {p.name for p in corpus if p.metadata["brightness"] < DARKEST} - narrow
    assert reasons == {f"short edge under {SMALLEST} pixels": len(narrow), f"brightness under {DARKEST}": len(dark)}
    assert rows.keys() == {p.name for p in corpus} - narrow - dark and narrow and dark and len(rows) > 300


@pytest.mark.long
def test_from_every_format_to_a_drawn_picture(
    corpus: list[Picture],
    tmp_path: Path,
    tiny_visual_tokenizer: str,
    tiny_text_tokenizer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Filtered, recaptioned by a tiny Qwen2-VL, tokenized: the same rows; 20 steps of training: the same weights, which
    draw the same picture.
    """
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    some = corpus[::16]
    parquet = str(write_parquet(tmp_path / "x.parquet", some))
    sources: dict[str, Source] = {
        "folder": ImageFolderSource(str(write_folder(tmp_path / "pictures", some)), rows_per_unit=len(some)),
        "tar": WebDatasetSource(str(write_webdataset(tmp_path / "x.tar", some))),
        "parquet": HuggingFaceSource("parquet", data_files=parquet, key="key", rows_per_unit=len(some)),
        "stream": HuggingFaceSource("parquet", data_files=parquet, key="key", streaming=True),
    }
    captioner = TransformersCaptioner(write_vision_language_model(tmp_path / "captioner"))
    rows, drawn = {}, {}
    for name, source in sources.items():
        captions = str(tmp_path / f"{name}-captions")
        recaption(source=source, captioner=captioner, out=captions, long_tokens=24, short_tokens=8, accelerator="cpu")
        recaptioned = RecaptionedSource(source, captions, keep_original=True)
        shards = tmp_path / f"{name}-shards"
        rows[name] = tokenized(recaptioned, shards, tiny_visual_tokenizer, filters())
        (tmp_path / name).mkdir()
        config = write_pretraining(tmp_path / name, tiny_text_tokenizer, tiny_visual_tokenizer, str(shards))
        main(["fit", "--config", str(config), "--trainer.max_steps", "20"])
        pipeline = SimpleARPipeline.from_pretrained(tmp_path / name / "run/model", device="cpu")
        drawn[name] = pipeline(CAPTIONS["cat"], seed=0)
    kept, dropped = rows["folder"]
    assert len(kept) > 15 and dropped and all(other == (kept, dropped) for other in rows.values())
    originals = {picture.name: list(picture.captions) for picture in some}
    assert any(texts[0] not in originals[name] for name, (_, texts) in kept.items())
    assert all(texts[-2:] == originals[name] for name, (_, texts) in kept.items())
    assert drawn["folder"].images[0].size == (SIZE, SIZE)
    assert all(torch.equal(each.codes, drawn["folder"].codes) for each in drawn.values())


def sides(picture: Picture) -> tuple[int, int]:
    """Width and height from the PNG header itself."""
    return int.from_bytes(picture.content[16:20], "big"), int.from_bytes(picture.content[20:24], "big")
