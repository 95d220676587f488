from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from corpora import (
    Picture,
    pictures,
    png,
    write_folder,
    write_parquet,
    write_tar,
    write_webdataset,
)
from simplear.atomic import TEMPORARY_MARK
from simplear.data import (
    Column,
    Filter,
    HuggingFaceSource,
    ImageFolderSource,
    Sample,
    ScenesSource,
    ShortEdge,
    Source,
    TokenShards,
    Unit,
    WebDatasetSource,
    tokenize,
)
from simplear.data.sample import Dropped
from simplear.data.shards import MANIFEST_FILE, is_committed
from simplear.data.shards.drops import DROPS_FILE
from simplear.errors import UserError
from simplear.visual_tokenizer import FSQAutoencoder, save_visual_tokenizer, to_pixels

from .conftest import MeanTokenizer


def hashes(directory: Path) -> dict[str, str]:
    manifest = json.loads((directory / MANIFEST_FILE).read_text())
    return {shard["file"]: shard["sha256"] for shard in manifest["shards"]}


def run(source: Source, out: Path, **options: Any) -> dict[str, str]:
    tokenizer = options.pop("tokenizer", MeanTokenizer())
    tokenize(source=source, visual_tokenizer=tokenizer, out=str(out), accelerator="cpu", **options)
    return hashes(out)


def test_shards_hold_the_codes_of_the_source_in_its_order(tmp_path: Path) -> None:
    source = ScenesSource(23, 16, rows_per_unit=10)
    run(source, tmp_path, batch_size=4)
    shards = TokenShards(tmp_path)
    shards.verify()
    assert (len(shards), shards.grids, shards.downsample) == (23, {(4, 4): 23}, 4)
    read = shards.read(np.arange(23))
    samples = [source.sample(index) for index in range(23)]
    pixels = torch.from_numpy(to_pixels(np.stack([np.asarray(sample.image) for sample in samples])))
    np.testing.assert_array_equal(read.codes, MeanTokenizer().encode(pixels).numpy())
    assert read.keys == [sample.key for sample in samples]
    assert read.captions == [list(sample.captions) for sample in samples]
    assert read.metadata == [json.loads(json.dumps(sample.metadata)) for sample in samples]


def test_pictures_of_several_sizes_keep_order_and_drops_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    sizes = [(8, 8), (16, 8), (8, 8), (9, 8), (16, 8), (8, 8)]  # (width, height)
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    (folder / "6.png").write_bytes(b"broken")
    (folder / "6.txt").write_text("x")
    run(ImageFolderSource(str(folder)), tmp_path / "own", batch_size=2)
    sidecar = json.loads((tmp_path / "own/images-000000000.json").read_text())
    assert sidecar["grids"] == {"2x2": 3, "2x4": 2} and sidecar["rows"] == 5
    odd = "sides are not multiples of 4, and there is no size to crop to"
    assert sidecar["drops"] == {"not a picture": 1, odd: 1}
    assert "1 pictures dropped on rank 0: not a picture" in caplog.text
    shards = TokenShards(tmp_path / "own")
    assert [shards.read(np.array([row])).keys[0] for row in range(5)] == [f"{n}.png" for n in (0, 1, 2, 4, 5)]
    run(ImageFolderSource(str(folder)), tmp_path / "cropped", height=12, width=12)
    assert TokenShards(tmp_path / "cropped").grids == {(3, 3): 6}


def test_a_unit_without_a_usable_picture_is_committed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", [Picture("a", png((1, 1, 1)), []), *pictures(2)])
    run(ImageFolderSource(str(folder), rows_per_unit=1), tmp_path / "out")
    assert len(TokenShards(tmp_path / "out")) == 2 and is_committed(tmp_path / "out", "images-000000000")


def folder(directory: Path, *others: str) -> ImageFolderSource:
    """Three pictures without captions, and an empty file of each other name."""
    (directory / "in").mkdir()
    for number in range(3):
        (directory / f"in/{number}.png").write_bytes(png((number, 0, 0)))
    for name in others:
        (directory / "in" / name).write_text("")
    return ImageFolderSource(str(directory / "in"))


