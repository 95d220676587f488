"""Recaptioning a source: what is written, what is resumed, and the source that reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from corpora import pictures, png, write_webdataset
from simplear.cli import main
from simplear.data import (
    Captioner,
    ImageFolderSource,
    RecaptionedSource,
    Sample,
    ScenesSource,
    ServerCaptioner,
    Source,
    TokenShards,
    TransformersCaptioner,
    Unit,
    WebDatasetSource,
    recaption,
    tokenize,
)
from simplear.data.jobs.captioners import Answer
from simplear.data.sample import Drop, Dropped
from simplear.data.shards import MANIFEST_FILE

from .caption_server import MODEL, caption_server
from .conftest import MeanTokenizer
from .vision_language import write_vision_language_model


class MeanCaptioner(Captioner):
    """Says how bright a picture is; of every fourth picture it says too little or too much."""

    def __init__(self, name: str = "mean") -> None:
        self.name = name
        self.pictures = 0

    def describe(self) -> dict[str, Any]:
        return {"class": "MeanCaptioner", "model": self.name}

    def prepare(self, device: torch.device) -> None:
        pass

    def answer(self, images: list[Image.Image], prompt: str, max_tokens: int) -> list[Answer]:
        self.pictures += len(images)
        answers = []
        for image in images:
            mean = int(np.asarray(image).mean() * 1000)
            text = "" if mean % 4 == 0 else f"{'short' if 'short' in prompt else 'long'} {mean}"
            answers.append(Answer(text, finished=mean % 4 != 1))
        return answers


def run(source: Source, out: Path, captioner: Captioner | None = None, **options: Any) -> dict[str, str]:
    """Hashes of the tables."""
    recaption(source=source, captioner=captioner or MeanCaptioner(), out=str(out), accelerator="cpu", **options)
    return hashes(out)


def hashes(out: Path) -> dict[str, str]:
    manifest = json.loads((out / MANIFEST_FILE).read_text())
    return {unit["file"]: unit["sha256"] for unit in manifest["shards"]}


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for file in hashes(out) for row in parquet.read_table(out / file).to_pylist()]


def test_rows_hold_both_captions_or_the_reason_and_the_captions_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = ScenesSource(40, 16, rows_per_unit=15)
    run(source, tmp_path, batch_size=4)
    read = rows(tmp_path)
    assert [row["key"] for row in read] == [source.sample(index).key for index in range(40)]
    assert [row["captions"] for row in read] == [list(source.sample(index).captions) for index in range(40)]
    counted: Counter[str] = Counter()
    for row, sample in zip(read, map(source.sample, range(40)), strict=True):
        mean = int(np.asarray(sample.image).mean() * 1000)
        for kind, tokens in (("long", 256), ("short", 64)):
            problem = {0: "empty", 1: f"cut off after {tokens} tokens"}.get(mean % 4)
            assert row[f"{kind}_problem"] == problem
            assert row[kind] == (None if problem else f"{kind} {mean}")
            counted.update([f"{kind}: {problem}"] if problem else [])
    assert len(counted) == 4
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text())
    assert sum((Counter(unit["problems"]) for unit in manifest["shards"]), Counter()) == counted
    assert manifest["captioner"] == {"class": "MeanCaptioner", "model": "mean"} and "prompt" in manifest["long"]
    assert f"{counted['long: empty']} of 40 captions not usable: long: empty" in caplog.text


def test_pictures_that_cannot_be_read_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 9, 9)).save(tmp_path / f"pictures/{number}.png")
        (tmp_path / f"pictures/{number}.txt").write_text("a picture")
    (tmp_path / "pictures/1.png").write_bytes(b"broken")
    run(ImageFolderSource(str(tmp_path / "pictures")), tmp_path / "out")
    sidecar = json.loads((tmp_path / "out/images-000000000.json").read_text())
    assert sidecar["rows"] == 2 and sidecar["drops"] == {"not a picture": 1}
    assert "1 pictures dropped on rank 0: not a picture" in caplog.text


def test_finished_units_are_not_asked_again_and_other_settings_are_refused(tmp_path: Path) -> None:
    source, captioner = ScenesSource(20, 16, rows_per_unit=5), MeanCaptioner()
    whole = run(source, tmp_path, captioner)
    assert captioner.pictures == 40
    (tmp_path / "train-seed0-000000005.json").unlink()
    table = tmp_path / "train-seed0-000000010.parquet"
    table.write_bytes(table.read_bytes()[:-1])
    assert run(source, tmp_path, captioner) == whole and captioner.pictures == 60
    for change in ({"captioner": MeanCaptioner("other")}, {"long_prompt": "?"}, {"short_tokens": 9}, {"batch_size": 3}):
        with pytest.raises(ValueError, match="was begun with"):
            run(source, tmp_path, **change)
    with pytest.raises(ValueError, match="1 or more"):
        run(source, tmp_path / "new", max_pixels=0)


def test_loader_processes_change_nothing(tmp_path: Path) -> None:
    source = ScenesSource(25, 16, rows_per_unit=5)
    assert run(source, tmp_path / "two", num_workers=2) == run(source, tmp_path / "one")


def test_a_source_has_its_new_captions(tmp_path: Path) -> None:
    source = ScenesSource(40, 16, rows_per_unit=15)
    run(source, tmp_path / "captions")
    new = RecaptionedSource(source, str(tmp_path / "captions"))
    usable = {row["key"]: [row["long"], row["short"]] for row in rows(tmp_path / "captions") if row["long"]}
    dropped: list[Dropped] = []
    samples = [sample for unit in new.units() for sample in new.read(unit, dropped)]
    assert {sample.key: list(sample.captions) for sample in samples} == usable
    assert Counter(reason for _, reason in dropped) == {"no usable new caption": 40 - len(usable)}
    both = RecaptionedSource(source, str(tmp_path / "captions"), keep_original=True)
    kept = {sample.key: list(sample.captions) for unit in both.units() for sample in both.read(unit, [])}
    assert len(kept) == 40
    for index in range(40):
        sample = source.sample(index)
        assert kept[sample.key] == usable.get(sample.key, []) + list(sample.captions)
    tokenize(source=new, visual_tokenizer=MeanTokenizer(), out=str(tmp_path / "shards"), accelerator="cpu")
    shards = TokenShards(tmp_path / "shards")
    read = shards.read(np.arange(len(usable)))
    assert dict(zip(read.keys, read.captions, strict=True)) == usable
    assert new.describe() != both.describe()


class Keys(Source):
    """Pictures under given keys, so that the same key can come twice or be new."""

    def __init__(self, keys: str) -> None:
        self.keys = keys

    def units(self) -> list[Unit]:
        return [Unit("all", None)]

    def read(self, unit: Unit, dropped: list[Dropped]) -> Iterator[Sample]:
        for number, key in enumerate(self.keys):
            yield Sample(key, np.full((8, 8, 3), 3 + 4 * number, np.uint8), ["old"])

    def describe(self) -> dict[str, Any]:
        return {"class": "Keys"}


class Undecoded:
    """A sample whose picture is decoded when it is asked for, and cannot be."""

    key, captions = "x", ("old",)

    @property
    def image(self) -> Image.Image:
        raise Drop("truncated or damaged picture")


class PartlyDamaged(Keys):
    """The key x has a damaged picture."""

    def read(self, unit: Unit, dropped: list[Dropped]) -> Iterator[Any]:
        for sample in super().read(unit, dropped):
            yield Undecoded() if sample.key == "x" else sample


def test_a_picture_that_is_found_damaged_when_it_is_decoded_is_counted(tmp_path: Path) -> None:
    run(PartlyDamaged("axb"), tmp_path)
    assert [row["key"] for row in rows(tmp_path)] == ["a", "b"]
    assert json.loads((tmp_path / "all.json").read_text())["drops"] == {"truncated or damaged picture": 1}


def test_nothing_to_describe_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"no picture was kept \(1 not a picture\)"):
        recaption(
            source=ImageFolderSource(str(tmp_path / "in"), captions_required=False),
            captioner=MeanCaptioner(),
            out=str(tmp_path / "out"),
            accelerator="cpu",
        )
    assert not (tmp_path / "out/manifest.json").exists()


class Told(MeanCaptioner):
    """Always answers."""

    def answer(self, images: list[Image.Image], prompt: str, max_tokens: int) -> list[Answer]:
        return [Answer(f"picture {np.asarray(image)[0, 0, 0]}") for image in images]


def test_a_key_without_a_row_is_counted(tmp_path: Path) -> None:
    run(Keys("aba"), tmp_path, Told())
    dropped: list[Dropped] = []
    read = list(RecaptionedSource(Keys("abc"), str(tmp_path)).read(Unit("all", None), dropped))
    assert [sample.captions[0] for sample in read] == ["picture 3", "picture 7"]
    assert dropped == [("c", "no row in the captions")]
    originals = RecaptionedSource(Keys("abc"), str(tmp_path), keep_original=True)
    assert len(list(originals.read(Unit("all", None), dropped))) == 2 and len(dropped) == 2


def corpus(directory: Path, **counts: int) -> str:
    """Tars of so many pictures; a pattern of them."""
    for number, (name, count) in enumerate(counts.items()):
        colours = [replace(picture, content=png((number, 9, 9))) for picture in pictures(count)]
        write_webdataset(directory / f"{name}.tar", colours)
    return str(directory / "*.tar")


def test_tars_come_and_go_and_only_new_work_is_done(tmp_path: Path) -> None:
    """Through both steps: captions, and shards of the pictures with them."""
    captioner = MeanCaptioner()

    def both(paths: str | list[str]) -> dict[str, str]:
        source = WebDatasetSource(paths)
        run(source, tmp_path / "captions", captioner)
        new = RecaptionedSource(source, str(tmp_path / "captions"), keep_original=True)
        out = tmp_path / "shards"
        tokenize(source=new, visual_tokenizer=MeanTokenizer(), out=str(out), accelerator="cpu")
        return hashes(out)

    one = both(corpus(tmp_path / "tars", a=3, b=3, c=3))
    asked = captioner.pictures
    assert both([str(tmp_path / "tars" / f"{name}.tar") for name in "ac"]) == {
        name: digest for name, digest in one.items() if name != "b.arrow"
    }
    assert captioner.pictures == asked
    more = both(corpus(tmp_path / "tars", a=3, b=3, c=3, d=2))
    assert {name: more[name] for name in one} == one and captioner.pictures == asked + 4


def test_captions_of_another_tar_of_the_same_name_are_refused(tmp_path: Path) -> None:
    """Whose keys are the same, as all of img2dataset's are."""
    one, other = (WebDatasetSource(corpus(tmp_path / name, a=count)) for name, count in (("one", 3), ("other", 4)))
    run(one, tmp_path / "captions")
    new = RecaptionedSource(other, str(tmp_path / "captions"))
    said = r"captions in .*/a\.parquet are of a of \d+ bytes, .* the source's a has \d+ bytes"
    with pytest.raises(ValueError, match=said):
        list(new.read(new.units()[0], []))
    with pytest.raises(ValueError, match=said):
        tokenize(source=new, visual_tokenizer=MeanTokenizer(), out=str(tmp_path / "out"), accelerator="cpu")


