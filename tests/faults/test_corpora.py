"""Corpora as the world has them, while they are tokenized: a message that names the place, or a counted drop.

Whatever happens, what is committed stays whole, and running the same again once the fault is gone gives what an
undisturbed run gives. Damaged pictures are in `test_pictures`, damaged shards in `test_shards`.
"""

from __future__ import annotations

import gzip
import io
import multiprocessing
import os
import re
import signal
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from corpora import Picture, pictures, png, write_folder, write_tar, write_webdataset
from simplear.cli import main
from simplear.data import (
    CaptionLength,
    ImageFolderSource,
    Sample,
    Source,
    TokenDataModule,
    TokenShards,
    Unit,
    WebDatasetSource,
    tokenize,
)
from simplear.data.sample import Dropped
from simplear.data.shards import MANIFEST_FILE, is_committed
from simplear.data.shards.drops import DROPS_FILE
from simplear.data.sources.base import decoded
from simplear.errors import UserError
from simplear.pictures import open_rgb
from simplear.sequence import START_OF_IMAGE, TEXT_TO_IMAGE

from .conftest import FullDisk

SIDE = 16


def run(source: Source, out: Path, tokenizer: str, **options: Any) -> None:
    tokenize(
        source=source, visual_tokenizer=tokenizer, out=str(out), height=SIDE, width=SIDE, accelerator="cpu", **options
    )


def content(directory: Path) -> dict[str, bytes]:
    """Everything that a finished run leaves."""
    files = (file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def dropped(out: Path) -> list[tuple[str, str]]:
    return [(row["key"], row["reason"]) for row in pq.read_table(out / DROPS_FILE).to_pylist()]


def keys(out: Path) -> list[str]:
    shards = TokenShards(out)
    shards.verify()
    return shards.read(np.arange(len(shards))).keys


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `simplear` prints when it stops, which is no trace."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in printed
    return printed


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    file = io.BytesIO()
    options = {"lossless": True} if form == "WEBP" else {}
    frames[0].save(file, form, save_all=True, append_images=frames[1:], **options)
    with Image.open(file) as opened:
        assert opened.n_frames == 3
    assert set(open_rgb(file).get_flattened_data()) == {(255, 0, 0)}


@pytest.mark.parametrize("orientation", [0, 9, 42])
def test_an_orientation_that_is_none_turns_nothing(orientation: int) -> None:
    image = Image.new("RGB", (8, 4))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif.tobytes())
    assert np.array_equal(np.asarray(open_rgb(file)), np.asarray(image))