def listed_folder(directory: Path) -> ImageFolderSource:
    lines = [json.dumps({"file_name": f"{number}.png", "prompt": "x", "tags": "y"}) for number in range(3)]
    folder(directory)
    (directory / "in/metadata.jsonl").write_text("\n".join(lines))
    return ImageFolderSource(str(directory / "in"))


def tar(directory: Path, *members: tuple[str, bytes]) -> WebDatasetSource:
    return WebDatasetSource(str(write_tar(directory / "x.tar", members)))


def table(directory: Path, image: Any, caption: Any, **options: Any) -> HuggingFaceSource:
    pq.write_table(pa.table({"image": [image] * 3, "caption": [caption] * 3}), directory / "x.parquet")
    return HuggingFaceSource("parquet", data_files=str(directory / "x.parquet"), **options)


PICTURE, WORDS = png((1, 1, 1)), b'{"TEXT": "a red circle", "URL": "x"}'
NOTHING_KEPT: dict[str, tuple[Callable[[Path], Source], str]] = {
    "no captions": (
        folder,
        r"\(3 no caption\)\. Note that captions are read from a \.txt or \.caption beside each pict",
    ),
    "captions in files that are not read": (
        lambda directory: folder(directory, "0.json", "1.json", "captions.xml"),
        r"metadata\.jsonl at the top with file_name and one of captions, caption, text in each line",
    ),
    "captions under another key": (
        listed_folder,
        r"metadata\.jsonl at the top with file_name and one of captions, caption, text in each line",
    ),
    "captions under another key of a tar": (
        lambda directory: tar(directory, ("0.png", PICTURE), ("0.json", WORDS)),
        r"\(1 no caption\)\. Note .* one of captions, caption, text of the \.json \(--source\.captions names others\)",
    ),
    "files of a sample apart": (
        lambda directory: tar(directory, ("0.png", PICTURE), ("1.png", PICTURE), ("0.txt", b"x"), ("1.txt", b"x")),
        r"files of a sample must follow each other \(pack the tar with --sort=name\)",
    ),
    "dots in names": (
        lambda directory: tar(directory, ("a.0.png", PICTURE), ("a.0.txt", b"x")),
        r"\(1 no picture\)\. Note .* its name ends at the first dot",
    ),
    "pictures of another kind": (
        lambda directory: tar(directory, ("0.npy", b"x"), ("0.txt", b"x")),
        r"\(1 no picture\)\. Note that files of a sample",
    ),
    "an empty tar": (tar, r"\(the source has none\)"),
    "captions that are objects": (
        lambda directory: table(directory, {"bytes": PICTURE}, [{"from": "human", "value": "x"}]),
        r"3 captions are not text.*captions, texts or lists of texts, from one of",
    ),
    "web addresses": (
        lambda directory: table(directory, "https://example.com/a.jpg", "x", streaming=True),
        r"3 web address in place of a picture \(img2dataset fetches them\)",
    ),
    "file names without their folder": (
        lambda directory: table(directory, "a.jpg", "x"),
        r"3 picture file missing",
    ),
}


@pytest.mark.parametrize("kind", NOTHING_KEPT)
def test_nothing_kept_is_an_error_that_says_what_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    make, message = NOTHING_KEPT[kind]
    out = tmp_path / "out"
    with pytest.raises(UserError, match=rf"no picture was kept.*{message}.*run the same again; .*remove {out} first"):
        run(make(tmp_path), out)
    assert not (out / MANIFEST_FILE).exists()


def test_filters_that_leave_nothing_are_named_and_the_same_is_tried_again(tmp_path: Path) -> None:
    source = folder(tmp_path)
    with pytest.raises(UserError, match=r"\(3 no caption\)"):
        run(source, tmp_path / "out")
    for number in range(3):
        (tmp_path / f"in/{number}.txt").write_text("x")
    source = ImageFolderSource(str(tmp_path / "in"))
    assert run(source, tmp_path / "out")
    with pytest.raises(UserError, match=r"\(3 short edge under 99 pixels\)\. Change that"):
        run(source, tmp_path / "filtered", filters=[ShortEdge(99)])


