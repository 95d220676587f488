from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from jsonargparse import ArgumentParser

from corpora import Picture, png, write_folder, write_webdataset
from simplear.command_line import PARSER_MODE
from simplear.data import (
    AspectRatio,
    CaptionLength,
    Column,
    Filter,
    ImageFolderSource,
    Listed,
    MinimumScore,
    PixelLimit,
    Sample,
    ShortEdge,
    TokenShards,
    WebDatasetSource,
    tokenize,
)
from simplear.data.sample import Drop, PictureFile
from simplear.data.shards import MANIFEST_FILE
from simplear.data.shards.drops import DROPS_FILE

from .conftest import MeanTokenizer


def sample(width: int = 8, height: int = 8, captions: tuple[str, ...] = ("x",), **metadata: object) -> Sample:
    return Sample("k", np.zeros((height, width, 3), np.uint8), captions, metadata)


def verdict(filter_: Filter, of: Sample) -> str | None:
    try:
        filter_.check(of)
    except Drop as reason:
        return str(reason)
    return None


@pytest.mark.parametrize(
    ("filter_", "kept", "dropped", "reason"),
    [
        (ShortEdge(8), sample(8, 9), sample(100, 7), "short edge under 8 pixels"),
        (AspectRatio(2), sample(8, 16), sample(17, 8), "aspect ratio over 2"),
        (AspectRatio(2), sample(16, 8), sample(8, 17), "aspect ratio over 2"),
        (PixelLimit(64), sample(8, 8), sample(13, 5), "more than 64 pixels"),
        (CaptionLength(2), sample(captions=("ab",)), sample(captions=("abc", "ä")), "caption under 2 characters"),
        (CaptionLength(1, 3), sample(captions=("äöü",)), sample(captions=("a", "abcd")), "caption over 3 characters"),
        (Column("score", 5), sample(score=5), sample(score=4.9), "score under 5"),
        (Column("score", maximum=0.5), sample(score=0.5), sample(score=1), "score over 0.5"),
        (Column("score", 5), sample(score=5), sample(), "no score"),
        (Column("score", 5), sample(score=5), sample(score=None), "no score"),
        (Column("score", 5), sample(score=5), sample(score="5"), "score is no number"),
        (Column("score", 5), sample(score=5), sample(score=float("nan")), "score is no number"),
        (Column("status", equals="success"), sample(status="success"), sample(status="failed"), "status differs"),
        (Column("nsfw", equals=False), sample(nsfw=False), sample(nsfw=True), "nsfw differs"),
        (Column("a.b", 1), sample(a={"b": 1}), sample(a={"b": 0}), "a.b under 1"),
        (Column("a.b", 1), sample(**{"a.b": 2, "a": {"b": 0}}), sample(a=3), "no a.b"),
    ],
)
def test_at_the_limit_a_sample_stays_and_beyond_it_goes(
    filter_: Filter, kept: Sample, dropped: Sample, reason: str
) -> None:
    assert verdict(filter_, kept) is None and verdict(filter_, dropped) == reason


def test_a_missing_column_is_dropped_kept_or_an_error_as_asked() -> None:
    assert verdict(Column("score", 5, missing="keep"), sample()) is None
    with pytest.raises(ValueError, match=r"'k' has no 'score'; it has other"):
        Column("score", 5, missing="error").check(sample(other=1))
    with pytest.raises(ValueError, match=r"nothing is asked of column 'score'"):
        Column("score")


def test_a_list_names_keys_or_values(tmp_path: Path) -> None:
    (tmp_path / "duplicates.txt").write_text("k\n\n 17 \n")
    assert verdict(Listed(str(tmp_path / "duplicates.txt")), sample()) == "listed in duplicates.txt"
    by_hash = Listed(str(tmp_path / "duplicates.txt"), "phash")
    assert [verdict(by_hash, sample(phash=value)) is None for value in (17, "17", 18)] == [False, False, True]
    assert verdict(by_hash, sample()) is None
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.txt lists nothing"):
        Listed(str(tmp_path / "empty.txt"))


