from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from corpora import Picture, pictures, write_parquet, write_webdataset
from simplear.data import (
    HuggingFaceSource,
    ImageFolderSource,
    ScenesSource,
    Source,
    WebDatasetSource,
)
from simplear.data.sample import Dropped, Sample
from simplear.data.sources.base import decoded
from simplear.errors import UserError


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def read_all(source: Source) -> tuple[list[Sample], Counter[str]]:
    dropped: list[Dropped] = []
    samples = [sample for unit in source.units() for sample in decoded(source.read(unit, dropped), dropped)]
    return samples, Counter(reason for _, reason in dropped)


def value_of(sample: Sample) -> int:
    return int(np.asarray(sample.image)[0, 0, 0])


class TestScenes:
    def test_units_make_the_corpus_and_do_not_depend_on_their_size(self) -> None:
        samples, drops = read_all(ScenesSource(10, 16, rows_per_unit=4))
        again, _ = read_all(ScenesSource(10, 16, rows_per_unit=10))
        assert [sample.key for sample in samples] == [sample.key for sample in again] and not drops
        assert all(a.image == b.image for a, b in zip(samples, again, strict=True))
        assert len({sample.key for sample in samples}) == 10
        assert all(len(sample.captions) == 2 and sample.metadata["tag"] for sample in samples)

    def test_first_takes_a_later_part(self) -> None:
        whole, _ = read_all(ScenesSource(10, 16))
        part, _ = read_all(ScenesSource(4, 16, first=6))
        assert [sample.key for sample in part] == [sample.key for sample in whole[6:]]
        assert [tuple(sample.captions) for sample in part] == [tuple(sample.captions) for sample in whole[6:]]

    def test_unit_names_are_unique_over_splits(self) -> None:
        names = [unit.name for split in ("train", "validation") for unit in ScenesSource(9, 16, split=split).units()]
        assert len(set(names)) == 2