@pytest.mark.parametrize("captions", [0, 1, 2, 3, 4])
def test_a_line_says_if_most_were_dropped_and_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, captions: int
) -> None:
    written = [Picture(str(n), png((n, 0, 0)), ["x"] * (n < captions)) for n in range(4)]
    source = WebDatasetSource(str(write_webdataset(tmp_path / "x.tar", written)))
    with contextlib.nullcontext() if captions else pytest.raises(UserError, match="no picture was kept"):
        run(source, tmp_path / "out")
    line = "most pictures were dropped: 3 of 4 (3 no caption). Note that files of a sample"
    assert (line in caplog.text) is (captions == 1)


def test_a_second_run_says_that_nothing_was_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For pictures may have changed under their names, which the settings do not show."""
    caplog.set_level("INFO")
    run(ScenesSource(9, 16, rows_per_unit=4), tmp_path)
    assert f"9 rows in {tmp_path}" in caplog.text and "already" not in caplog.text
    (tmp_path / "train-seed0-000000004.json").unlink()
    run(ScenesSource(9, 16, rows_per_unit=4), tmp_path)
    assert "2 of 3 units were there already; remove the directory to make them again" in caplog.text


def test_loader_processes_do_not_change_the_shards(tmp_path: Path) -> None:
    source = ScenesSource(25, 16, rows_per_unit=5)
    alone = run(source, tmp_path / "alone", batch_size=2)
    assert len(alone) == 5
    assert run(source, tmp_path / "workers", batch_size=2, num_workers=2) == alone


@pytest.mark.parametrize("workers", [2, 3])
def test_loader_processes_do_not_share_out_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """As `datasets` does by itself, so that all rows of a file but one process's would be missing."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    files = [str(write_parquet(tmp_path / f"{number}.parquet", pictures(20 + number))) for number in range(3)]
    source = HuggingFaceSource("parquet", data_files=files, key="key", streaming=True)
    alone = run(source, tmp_path / "alone")
    assert len(TokenShards(tmp_path / "alone")) == 63
    assert run(source, tmp_path / "workers", num_workers=workers) == alone


class SlowSource(ScenesSource):
    """Leaves time to be killed; described as the source that goes on in its place."""

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"class": "ScenesSource"}

    def read(self, unit: Unit, dropped: list[Dropped]) -> Iterator[Sample]:
        for sample in super().read(unit, dropped):
            while self.stalls():
                time.sleep(0.01)
            yield sample

    def stalls(self) -> bool:
        """Whether to stop for good."""
        return False


def test_killed_and_resumed_gives_the_same_shards(tmp_path: Path) -> None:
    source = ScenesSource(60, 16, rows_per_unit=10)
    whole = run(source, tmp_path / "whole", batch_size=4)
    out = tmp_path / "killed"

    def child(committed: int) -> None:
        torch.set_num_threads(1)
        source = SlowSource(60, 16, rows_per_unit=10)
        source.stalls = lambda: len(list(out.glob("train-*.json"))) >= committed  # type: ignore[method-assign]
        run(source, out, batch_size=4)

    for committed in (1, 3):
        process = multiprocessing.get_context("fork").Process(target=child, args=(committed,))
        process.start()
        while process.is_alive() and len(list(out.glob("train-*.json"))) < committed:
            time.sleep(0.005)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL and not (out / MANIFEST_FILE).exists()
    # What a kill in the middle of a write leaves behind.
    half = f".train-seed0-000000050.arrow{TEMPORARY_MARK}{socket.gethostname()}-{process.pid}"
    (out / half).write_bytes(b"half a shard")
    elsewhere = out / f".train-seed0-000000050.arrow{TEMPORARY_MARK}another-machine-{process.pid}"
    elsewhere.write_bytes(b"perhaps still being written")
    (out / "train-seed0-000000040.arrow").write_bytes(b"a shard without its sidecar")
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.arrow") if file.with_suffix(".json").exists()}
    assert len(before) >= 3
    assert run(source, out, batch_size=4) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert list(out.glob(f".*{TEMPORARY_MARK}*")) == [elsewhere]
    TokenShards(out).verify()


def test_a_shard_of_the_wrong_size_is_written_again(tmp_path: Path) -> None:
    source = ScenesSource(20, 16, rows_per_unit=10)
    whole = run(source, tmp_path)
    shard = tmp_path / "train-seed0-000000010.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    assert run(source, tmp_path) == whole
    TokenShards(tmp_path).verify()