def test_sizes_are_read_without_decoding() -> None:
    """Of a file whose pixels are cut off; what is no picture says so at once."""
    content = png(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    cut = Sample("k", PictureFile(content[:100]), ["x"])
    assert cut.size == (60, 40) and verdict(ShortEdge(41), cut) == "short edge under 41 pixels"
    with pytest.raises(Drop, match="truncated"):
        _ = cut.image
    with pytest.raises(Drop, match="not a picture"):
        ShortEdge(1).check(Sample("k", PictureFile(b"<html>"), ["x"]))


class Redness:
    """A score: the mean of the red channel."""

    def __call__(self, images: object, captions: object, metadata: object) -> object:
        assert isinstance(images, torch.Tensor) and float(images.max()) <= 1
        return images[:, 0].mean((1, 2))


CORPUS = [
    Picture("a", png((250, 0, 0)), ["one"], {"score": 6}),
    Picture("b", png((240, 0, 0), (8, 4)), ["two"], {"score": 6}),
    Picture("c", png((230, 0, 0)), ["three"], {"score": 1}),
    Picture("d", b"<html>", ["four"], {"score": 6}),
    Picture("e", png((10, 0, 0)), ["five"], {"score": 6}),
    Picture("f", png((200, 0, 0), (9, 9)), ["six"], {"score": 6}),
    Picture("g", png((190, 0, 0)), [], {"score": 6}),
]


def filters() -> list[Filter]:
    return [ShortEdge(8), Column("score", 5), MinimumScore(Redness(), 0.5)]


def test_every_drop_is_counted_and_listed_by_key(tmp_path: Path) -> None:
    source = ImageFolderSource(str(write_folder(tmp_path / "pictures", CORPUS)), rows_per_unit=3)
    out = tmp_path / "out"
    options = {"visual_tokenizer": MeanTokenizer(), "out": str(out), "height": 8, "width": 8, "accelerator": "cpu"}
    tokenize(source=source, filters=filters(), **options)
    shards = TokenShards(out)
    assert shards.read(np.arange(len(shards))).keys == ["a.png", "f.png"]
    assert pq.read_table(out / DROPS_FILE).to_pylist() == [
        {"unit": "images-000000000", "key": "b.png", "reason": "short edge under 8 pixels"},
        {"unit": "images-000000000", "key": "c.png", "reason": "score under 5"},
        {"unit": "images-000000003", "key": "d.png", "reason": "not a picture"},
        {"unit": "images-000000003", "key": "e.png", "reason": "Redness under 0.5"},
        {"unit": "images-000000006", "key": "g.png", "reason": "no caption"},
    ]
    manifest = json.loads((out / MANIFEST_FILE).read_text())
    assert manifest["filters"][0] == {"class": "ShortEdge", "minimum": 8}
    with pytest.raises(ValueError, match=r"begun with filters\.2\.class = 'MinimumScore', not None: use"):
        tokenize(source=source, filters=filters()[:2], **options)


def test_the_list_does_not_depend_on_workers_or_on_a_stop(tmp_path: Path) -> None:
    source = ImageFolderSource(str(write_folder(tmp_path / "pictures", CORPUS)), rows_per_unit=2)

    def listed(name: str, workers: int = 0) -> bytes:
        options = {"height": 8, "width": 8, "accelerator": "cpu", "num_workers": workers}
        tokenize(
            source=source, visual_tokenizer=MeanTokenizer(), out=str(tmp_path / name), filters=filters(), **options
        )
        return (tmp_path / name / DROPS_FILE).read_bytes()

    whole = listed("one")
    assert listed("two", workers=2) == whole
    for lost in ("images-000000002.json", DROPS_FILE, MANIFEST_FILE):
        (tmp_path / "two" / lost).unlink()
    assert listed("two") == whole


def test_drops_that_a_source_only_counts_are_listed_without_a_key(tmp_path: Path) -> None:
    class Counting(WebDatasetSource):
        def candidates(self, unit, drops):  # type: ignore[no-untyped-def]
            drops["lost"] += 2
            yield from super().candidates(unit, drops)

    write_webdataset(tmp_path / "x.tar", CORPUS[:2])
    options = {"visual_tokenizer": MeanTokenizer(), "out": str(tmp_path / "out"), "accelerator": "cpu"}
    tokenize(source=Counting(str(tmp_path / "x.tar")), filters=[ShortEdge(8)], **options)
    assert [(row["key"], row["reason"]) for row in pq.read_table(tmp_path / "out" / DROPS_FILE).to_pylist()] == [
        ("b", "short edge under 8 pixels"),
        (None, "lost"),
        (None, "lost"),
    ]


def test_filters_come_from_yaml_by_class_path(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "filters:\n"
        "  - {class_path: simplear.data.ShortEdge, init_args: {minimum: 1024}}\n"
        "  - {class_path: simplear.data.Column, init_args: {column: pwatermark, maximum: 0.5, missing: keep}}\n"
        "  - class_path: simplear.data.MinimumScore\n"
        "    init_args: {scorer: {class_path: simplear.rewards.SceneReward}, minimum: 0.5}\n"
    )
    parser = ArgumentParser(parser_mode=PARSER_MODE)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(tokenize)
    given = ["--config", str(config), "--source", "ScenesSource", "--source.count", "1", "--source.resolution", "16"]
    parsed = parser.instantiate_classes(
        parser.parse_args([*given, "--visual_tokenizer", "x", "--out", "y", "--crop", "RandomCrop", "--crop.seed", "3"])
    )
    described = [filter_.describe()["class"] for filter_ in parsed.filters]
    assert described == ["ShortEdge", "Column", "MinimumScore"]
    assert parsed.filters[2].describe()["scorer"]["class"] == "SceneReward" and parsed.crop.seed == 3


def test_a_score_that_is_no_number_names_the_sample() -> None:
    broken = MinimumScore(lambda images, captions, metadata: torch.full((1,), torch.nan), 0.5)
    with pytest.raises(ValueError, match=r"begins with 'k'"):
        broken.keep(torch.zeros(1, 3, 8, 8), [sample()])