def test_shards_of_other_captions_are_not_mixed_in(tmp_path: Path) -> None:
    """Of a unit that was recaptioned since, the shard is refused."""
    source = WebDatasetSource(corpus(tmp_path / "tars", a=3, b=3))
    for captioner in (MeanCaptioner(), Told()):
        run(source, tmp_path / "captions", captioner)
        new = RecaptionedSource(source, str(tmp_path / "captions"), keep_original=True)
        options = {"visual_tokenizer": MeanTokenizer(), "out": str(tmp_path / "out"), "accelerator": "cpu"}
        if isinstance(captioner, Told):
            with pytest.raises(ValueError, match=r"a\.arrow was made from a of .*captions of SHA-256"):
                tokenize(source=new, **options)
        else:
            tokenize(source=new, **options)
        for file in (tmp_path / "captions").glob("?.json"):
            file.unlink()


def test_captions_that_do_not_belong_or_are_damaged_are_named(tmp_path: Path) -> None:
    source = ScenesSource(10, 16, rows_per_unit=5)
    with pytest.raises(FileNotFoundError, match=r"manifest\.json is missing.*simplear recaption"):
        RecaptionedSource(source, str(tmp_path))
    run(source, tmp_path)
    with pytest.raises(ValueError, match=r"are of another source \(source\.seed = 0, not 1\)"):
        RecaptionedSource(ScenesSource(10, 16, rows_per_unit=5, seed=1), str(tmp_path))
    new = RecaptionedSource(source, str(tmp_path))
    table = tmp_path / "train-seed0-000000005.parquet"
    content = bytearray(table.read_bytes())
    content[40] ^= 1
    table.write_bytes(content)
    list(new.read(new.units()[0], []))
    with pytest.raises(ValueError, match=r"000000005\.parquet is not as it was written: delete it"):
        list(new.read(new.units()[1], []))
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"000000005\.parquet is missing"):
        list(new.read(new.units()[1], []))
    manifest = tmp_path / MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match="format version 2, this code reads 1"):
        RecaptionedSource(source, str(tmp_path))
    manifest.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is not JSON"):
        RecaptionedSource(source, str(tmp_path))