def test_other_settings_in_the_same_directory_are_refused(tmp_path: Path) -> None:
    run(ScenesSource(4, 16), tmp_path)
    with pytest.raises(ValueError, match=r"begun with source\.seed = 0, not 1"):
        run(ScenesSource(4, 16, seed=1), tmp_path)
    with pytest.raises(ValueError, match=r"begun with height = None, not 32"):
        run(ScenesSource(4, 16), tmp_path, height=32, width=32)
    other = MeanTokenizer()
    other.fingerprint = "f" * 64
    with pytest.raises(ValueError, match=r"begun with visual_tokenizer = "):
        run(ScenesSource(4, 16), tmp_path, tokenizer=other)


def test_what_cannot_be_encoded_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"18 x 16 pixels are no multiples"):
        run(ScenesSource(4, 16), tmp_path, height=18, width=16)
    with pytest.raises(ValueError, match=r"give both, or neither"):
        run(ScenesSource(4, 16), tmp_path, height=16)
    large = MeanTokenizer()
    large.codebook_size = 2**16 + 1
    with pytest.raises(ValueError, match=r"65537 codes do not fit"):
        run(ScenesSource(4, 16), tmp_path, tokenizer=large)
    assert not list(tmp_path.iterdir())


def test_codes_outside_the_codebook_are_refused(tmp_path: Path) -> None:
    small = MeanTokenizer()
    small.codebook_size = 3
    with pytest.raises(ValueError, match=r"but states a codebook of 3; picture 'train-seed0-000000000' is one"):
        run(ScenesSource(4, 16), tmp_path, tokenizer=small)


@pytest.mark.long
@pytest.mark.parametrize("options", [{"bf16": True}, {"compile": True}])
def test_the_encoder_may_be_faster(tmp_path: Path, tiny_visual_tokenizer: str, options: dict[str, bool]) -> None:
    """Compiled, the codes are the same but for ties; in bfloat16 most are; either is another setting."""
    source = ScenesSource(60, 32, rows_per_unit=25)
    run(source, tmp_path / "plain", tokenizer=tiny_visual_tokenizer)
    run(source, tmp_path / "fast", tokenizer=tiny_visual_tokenizer, batch_size=16, **options)
    codes = [TokenShards(tmp_path / name).read(np.arange(60)).codes for name in ("plain", "fast")]
    assert (codes[0] == codes[1]).mean() > (0.99 if "compile" in options else 0.9)
    with pytest.raises(ValueError, match=r"begun with encoder\.bf16 = None, not "):
        run(source, tmp_path / "plain", tokenizer=tiny_visual_tokenizer, **options)


def test_from_a_command_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = FSQAutoencoder(levels=[4, 4], downsample=8)
    save_visual_tokenizer(tokenizer, tmp_path / "tokenizer")
    arguments = ["--source", "ScenesSource", "--source.count", "3", "--source.resolution", "16", "--accelerator", "cpu"]
    arguments += ["--visual_tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "out")]
    jsonargparse.auto_cli(tokenize, args=arguments)
    shards = TokenShards(tmp_path / "out")
    assert shards.grids == {(2, 2): 3} and shards.fingerprint == tokenizer.fingerprint


PROCESSES = """
import sys
sys.path.insert(0, sys.argv[2])
from data.conftest import MeanTokenizer
from simplear.data import Column, ScenesSource, tokenize

if __name__ == "__main__":
    source = ScenesSource(25, 16, rows_per_unit=5)
    tokenize(
        source=source, visual_tokenizer=MeanTokenizer(), out=sys.argv[1],
        filters=[Column("tag", equals="counting")],
        batch_size=2, accelerator="cpu", devices=int(sys.argv[3]), strategy="ddp",
    )
"""


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_write_the_shards_of_one(tmp_path: Path, processes: int) -> None:
    script = tmp_path / "several.py"
    script.write_text(PROCESSES)
    tests = Path(__file__).parent.parent
    subprocess.run([sys.executable, script, tmp_path / "several", tests, str(processes)], check=True, timeout=900)
    filters: list[Filter] = [Column("tag", equals="counting")]
    one = run(ScenesSource(25, 16, rows_per_unit=5), tmp_path / "one", batch_size=2, filters=filters)
    assert hashes(tmp_path / "several") == one
    lists = [(tmp_path / name / DROPS_FILE).read_bytes() for name in ("one", "several")]
    assert lists[0] == lists[1]