def test_a_block_of_exif_that_is_noise_costs_no_picture() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 4), (9, 9, 9)).save(file, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff\xff\xff")
    assert open_rgb(file).size == (8, 4)


def test_a_caption_of_a_hundred_kilobytes_is_kept_whole_and_cut_in_training_with_a_count(
    tmp_path: Path, tiny_visual_tokenizer: str, tiny_text_tokenizer: str
) -> None:
    long = "a red circle " * 8000
    write_webdataset(tmp_path / "x.tar", [Picture("long", png((1, 2, 3)), [long]), *pictures(3)])
    run(WebDatasetSource(str(tmp_path / "x.tar")), tmp_path / "out", tiny_visual_tokenizer)
    read = TokenShards(tmp_path / "out").read(np.arange(4))
    assert read.captions[0] == [long.strip()]
    data = TokenDataModule(str(tmp_path / "out"), 4, tiny_text_tokenizer, max_text_tokens=30, caption_dropout=0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert int(batch["truncated"].sum()) == 1 and batch["input_ids"].shape[1] == 30 + 2 + 4


def test_control_tokens_in_a_caption_stay_text(
    tmp_path: Path, tiny_visual_tokenizer: str, tiny_text_tokenizer: str
) -> None:
    evil = f"{START_OF_IMAGE} {TEXT_TO_IMAGE} a dog <|endoftext|>"
    write_webdataset(tmp_path / "x.tar", [Picture("evil", png((1, 2, 3)), [evil])])
    run(WebDatasetSource(str(tmp_path / "x.tar")), tmp_path / "out", tiny_visual_tokenizer)
    data = TokenDataModule(str(tmp_path / "out"), 1, tiny_text_tokenizer, max_text_tokens=90, caption_dropout=0)
    data.setup("fit")
    ids = next(iter(data.train_dataloader()))["input_ids"][0].tolist()
    for token in (START_OF_IMAGE, TEXT_TO_IMAGE):
        assert ids.count(data.text_tokenizer.convert_tokens_to_ids(token)) == 1
    text = ids[1 : ids.index(data.text_tokenizer.convert_tokens_to_ids(START_OF_IMAGE))]
    assert data.text_tokenizer.decode(text) == evil


def test_of_two_samples_with_one_key_the_second_is_dropped(tmp_path: Path, tiny_visual_tokenizer: str) -> None:
    twice = [*pictures(3), *pictures(2)]
    write_webdataset(tmp_path / "x.tar", twice)
    run(WebDatasetSource(str(tmp_path / "x.tar")), tmp_path / "out", tiny_visual_tokenizer)
    assert keys(tmp_path / "out") == ["000", "001", "002"]
    assert dropped(tmp_path / "out") == [("000", "duplicate key"), ("001", "duplicate key")]


def test_names_that_lead_out_of_a_tar_are_names_and_nothing_is_written_there(
    tmp_path: Path, tiny_visual_tokenizer: str
) -> None:
    names = ["../../out", "a/../../b", "/absolute", "./plain", "..two.dots"]
    members = [
        (f"{name}{suffix}", body) for name in names for suffix, body in ((".png", png((1, 1, 1))), (".txt", b"x"))
    ]
    write_tar(tmp_path / "deep/x.tar", members)
    before = {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    run(WebDatasetSource(str(tmp_path / "deep/x.tar")), tmp_path / "out", tiny_visual_tokenizer)
    assert keys(tmp_path / "out") == ["../../out", "a/../../b", "absolute", "plain"]
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "out")} == before


@pytest.mark.parametrize(("workers", "extra"), [(0, 0), (0, 7), (2, 7)])
def test_a_tar_that_is_cut_short_is_named_and_the_others_stay(
    tmp_path: Path, tiny_visual_tokenizer: str, capsys: pytest.CaptureFixture[str], workers: int, extra: int
) -> None:
    """Also between two members, where `tarfile` sees nothing wrong."""
    unit = tarfile.BLOCKSIZE
    for number in range(3):
        write_webdataset(tmp_path / f"{number}.tar", pictures(4))
    whole = (tmp_path / "2.tar").read_bytes()
    (tmp_path / "2.tar").write_bytes(whole[: len(whole) // 2 // unit * unit + extra])
    out = tmp_path / "out"
    arguments = ["tokenize", "--source", "WebDatasetSource", "--source.paths", str(tmp_path / "*.tar")]
    arguments += ["--visual-tokenizer", tiny_visual_tokenizer, "--height", str(SIDE), "--width", str(SIDE)]
    arguments += ["--out", str(out), "--accelerator", "cpu", "--num-workers", str(workers)]
    assert f"{tmp_path}/2.tar is damaged or cut short" in refused(arguments, capsys)
    assert is_committed(out, "0") and not is_committed(out, "2") and not (out / MANIFEST_FILE).exists()
    (tmp_path / "2.tar").write_bytes(whole)
    main(arguments)
    assert len(keys(out)) == 12


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the tars a, b and c of four pictures each."""
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        named = [replace(picture, name=f"{name}{picture.name}") for picture in pictures(4)]
        write_webdataset(tmp_path / f"{name}.tar", named)
    return tmp_path


def tokenize_tars(tokenizer: str, paths: str) -> None:
    arguments = ["tokenize", "--source", "WebDatasetSource", "--source.paths", paths, "--out", "out"]
    main([*arguments, "--visual-tokenizer", tokenizer, "--accelerator", "cpu", "--height", "16", "--width", "16"])


def test_a_bad_tar_is_taken_out_and_the_work_goes_on(
    corpus: Path, tiny_visual_tokenizer: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """As its message says; also by another spelling of the paths, and with further tars."""
    caplog.set_level("INFO")
    whole = (corpus / "b.tar").read_bytes()
    (corpus / "b.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit):
        tokenize_tars(tiny_visual_tokenizer, "[a.tar, b.tar, c.tar]")
    assert "b.tar is damaged or cut short" in (said := capsys.readouterr().err) and "take it out of the paths" in said
    tokenize_tars(tiny_visual_tokenizer, f"[{corpus}/a.tar, c.tar]")
    assert [key[0] for key in keys(corpus / "out")] == ["a"] * 4 + ["c"] * 4
    write_webdataset(corpus / "d.tar", pictures(1))
    first = (corpus / "out/a.arrow").stat().st_mtime_ns
    (corpus / "b.tar").write_bytes(whole)
    tokenize_tars(tiny_visual_tokenizer, "./*.tar")
    assert [key[0] for key in keys(corpus / "out")] == [*"aaaabbbbcccc0"]
    assert (corpus / "out/a.arrow").stat().st_mtime_ns == first and "not of the source" not in caplog.text


def test_what_the_source_no_longer_has_is_left_out_of_the_manifest_with_a_line(
    corpus: Path,
    tiny_visual_tokenizer: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And neither missed by `verify` nor brought back by `repair`."""
    tokenize_tars(tiny_visual_tokenizer, "*.tar")
    whole = content(corpus / "out")
    tokenize_tars(tiny_visual_tokenizer, "[a.tar, c.tar]")
    assert "1 units in out are not of the source now and are left out of the manifest, the first is b" in caplog.text
    for _ in range(2):
        assert [key[0] for key in keys(corpus / "out")] == ["a"] * 4 + ["c"] * 4
        main(["data", "verify", "out"])
        assert "0 damaged files" in capsys.readouterr().out
        main(["data", "repair", "out"])
    tokenize_tars(tiny_visual_tokenizer, "*.tar")
    assert content(corpus / "out") == whole


def test_another_tar_of_the_same_name_is_never_mixed_in(
    corpus: Path, tiny_visual_tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As 00000.tar of another corpus has; the same file elsewhere is the same unit."""
    tokenize_tars(tiny_visual_tokenizer, "*.tar")
    before = content(corpus / "out")
    (corpus / "moved").mkdir()
    for name in "abc":
        (corpus / f"{name}.tar").rename(corpus / f"moved/{name}.tar")
    tokenize_tars(tiny_visual_tokenizer, "moved/*.tar")
    assert content(corpus / "out") == before
    write_webdataset(corpus / "elsewhere/b.tar", pictures(3))
    with pytest.raises(SystemExit):
        tokenize_tars(tiny_visual_tokenizer, "[moved/a.tar, elsewhere/b.tar]")
    said = capsys.readouterr().err
    identity = r"\d+ bytes, SHA-256 of both ends [0-9a-f]{16}"
    assert re.search(rf"out/b\.arrow was made from b of {identity}; the source's b has {identity}: ", said)
    assert content(corpus / "out") == before
    (corpus / "out/b.json").unlink()  # as the message says
    tokenize_tars(tiny_visual_tokenizer, "[moved/a.tar, elsewhere/b.tar]")
    assert len(keys(corpus / "out")) == 7


def test_tars_named_as_files_of_the_directory(corpus: Path, tiny_visual_tokenizer: str) -> None:
    for name in ("settings", "manifest", "drops"):
        write_webdataset(corpus / f"own/{name}.tar", pictures(2))
    tokenize_tars(tiny_visual_tokenizer, "own/*.tar")
    settings = (corpus / "out/settings.json").read_bytes()
    assert b"visual_tokenizer" in settings and len(keys(corpus / "out")) == 6
    tokenize_tars(tiny_visual_tokenizer, "own/*.tar")
    assert (corpus / "out/settings.json").read_bytes() == settings


@pytest.mark.parametrize("names", [["settings"], ["manifest"], ["a", "a"], ["a/b"], [""], ["x" * 300]])
def test_units_whose_names_cannot_be_files_are_refused(
    tmp_path: Path, tiny_visual_tokenizer: str, names: list[str]
) -> None:
    class Named(ImageFolderSource):
        def units(self) -> list[Unit]:
            return [Unit(name, range(1)) for name in names]

    write_folder(tmp_path / "pictures", pictures(1))
    with pytest.raises(ValueError, match=r"a unit of .* has the name .*: rename its file"):
        run(Named(str(tmp_path / "pictures")), tmp_path / "out", tiny_visual_tokenizer)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings.json"]


def found_in(tar: Path) -> tuple[list[str], Counter[str]]:
    source, dropped = WebDatasetSource(str(tar)), list[Dropped]()
    samples = [sample for unit in source.units() for sample in decoded(source.read(unit, dropped), dropped)]
    return [sample.key for sample in samples], Counter(reason for _, reason in dropped)


def test_of_a_damaged_block_the_tar_is_named_or_no_picture_is_missing(tmp_path: Path) -> None:
    """A block, or a page of eight, that reads as zeros or as noise, wherever it lies before the last one.

    What is zeros from there to the end cannot be told from an archive that ends there.
    """
    tar = write_webdataset(tmp_path / "x.tar", pictures(6))
    whole, random = tar.read_bytes(), np.random.default_rng(0)
    size, errors, complete = tarfile.BLOCKSIZE, 0, 0
    for length in (size, 8 * size):
        for start in range(0, (len(whole.rstrip(b"\0")) - length) // size * size, size):
            for damage in (bytes(length), random.bytes(length)):
                tar.write_bytes((whole[:start] + damage + whole[start + length :])[: len(whole)])
                try:
                    keys, drops = found_in(tar)
                except UserError as error:
                    assert "x.tar is damaged or cut short" in str(error)
                    errors += 1
                else:
                    assert len(keys) + drops.total() == 6, (start, length, damage[:1])
                    complete += 1
    assert errors > 20 and complete > 20


def test_a_damaged_header_is_named_by_its_byte(tmp_path: Path) -> None:
    tar = write_webdataset(tmp_path / "x.tar", pictures(3))
    whole = tar.read_bytes()
    place = whole.index(b"001.png")
    tar.write_bytes(whole[: place + 130] + b"\xff" + whole[place + 131 :])
    with pytest.raises(UserError, match=rf"x\.tar is damaged or cut short \(at byte {place} there is neither"):
        found_in(tar)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("gap", [0, 1, 20])
def test_what_follows_the_end_of_a_tar_is_named_by_its_byte(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, compress: Callable[[bytes], bytes], gap: int
) -> None:
    """``cat a.tar b.tar > ab.tar``, of which tarfile reads the first alone; zeros may follow, many with a line."""
    first = write_webdataset(tmp_path / "a.tar", pictures(2)).read_bytes()
    second = write_webdataset(tmp_path / "b.tar", pictures(4)).read_bytes()
    tar = tmp_path / "ab.tar"
    tar.write_bytes(compress(first) + compress(bytes(gap * tarfile.RECORDSIZE) + second))
    place = len(first) + gap * tarfile.RECORDSIZE
    with pytest.raises(UserError, match=rf"ab\.tar is damaged .*\(at byte {place} there is neither .* several tars"):
        found_in(tar)
    tar.write_bytes(compress(first) + compress(bytes(gap * 200_000)))
    assert found_in(tar)[0] == ["000", "001"]
    assert ("ab.tar ends in" in caplog.text) is (gap == 20)


def member(name: str, content: bytes = b"", size: int | None = None, **fields: Any) -> bytes:
    """A header with its content; the size that it states may be another."""
    info = tarfile.TarInfo(name)
    info.size = len(content) if size is None else size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def sparse(name: str, size: int) -> bytes:
    """GNU's old form: no content, and a size that no disk has."""
    header = bytearray(member(name, size=0, type=tarfile.GNUTYPE_SPARSE))
    header[483:495] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:512]))
    return bytes(header)


def pax(name: str, **records: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.pax_headers = {key.replace("__", "."): str(value) for key, value in records.items()}
    return info.tobuf(tarfile.PAX_FORMAT)


TERABYTES = 1 << 43
DEEP = b'{"text": ' + b"[" * 4000 + b"]" * 4000 + b"}"
MEMBERS: dict[str, tuple[list[bytes], Counter[str] | None]] = {
    "sparse picture": ([sparse("a.png", TERABYTES), member("a.txt", b"x")], Counter({"no picture": 1})),
    "sparse caption": ([member("a.png", png((1, 1, 1))), sparse("a.txt", TERABYTES)], Counter({"no caption": 1})),
    "sparse, as pax has it": (
        [pax("a.png", GNU__sparse__map="0,0", GNU__sparse__size=TERABYTES), member("a.txt", b"x")],
        Counter({"no picture": 1}),
    ),
    "link": (
        [member("a.png", type=tarfile.LNKTYPE, linkname="b.png"), member("a.txt", b"x")],
        Counter({"no picture": 1}),
    ),
    "terabytes": ([member("a.png", size=TERABYTES)], None),
    "terabytes by pax": ([pax("a.png", size=TERABYTES)], None),
    "terabytes of a name": ([member("a.png", size=TERABYTES, type=tarfile.GNUTYPE_LONGNAME)], None),
    "terabytes of pax": ([member("a.png", size=TERABYTES, type=tarfile.XHDTYPE)], None),
    "less than nothing": ([member("a.png", size=-1024), member("a.txt", b"x")], None),
    "many headers of one": ([member("x", type=tarfile.XHDTYPE)] * 3000, None),
    "deep JSON": ([member("a.png", png((1, 1, 1))), member("a.json", DEEP)], Counter({"broken JSON": 1})),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_members_that_would_fill_the_memory_are_dropped_or_an_error(tmp_path: Path, kind: str) -> None:
    members, dropped = MEMBERS[kind]
    good = [member("z.png", png((1, 1, 1))), member("z.txt", b"fine")]
    (tmp_path / "x.tar").write_bytes(b"".join([*members, *good]) + bytes(tarfile.RECORDSIZE))
    if dropped is None:
        with pytest.raises(UserError, match=r"x\.tar is damaged or cut short"):
            found_in(tmp_path / "x.tar")
    else:
        assert found_in(tmp_path / "x.tar") == (["z"], dropped)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root reads everything; within the block the process is another user's."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_cannot_be_read_is_named() -> None:
    """In place of a corpus without it."""
    with tempfile.TemporaryDirectory() as name:
        root = write_folder(Path(name) / "pictures", pictures(2))
        (root / "metadata.jsonl").unlink()
        (root / "closed").mkdir(mode=0o000)
        Path(name).chmod(0o755)
        with (
            as_nobody(),
            pytest.raises(OSError, match=r"pictures/closed cannot be read \(Permission denied\): make it"),
        ):
            ImageFolderSource(str(root))
        (root / "closed").chmod(0o755)
        with as_nobody():
            assert len(ImageFolderSource(str(root))) == 2


def test_links_are_followed_and_one_that_comes_back_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", pictures(2))
    (tmp_path / "pictures/deep").mkdir(parents=True)
    (tmp_path / "pictures/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pictures/again").symlink_to(tmp_path / "elsewhere")
    assert len(ImageFolderSource(str(tmp_path / "pictures"))) == 4
    (tmp_path / "pictures/deep/up").symlink_to(tmp_path / "pictures")
    with pytest.raises(OSError, match=r"pictures/deep/up is a link to a folder above it"):
        ImageFolderSource(str(tmp_path / "pictures"))


class Meddling(WebDatasetSource):
    """Something is done when the third sample of the last tar has been read."""

    def __init__(self, paths: str, meddle: Callable[[Unit], None]) -> None:
        super().__init__(paths)
        self.meddle = meddle

    def describe(self) -> dict[str, Any]:
        """As the source that goes on in its place."""
        return WebDatasetSource(self.paths).describe()

    def read(self, unit: Unit, dropped: list[Dropped]) -> Iterator[Sample]:
        for number, sample in enumerate(super().read(unit, dropped)):
            if unit.name == "2" and number == 2:
                self.meddle(unit)
            yield sample


@pytest.fixture
def tars(tmp_path: Path) -> str:
    """A pattern of three tars of four pictures."""
    for number in range(3):
        write_webdataset(tmp_path / "tars" / f"{number}.tar", pictures(4))
    return str(tmp_path / "tars/*.tar")


def test_a_loader_process_that_is_killed_is_told_and_the_rest_goes_on(
    tmp_path: Path, tars: str, tiny_visual_tokenizer: str
) -> None:
    def die(unit: Unit) -> None:
        assert get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)

    out = tmp_path / "out"
    with pytest.raises(
        ChildProcessError, match=r"a loader process was killed .*num_workers.* run the same again to resume"
    ):
        run(Meddling(tars, die), out, tiny_visual_tokenizer, num_workers=1)
    assert is_committed(out, "0") and not is_committed(out, "2")
    run(WebDatasetSource(tars), out, tiny_visual_tokenizer, num_workers=1)
    run(WebDatasetSource(tars), tmp_path / "whole", tiny_visual_tokenizer)
    assert content(out) == content(tmp_path / "whole")


def test_a_clock_that_goes_backwards_changes_nothing(
    tmp_path: Path, tars: str, tiny_visual_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(WebDatasetSource(tars), tmp_path / "whole", tiny_visual_tokenizer, batch_size=1)
    now, steps = time.time(), iter(range(10**6))

    def back() -> float:
        return now - 60 * next(steps)

    monkeypatch.setattr("time.time", back)
    monkeypatch.setattr("tqdm.std.time", back)
    source = Meddling(tars, lambda unit: os.utime(tmp_path / "out/0.arrow", (0, 0)))
    run(source, tmp_path / "out", tiny_visual_tokenizer, batch_size=1)
    assert next(steps) > 0
    assert {name: body for name, body in content(tmp_path / "out").items() if name.endswith(".arrow")} == {
        name: body for name, body in content(tmp_path / "whole").items() if name.endswith(".arrow")
    }


def test_a_disk_that_fills_up_stops_the_work_which_then_goes_on(
    disk: tuple[Path, FullDisk], tmp_path: Path, tiny_visual_tokenizer: str
) -> None:
    directory, full = disk
    rows = [Picture("small", png((1, 1, 1)), ["x"]), Picture("large", png((2, 2, 2)), ["x" * 60_000])]
    for number, row in enumerate(rows):
        write_webdataset(tmp_path / f"{number}.tar", [row, Picture("broken", b"<html>", ["x"])])
    source = WebDatasetSource(str(tmp_path / "*.tar"))
    out = directory / "out"
    run(source, tmp_path / "whole", tiny_visual_tokenizer)
    with full():
        with pytest.raises(OSError, match=r"out/1\.arrow could not be written .*free space"):
            run(source, out, tiny_visual_tokenizer)
        assert is_committed(out, "0") and not is_committed(out, "1")
    run(source, out, tiny_visual_tokenizer)
    assert content(out) == content(tmp_path / "whole")


def test_two_runs_at_once_in_one_directory_give_what_one_gives(tmp_path: Path, tiny_visual_tokenizer: str) -> None:
    for number in range(12):
        write_webdataset(tmp_path / f"{number:02d}.tar", pictures(12))
    source, filters = WebDatasetSource(str(tmp_path / "*.tar")), [CaptionLength(minimum=10)]
    run(source, tmp_path / "whole", tiny_visual_tokenizer, filters=filters)

    def child() -> None:
        torch.set_num_threads(1)
        run(source, tmp_path / "out", tiny_visual_tokenizer, filters=filters, batch_size=5)

    both = [multiprocessing.get_context("fork").Process(target=child) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert Counter(reason for _, reason in dropped(tmp_path / "out")) == {"caption under 10 characters": 120}
    assert not list((tmp_path / "out").rglob(".*"))