def test_from_the_command_line_to_token_shards(tmp_path: Path, tiny_visual_tokenizer: str) -> None:
    """With the real classes of Qwen2-VL: recaption, then tokenize what it wrote."""
    model = write_vision_language_model(tmp_path / "model")
    scenes = ["ScenesSource", "--source.count", "12", "--source.resolution", "32", "--source.rows_per_unit", "5"]
    command = ["recaption", "--source", *scenes, "--captioner", "TransformersCaptioner", "--captioner.model", model]
    command += ["--long-tokens", "16", "--short-tokens", "8", "--accelerator", "cpu", "--batch-size", "4"]
    main([*command, "--out", str(tmp_path / "captions")])
    written = rows(tmp_path / "captions")
    usable = [row for row in written if row["long"] or row["short"]]
    assert len(written) == 12 and len({row["long"] for row in written}) > 2 and usable
    inner = [word.replace("--source.", "--source.source.") for word in scenes[1:]]
    source = ["--source", "RecaptionedSource", "--source.captions", str(tmp_path / "captions")]
    source += ["--source.source", scenes[0], *inner]
    source += ["--visual-tokenizer", tiny_visual_tokenizer, "--accelerator", "cpu"]
    main(["tokenize", *source, "--out", str(tmp_path / "shards")])
    shards = TokenShards(tmp_path / "shards")
    assert shards.read(np.arange(len(usable))).captions == [
        [row[kind] for kind in ("long", "short") if row[kind]] for row in usable
    ]
    again = TransformersCaptioner(model)
    source_of_scenes = ScenesSource(12, 32, rows_per_unit=5)
    options = {"long_tokens": 16, "short_tokens": 8, "batch_size": 4}
    assert run(source_of_scenes, tmp_path / "again", again, **options) == hashes(tmp_path / "captions")


