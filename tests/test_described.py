"""Descriptions tell apart what makes different results, and nothing else; they survive pickling, and keep no secret."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from corpora import pictures, write_folder, write_parquet, write_webdataset
from simplear.data import (
    AspectBuckets,
    CentreCrop,
    HuggingFaceSource,
    ImageFolderSource,
    Listed,
    MinimumScore,
    RecaptionedSource,
    ScenesSource,
    ServerCaptioner,
    WebDatasetSource,
)
from simplear.described import Described, description
from simplear.rewards import CLIPReward, HPSv2Reward, WeightedReward


class Colour(Enum):
    RED = 1


class Scorer:
    """One of a user's own, which describes nothing."""

    def __init__(self, model: str, api_key: str = "geheim", inner: object = None) -> None:
        self.model, self.api_key, self.inner = model, api_key, inner
        self._state = object()


class Own(Described):
    def __init__(self, a: int, *rest: object, b: Any = 2, **more: Any) -> None:
        self.a = a


class Inheriting(Own):
    """Its arguments are those of its base."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with small corpora."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_folder(tmp_path / "pictures", pictures(2))
    write_folder(tmp_path / "more", pictures(2))
    write_webdataset(tmp_path / "tars/0.tar", pictures(2))
    write_parquet(tmp_path / "rows.parquet", pictures(2))
    (tmp_path / "list.txt").write_text("a\nb\n")
    (tmp_path / "same.txt").write_text("b\n\na\n")
    (tmp_path / "other.txt").write_text("a\nc\n")
    (tmp_path / "clip").mkdir()
    return tmp_path


def rows(**options: Any) -> HuggingFaceSource:
    return HuggingFaceSource("parquet", **{"data_files": "rows.parquet", **options})


APART: dict[str, tuple[Callable[[], Described], Callable[[], Described]]] = {
    "entries of a list": (lambda: Listed("list.txt"), lambda: Listed("other.txt")),
    "model of a score": (lambda: MinimumScore(CLIPReward("A"), 0), lambda: MinimumScore(CLIPReward("B"), 0)),
    "weights of a score": (
        lambda: MinimumScore(HPSv2Reward("a.pt"), 0),
        lambda: MinimumScore(HPSv2Reward("b.pt"), 0),
    ),
    "model of a score of one's own": (lambda: MinimumScore(Scorer("A"), 0), lambda: MinimumScore(Scorer("B"), 0)),
    "score within a sum": (
        lambda: MinimumScore(WeightedReward({"x": CLIPReward("A")}), 0),
        lambda: MinimumScore(WeightedReward({"x": CLIPReward("B")}), 0),
    ),
    "root of pictures": (lambda: rows(image_root="pictures"), lambda: rows(image_root="more")),
    "captions wanted or not": (rows, lambda: rows(captions_required=False)),
    "folder": (lambda: ImageFolderSource("pictures"), lambda: ImageFolderSource("more")),
    "captions of a folder": (
        lambda: ImageFolderSource("pictures"),
        lambda: ImageFolderSource("pictures", captions_required=False),
    ),
    "columns of tars": (lambda: WebDatasetSource("tars"), lambda: WebDatasetSource("tars", captions=["x"])),
    "seed of scenes": (lambda: ScenesSource(1, 16), lambda: ScenesSource(1, 16, seed=1)),
    "class alone": (CentreCrop, AspectBuckets),
    "step of a crop": (AspectBuckets, lambda: AspectBuckets(step=1)),
    "class of the same name": (lambda: Own(1), lambda: type("Own", (Own,), {"__module__": "elsewhere"})(1)),
}
ALIKE: dict[str, tuple[Callable[[], Described], Callable[[], Described]]] = {
    "path of a list": (lambda: Listed("list.txt"), lambda: Listed("same.txt")),
    "path of a folder": (
        lambda: ImageFolderSource("pictures"),
        lambda: ImageFolderSource(str(Path("pictures").resolve())),
    ),
    "files of rows": (rows, lambda: rows(data_files=[str(Path("rows.parquet").resolve())][0])),
    "pattern of rows": (
        lambda: rows(data_files="*.parquet"),
        lambda: rows(data_files=str(Path().resolve() / "*.parquet")),
    ),
    "path of a model": (lambda: CLIPReward("clip"), lambda: CLIPReward(str(Path("clip").resolve()))),
    "how much at once": (lambda: CLIPReward("A"), lambda: CLIPReward("A", batch_size=1)),
    "where tars lie": (lambda: WebDatasetSource("tars/0.tar"), lambda: WebDatasetSource(["tars/*.tar"])),
    "machine of a server": (
        lambda: ServerCaptioner("http://a:1/v1", "m"),
        lambda: ServerCaptioner("http://b:2/v1", "m", timeout=1, tries=9, concurrency=1),
    ),
    "by place or by name": (lambda: AspectBuckets(2.0, 4), lambda: AspectBuckets(step=4)),
}


@pytest.mark.parametrize("what", APART)
def test_what_makes_other_results_is_described_otherwise(here: Path, what: str) -> None:
    one, other = (make().describe() for make in APART[what])
    assert json.loads(json.dumps(one)) == one != other


@pytest.mark.parametrize("what", ALIKE)
def test_what_makes_the_same_results_is_described_alike(here: Path, what: str) -> None:
    one, other = (make().describe() for make in ALIKE[what])
    assert one == other


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, "a", None, True, 2.5), [1, "a", None, True, 2.5]),
        ({"a": {1, 2}, "password": "geheim"}, {"a": [1, 2]}),
        (Path("/a/../b"), "/b"),
        (torch.bfloat16, "torch.bfloat16"),
        (Colour.RED, "<Colour.RED: 1>"),
        (ScenesSource, "ScenesSource"),
        (json.dumps, "json.dumps"),
        (object(), {"class": "builtins.object"}),
        (Scorer("m"), {"class": "test_described.Scorer", "model": "m", "inner": None}),
        (
            Scorer("m", inner=Scorer("n")),
            {"class": "test_described.Scorer", "model": "m", "inner": "test_described.Scorer"},
        ),
        ([CentreCrop()], [{"class": "CentreCrop"}]),
        ("https://user:geheim@host/x", "https://host/x"),
        ("caf\udce9", "caf\\udce9"),
    ],
)
def test_values(value: Any, expected: Any) -> None:
    assert description(value) == expected


@pytest.mark.parametrize(
    "secret", ["api_key", "key_api_key", "token", "hf_token", "access_token", "password", "client_secret", "apikey"]
)
def test_secrets_are_not_kept(secret: str) -> None:
    described = Own(1, b={secret: "geheim"}, **{secret: "geheim"}).describe()
    assert "geheim" not in json.dumps(described) and described["b"] == {}


@pytest.mark.parametrize("setting", ["max_tokens", "long_tokens", "key", "keyword", "tokenizer", "pad_token_id"])
def test_settings_of_like_names_are_kept(setting: str) -> None:
    assert Own(1, **{setting: 3}).describe()[setting] == 3


def test_arguments_are_bound_and_defaults_filled_in() -> None:
    expected = {"class": "test_described.Inheriting", "a": 1, "rest": [5], "b": 2, "c": 3}
    assert Inheriting(1, 5, c=3).describe() == expected
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'a'"):
        Own()


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
@pytest.mark.parametrize("made", [ScenesSource(3, 16, seed=4), CentreCrop(), MinimumScore(CLIPReward("A"), 0.5)])
def test_copies_are_described_alike(made: Described, again: Callable[[Described], Described]) -> None:
    assert again(made).describe() == made.describe()


def test_a_source_within_a_source(here: Path) -> None:
    """And no list of units anywhere."""
    captions = here / "captions"
    captions.mkdir()
    inner = WebDatasetSource("tars/0.tar")
    manifest = {"format_version": 1, "source": inner.describe(), "captioner": {"model": "a"}, "shards": []}
    (captions / "manifest.json").write_text(json.dumps(manifest))
    described = RecaptionedSource(inner, "captions").describe()
    assert (
        described["source"]
        == inner.describe()
        == {
            "class": "WebDatasetSource",
            "captions": None,
            "metadata": None,
            "captions_required": True,
        }
    )
    (captions / "manifest.json").write_text(json.dumps({**manifest, "shards": [{"file": "0.parquet", "sha256": "1"}]}))
    assert RecaptionedSource(inner, "captions").describe() == described