class TestImageFolder:
    def test_captions_beside_the_pictures(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub/b.PNG").write_bytes(png(20))
        (tmp_path / "sub/b.txt").write_text("second\n\n another \n")
        (tmp_path / "a.png").write_bytes(png(10))
        (tmp_path / "a.txt").write_bytes("größe".encode())
        (tmp_path / "silent.png").write_bytes(png(30))
        (tmp_path / "broken.jpg").write_bytes(b"x")
        (tmp_path / "broken.txt").write_text("broken")
        (tmp_path / "latin.png").write_bytes(png(40))
        (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
        samples, drops = read_all(ImageFolderSource(str(tmp_path), rows_per_unit=2))
        assert [(s.key, value_of(s), s.captions) for s in samples] == [
            ("a.png", 10, ["größe"]),
            ("sub/b.PNG", 20, ["second", "another"]),
        ]
        assert drops == {"no caption": 1, "not a picture": 1, "text is not UTF-8": 1}

    def test_metadata_file(self, tmp_path: Path) -> None:
        for number in range(3):
            (tmp_path / f"{number}.png").write_bytes(png(number))
        rows = [
            {"file_name": "2.png", "text": "two", "size": 3},
            {"file_name": "0.png", "captions": ["zero", "nothing"], "text": "kept as metadata"},
            {"file_name": "gone.png", "caption": "gone"},
            {"file_name": "1.png", "caption": 7},
        ]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        samples, drops = read_all(ImageFolderSource(str(tmp_path)))
        assert [(s.key, s.captions, s.metadata) for s in samples] == [
            ("2.png", ["two"], {"size": 3}),
            ("0.png", ["zero", "nothing"], {"text": "kept as metadata"}),
        ]
        assert drops == {"picture file missing": 1, "captions are not text": 1}

    def test_errors_name_place_and_line(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder"):
            ImageFolderSource(str(tmp_path / "nowhere"))
        with pytest.raises(FileNotFoundError, match=r"holds no picture"):
            ImageFolderSource(str(tmp_path))
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"name": "b.png"}\n')
        with pytest.raises(ValueError, match=r"metadata.jsonl, line 2"):
            ImageFolderSource(str(tmp_path))


DEEP = b"[" * 5000 + b"]" * 5000
A, B = {"a.png": png(1)}, {"sub/b.png": png(2)}
TEXT_A, TEXT_B = json.dumps({"file_name": "a.png", "text": "one"}), json.dumps({"file_name": "b.png", "text": "two"})
ONE, BOTH = {"a.png": ["one"]}, {"a.png": ["one"], "sub/b.png": ["two"]}
FOLDERS: dict[str, tuple[dict[str, bytes | str], dict[str, list[str]], dict[str, int]]] = {
    "caption of another suffix": (A | {"a.caption": "one"}, ONE, {}),
    "capitals": (A | {"a.TXT": "one"}, ONE, {}),
    "capital letter": (A | {"a.Txt": "one"}, ONE, {}),
    "suffix appended": (A | {"a.png.txt": "one"}, ONE, {}),
    "another suffix appended": (A | {"a.png.CAPTION": "one"}, ONE, {}),
    "the usual one comes first": (A | {"a.txt": "one", "a.caption": "no", "a.png.txt": "no"}, ONE, {}),
    "dots in names": ({"img.01.png": png(1), "img.01.txt": "one"}, {"img.01.png": ["one"]}, {}),
    "list at the top alone": (A | B | {"metadata.jsonl": TEXT_A, "sub/metadata.jsonl": TEXT_B}, ONE, {}),
    "hidden": (
        A
        | {"a.txt": "one", "._a.png": b"\0\5\x16\7", "._a.txt": "no", ".b.png": png(2), ".b.txt": "no"}
        | {
            f"{folder}/c.{suffix}": png(3) if suffix == "png" else "no"
            for folder in (".ipynb_checkpoints", "__MACOSX", ".thumbnails", "@eaDir", "sub/.git")
            for suffix in ("png", "txt")
        },
        ONE,
        {},
    ),
    "places that hold no picture": (
        A
        | {
            "sub/x": b"",
            "metadata.jsonl": "\n".join(
                json.dumps({"file_name": name, "text": "one"})
                for name in (
                    "a.png",
                    "gone.png",
                    "sub",
                    "a.png/b.png",
                    "x" * 300 + ".png",
                    "a\0.png",
                    "\ud800.png",
                )
            ),
        },
        ONE,
        {
            "picture file missing": 4,
            "truncated or damaged picture": 1,
            "text is not UTF-8": 1,
        },
    ),
    "other encodings": (
        A | B | {"a.txt": "one".encode("utf-16"), "sub/b.txt": "größe".encode("latin-1")},
        {},
        {"text is not UTF-8": 2},
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_as_people_have_them(tmp_path: Path, kind: str) -> None:
    files, kept, dropped = FOLDERS[kind]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    samples, drops = read_all(ImageFolderSource(str(tmp_path)))
    assert {sample.key: list(sample.captions) for sample in samples} == kept and drops == dropped


def test_what_a_folder_has_beside_pictures_is_said_by_suffix(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b.heic", "c.heic", "sub/d.pdf", "e", "f.jpg_large", ".g.pdf", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    source = ImageFolderSource(str(tmp_path), captions_required=False)
    assert len(source) == 1
    assert f"5 files passed over in {tmp_path}: 2 .heic, 1 without a suffix, 1 .jpg_large, 1 .pdf" in caplog.text
    (tmp_path / "a.png").rename(tmp_path / "0.tar")
    with pytest.raises(FileNotFoundError, match=r"holds no picture .* but 2 \.heic, .* WebDatasetSource reads tars"):
        ImageFolderSource(str(tmp_path))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


class TestWebDataset:
    def test_members_are_grouped_by_key(self, tmp_path: Path) -> None:
        half_pair = rb'{"caption": "\ud800"}'
        members = {
            "./a/001.png": png(1),
            "./a/001.txt": b"one",
            "./a/002.json": b'{"caption": "two", "n": 2}',
            "./a/002.seg.png": png(99),
            "./a/002.png": png(2),
            "./b/002.png": png(3),
            "./b/002.txt": b"other folder, same name",
            "004.txt": b"no picture",
            "005.png": png(5),
            "006.png": png(6),
            "006.json": b"{",
            "007.png": b"broken",
            "007.txt": b"seven",
            "008.png": png(8),
            "008.json": half_pair,
        }
        write_tar(tmp_path / "x.tar", members)
        samples, drops = read_all(WebDatasetSource(str(tmp_path / "*.tar")))
        assert [(s.key, value_of(s), s.captions, s.metadata) for s in samples] == [
            ("a/001", 1, ["one"], {}),
            ("a/002", 2, ["two"], {"n": 2}),
            ("b/002", 3, ["other folder, same name"], {}),
        ]
        assert drops == {
            "no picture": 1,
            "no caption": 1,
            "broken JSON": 1,
            "not a picture": 1,
            "text is not UTF-8": 1,
        }

    def test_each_tar_is_a_unit(self, tmp_path: Path) -> None:
        for folder in "ab":
            write_tar(tmp_path / folder / "0.tar", {"1.png": png(1), "1.txt": b"x"})
        write_tar(tmp_path / "b" / "1.tar", {})
        source = WebDatasetSource([str(tmp_path / "a/*.tar"), str(tmp_path / "b/*.tar")])
        assert [unit.name for unit in source.units()] == ["a-0", "b-0", "b-1"]
        assert len(read_all(source)[0]) == 2

    def test_errors_name_the_tar(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no tar file at .*/\*\.tar"):
            WebDatasetSource(str(tmp_path / "*.tar"))
        write_tar(tmp_path / "cut.tar", {f"{n}.txt": b"x" * 5000 for n in range(9)})
        content = (tmp_path / "cut.tar").read_bytes()
        (tmp_path / "cut.tar").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"cut.tar is damaged or cut short"):
            read_all(WebDatasetSource(str(tmp_path / "cut.tar")))

    def test_cut_anywhere_a_tar_is_damaged(self, tmp_path: Path) -> None:
        """Also between two members, or between the blocks that end it."""
        write_tar(tmp_path / "x.tar", {f"{n}.{suffix}": png(n) for n in range(2) for suffix in ("png", "seg.png")})
        whole = (tmp_path / "x.tar").read_bytes()
        end = len(whole.rstrip(b"\0")) + tarfile.BLOCKSIZE
        for length in range(0, end, 256):
            (tmp_path / "x.tar").write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"x\.tar is damaged or cut short"):
                read_all(WebDatasetSource(str(tmp_path / "x.tar")))

    def test_columns_are_named_and_captions_may_be_missing(self, tmp_path: Path) -> None:
        entry = {"short": "s", "deep": {"long": ["l", " "]}, "masks": list(range(99)), "size": {"w": 4}}
        members = {"1.png": png(1), "1.json": json.dumps(entry).encode(), "2.png": png(2), "2.txt": b"beside"}
        write_tar(tmp_path / "x.tar", members)
        chosen = {"captions": ["short", "deep.long"], "metadata": ["size.w"]}
        samples, drops = read_all(WebDatasetSource(str(tmp_path / "x.tar"), **chosen))
        assert [(s.captions, s.metadata) for s in samples] == [(["s", "l"], {"size.w": 4})]
        assert drops == {"no caption": 1}
        source = WebDatasetSource(str(tmp_path / "x.tar"), captions_required=False, **chosen)
        assert [s.captions for s in read_all(source)[0]] == [["s", "l"], []]

    def test_a_file_that_comes_twice_is_another_sample(self, tmp_path: Path) -> None:
        """None is put in the place of another in silence."""
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name, content in (("1.png", png(1)), ("1.txt", b"one"), ("1.png", png(2)), ("1.txt", b"two")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        samples, _ = read_all(WebDatasetSource(str(tmp_path / "x.tar")))
        assert [(s.key, value_of(s), s.captions) for s in samples] == [("1", 1, ["one"]), ("1", 2, ["two"])]


def suffixes(stem: str, *names: str) -> dict[str, bytes]:
    """A picture or a caption for each suffix."""
    return {f"{stem}{name}": png(1) if name.lower().endswith("png") else b"one" for name in names}


TARS: dict[str, tuple[dict[str, bytes], dict[str, list[str]], dict[str, int]]] = {
    "pictures first": (
        suffixes("0", ".png") | suffixes("1", ".png") | suffixes("0", ".txt") | suffixes("1", ".txt"),
        {},
        {"no caption": 2, "no picture": 2},
    ),
    "captions first": (
        suffixes("0", ".txt") | suffixes("1", ".txt") | suffixes("0", ".png") | suffixes("1", ".png"),
        {},
        {"no picture": 2, "no caption": 2},
    ),
    "one file added later": (
        suffixes("0", ".png", ".txt") | suffixes("1", ".png", ".txt") | suffixes("0", ".cls"),
        {"0": ["one"], "1": ["one"]},
        {"no picture": 1},
    ),
    "dots in names": (
        suffixes("img", ".01.png", ".01.txt", ".02.png", ".02.txt"),
        {},
        {"no picture": 1},
    ),
    "parts of a sample": (suffixes("img", ".png", ".txt", ".seg.png", ".seg.json"), {"img": ["one"]}, {}),
    "hidden": (
        suffixes("0", ".png", ".txt")
        | suffixes("._0", ".png", ".txt")
        | suffixes(".thumbs/0", ".png", ".txt")
        | suffixes("__MACOSX/0", ".png", ".txt")
        | suffixes("./a/.git/0", ".png", ".txt"),
        {"0": ["one"]},
        {},
    ),
    "names of captions": (
        suffixes("0", ".png", ".caption") | suffixes("1", ".PNG", ".TXT") | suffixes("2", ".png", ".png.txt"),
        {"0": ["one"], "1": ["one"], "2": ["one"]},
        {},
    ),
    "with and without a dot in front": (suffixes("./a/0", ".png") | suffixes("a/0", ".txt"), {"a/0": ["one"]}, {}),
    "text of other kinds": (
        suffixes("0", ".png")
        | {"0.txt": "one".encode("utf-16")}
        | suffixes("1", ".png")
        | {"1.json": DEEP}
        | suffixes("2", ".png")
        | {"2.json": b'\xef\xbb\xbf{"text": "one"}'},
        {"2": ["one"]},
        {"text is not UTF-8": 1, "broken JSON": 1},
    ),
}


@pytest.mark.parametrize("kind", TARS)
def test_tars_as_people_pack_them(tmp_path: Path, kind: str) -> None:
    members, kept, dropped = TARS[kind]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    samples, drops = read_all(WebDatasetSource(str(tmp_path / "x.tar")))
    assert {sample.key: list(sample.captions) for sample in samples} == kept and drops == dropped


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tars_are_read_to_their_end(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    """Also if they were compressed in parts, and with an error if a byte is lost."""
    plain = write_webdataset(tmp_path / "x.tar", pictures(4)).read_bytes()
    packed = write_webdataset(tmp_path / "packed.tar", [])
    for whole in (compress(plain), compress(plain[:3000]) + compress(plain[3000:])):
        packed.write_bytes(whole)
        assert len(read_all(WebDatasetSource(str(packed)))[0]) == 4
        for length in (6, 30, len(whole) // 2, len(whole) - 1):
            packed.write_bytes(whole[:length])
            with pytest.raises(UserError, match=r"packed\.tar is damaged or cut short"):
                read_all(WebDatasetSource(str(packed)))


PATHS: dict[str, tuple[list[str], list[str]]] = {
    "pattern": (["?/*1.tar"], ["a/00001.tar"]),
    "folder": (["."], ["a/00000.tar", "a/00001.tar", "b/c/00001.tar.gz"]),
    "folders": (["b", "a"], ["b/c/00001.tar.gz", "a/00000.tar", "a/00001.tar"]),
    "folders of a pattern": (["[ab]"], ["a/00000.tar", "a/00001.tar", "b/c/00001.tar.gz"]),
    "one": (["a/00001.tar"], ["a/00001.tar"]),
}


@pytest.mark.parametrize("kind", PATHS)
def test_where_tars_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    paths, found = PATHS[kind]
    for name in ("a/00000.tar", "a/00001.tar", "b/c/00001.tar.gz", "b/c/notes.txt", ".hidden/x.tar", "b/._x.tar"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
    assert [str(tar) for tar in WebDatasetSource(paths).tars] == found


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{0..3}.tar", r"no tar file at \{0\.\.3\}\.tar: name a file, a pattern such as data/\*\.tar, or a folder"),
        ("empty", r"no tar file at empty: .* folder that holds \.tar, .*ImageFolderSource reads folders of pictures"),
    ],
)
def test_tars_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("0.tar").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=message):
        WebDatasetSource(path)


ROWS = [
    Picture("first", png(10), ["one"], {"score": 1.5, "info": {"source": "web", "long": "a long one"}}),
    Picture("second", png(20), ["two"], {"score": 2.5, "info": {"source": "book", "long": None}}),
    Picture("third", b"broken", ["three"], {"score": 0.5, "info": {"source": "web", "long": "x"}}),
    Picture("fourth", png(40), [], {"score": 0.5, "info": {"source": "web", "long": "y"}}),
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` copies goes away with the tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.mark.parametrize("streaming", [False, True])
class TestHuggingFace:
    def test_rows_of_parquet_files(self, tmp_path: Path, streaming: bool) -> None:
        write_parquet(tmp_path / "a.parquet", ROWS[:2])
        write_parquet(tmp_path / "b.parquet", ROWS[2:])
        files = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
        source = HuggingFaceSource("parquet", data_files=files, key="key", streaming=streaming)
        names = ["train-00000-of-00002", "train-00001-of-00002"] if streaming else ["train-000000000"]
        assert [unit.name for unit in source.units()] == names
        samples, drops = read_all(source)
        assert [(s.key, value_of(s), s.captions, s.metadata) for s in samples] == [
            ("first", 10, ["one"], {"key": "first", **ROWS[0].metadata}),
            ("second", 20, ["two"], {"key": "second", **ROWS[1].metadata}),
        ]
        assert drops == {"not a picture": 1, "no caption": 1}
        json.dumps(source.describe())
        dropped: list[Dropped] = []
        _ = [list(decoded(source.read(unit, dropped), dropped)) for unit in source.units()]
        assert [reason for _, reason in dropped] == ["not a picture", "no caption"] and dropped[0][0] == "third"

    def test_columns_by_name_and_files_by_path(self, tmp_path: Path, streaming: bool) -> None:
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures/a.png").write_bytes(png(7))
        entries = [{"img": f"{name}.png", "prompt": "p", "Task2": {"Caption": "c"}} for name in ("a", "gone")]
        (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, entries)))
        source = HuggingFaceSource(
            "json",
            data_files=str(tmp_path / "list.jsonl"),
            streaming=streaming,
            image=["img"],
            image_root=str(tmp_path / "pictures"),
            captions=["prompt", "Task2.Caption"],
            metadata=["Task2.Caption"],
        )
        samples, drops = read_all(source)
        assert [(value_of(s), s.captions, s.metadata) for s in samples] == [(7, ["p", "c"], {"Task2.Caption": "c"})]
        assert drops == {"picture file missing": 1} and samples[0].key.endswith("000000000")

    def test_text_that_is_no_unicode_costs_one_row(self, tmp_path: Path, streaming: bool) -> None:
        offsets = np.array([0, 1, 2, 3], np.int32)
        caption = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(offsets), pa.py_buffer(b"a\xffb")])
        images = [{"bytes": png(n), "path": None} for n in range(3)]
        pq.write_table(pa.table({"image": images, "caption": caption}), tmp_path / "x.parquet")
        samples, drops = read_all(
            HuggingFaceSource("parquet", data_files=str(tmp_path / "x.parquet"), streaming=streaming)
        )
        assert [s.captions for s in samples] == [["a"], ["b"]] and drops == {"text is not UTF-8": 1}

    def test_a_column_that_is_not_there_is_named_before_work(self, tmp_path: Path, streaming: bool) -> None:
        file = str(write_parquet(tmp_path / "a.parquet", ROWS))
        with pytest.raises(ValueError, match=r"no column 'aesthetic'; it has key, image, captions, score, info"):
            HuggingFaceSource("parquet", data_files=file, metadata=["aesthetic"], streaming=streaming)


def parquet(file: str, **columns: list[Any]) -> None:
    pq.write_table(pa.table(columns), file)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "nobody/nothing"}, "nobody/nothing cannot be read: "),
        ({"path": "parquet", "data_files": "none.parquet"}, r"cannot be read: Unable to find .*none\.parquet"),
        ({"path": "set", "split": "validation"}, r"set cannot be read: .*validation.*train"),
        ({"path": "set", "name": "other"}, r"set cannot be read: .*'other' not found. Available: \['default'\]"),
        ({"path": "empty"}, r"empty cannot be read: .*doesn't contain any data files"),
        (
            {"path": "parquet", "data_files": "cut.parquet"},
            r"parquet of cut\.parquet cannot be read: .*a line above names it",
        ),
        ({"path": "parquet", "data_files": ["set/a.parquet", "flipped.parquet"]}, r"flipped\.parquet.* cannot be read"),
        ({"path": "json", "data_files": "broken.jsonl"}, r"json of broken\.jsonl cannot be read"),
        ({"path": "set/a.parquet"}, r"is a file: .*--source\.path parquet --source\.data_files set/a\.parquet"),
        ({"path": "laion"}, r"laion has none of the columns captions, caption, text; it has image, TEXT, URL: name"),
    ],
)
def test_what_datasets_raises_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str, streaming: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("set", "empty", "laion"):
        Path(folder).mkdir()
    write_parquet(Path("set/a.parquet"), ROWS[:2])
    parquet("laion/a.parquet", image=[png(1)], TEXT=["one"], URL=["http://example.com"])
    content = bytearray(Path("set/a.parquet").read_bytes())
    Path("cut.parquet").write_bytes(content[:-30])
    content[60:260] = bytes(200)
    Path("flipped.parquet").write_bytes(content)
    Path("broken.jsonl").write_text('{"image": "x", "caption": "y"}\n{"image": ')
    with pytest.raises(UserError, match=message):
        read_all(HuggingFaceSource(**arguments, streaming=streaming))


PLACES: dict[str, tuple[Any, Counter[str] | str]] = {
    "path": ("0.png", Counter()),
    "file of an archive": ("zip://in/0.png::pictures.zip", Counter()),
    "file that an archive lacks": ("zip://in/9.png::pictures.zip", Counter({"picture file missing": 1})),
    "archive that is missing": ("zip://in/0.png::none.zip", Counter({"picture file missing": 1})),
    "web address": (
        "https://example.com/0.png",
        Counter({"web address in place of a picture (img2dataset fetches them)": 1}),
    ),
    "empty path": ("", Counter({"no picture": 1})),
    "unknown protocol": ("gopher://0.png", r"gopher://0\.png could not be read \(ValueError: Protocol not known"),
    "hub without a connection": ("hf://datasets/nobody/x/0.png", r"hf://.*0\.png could not be read \(\w+"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_column_says_where_pictures_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    place, dropped = PLACES[kind]
    Path("0.png").write_bytes(png(7))
    with zipfile.ZipFile("pictures.zip", "w") as archive:
        archive.writestr("in/0.png", png(7))
    parquet("a.parquet", image=[place], caption=["one"])
    source = HuggingFaceSource("parquet", data_files="a.parquet")
    if isinstance(dropped, str):
        with pytest.raises(UserError, match=dropped):
            read_all(source)
        return
    samples, drops = read_all(source)
    assert drops == dropped and [value_of(sample) for sample in samples] == [7] * (not dropped)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_zip_of_pictures_as_the_hub_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("pictures.zip", "w") as archive:
        for number in range(3):
            archive.writestr(f"in/{number}.png", png(number))
        rows = [{"file_name": f"{number}.png", "text": str(number)} for number in range(3)]
        archive.writestr("in/metadata.jsonl", "\n".join(map(json.dumps, rows)))
    samples, drops = read_all(HuggingFaceSource("imagefolder", data_files="pictures.zip", streaming=streaming))
    assert [(value_of(s), s.captions) for s in samples] == [(n, [str(n)]) for n in range(3)] and not drops


def test_a_streamed_set_of_tars_as_the_hub_holds_them(tmp_path: Path) -> None:
    """As Synthetic-dataset-1M: the builder of `datasets` names the columns by suffix."""
    members = {}
    for name, suffix in (("a", "png"), ("b", "png")):
        members |= {f"{name}.{suffix}": png(ord(name)), f"{name}.json": b'{"short_caption": "s", "long_caption": "l"}'}
    write_tar(tmp_path / "data-0.tar", members)
    source = HuggingFaceSource(
        "webdataset",
        data_files={"train": [str(tmp_path / "data-0.tar")]},  # type: ignore[arg-type]
        streaming=True,
        image=["png"],
        captions=["json.short_caption", "json.long_caption"],
        key="__key__",
        metadata=[],
    )
    samples, drops = read_all(source)
    assert [(s.key, value_of(s), s.captions) for s in samples] == [("a", 97, ["s", "l"]), ("b", 98, ["s", "l"])]
    assert not drops