def test_with_a_server_that_stops_on_the_way(tmp_path: Path) -> None:
    """What was finished is kept; the resumed run asks for the rest alone and ends in the same bytes."""
    source = ScenesSource(20, 16, rows_per_unit=5)
    with caption_server() as server:
        whole = run(source, tmp_path / "whole", ServerCaptioner(server.url, MODEL))
        asked = len(server.requests)
        answer = server.answer
        server.answer = lambda picture, body: 503 if len(server.requests) > asked + 24 else answer(picture, body)
        stopping = ServerCaptioner(server.url, MODEL, tries=2, concurrency=1)
        with pytest.raises(ConnectionError, match=r"no answer in 2 tries.*503.* finished are kept"):
            run(source, tmp_path / "stopped", stopping, batch_size=8)
        assert len(list((tmp_path / "stopped").glob("*.parquet"))) == 2
        server.answer, before = answer, len(server.requests)
        assert run(source, tmp_path / "stopped", ServerCaptioner(server.url, MODEL)) == whole
        assert len(server.requests) - before == 20


TWO_PROCESSES = """
import sys
sys.path.insert(0, sys.argv[2])
from data.test_recaption import MeanCaptioner
from simplear.data import ScenesSource, recaption

if __name__ == "__main__":
    source = ScenesSource(25, 16, rows_per_unit=5)
    recaption(source=source, captioner=MeanCaptioner(), out=sys.argv[1], accelerator="cpu", devices=2, strategy="ddp")
"""


@pytest.mark.long
def test_two_processes_write_the_captions_of_one(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    tests = Path(__file__).parent.parent
    subprocess.run([sys.executable, script, tmp_path / "two", tests], check=True, timeout=600)
    assert hashes(tmp_path / "two") == run(ScenesSource(25, 16, rows_per_unit=5), tmp_path / "one")
