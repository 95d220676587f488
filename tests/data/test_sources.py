from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from corpora import Picture, write_parquet, write_token_files
from simplear.data import (
    HuggingFaceSource,
    ImageDataModule,
    ImageFolderSource,
    ScenesSource,
    Source,
    TokenFilesSource,
    WebDatasetSource,
)
from simplear.data.drops import Drops
from simplear.data.sources import Sample


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def read_all(source: Source) -> tuple[list[Sample], Counter[str]]:
    drops: Counter[str] = Counter()
    return [sample for unit in source.units() for sample in source.read(unit, drops)], drops


def value_of(sample: Sample) -> int:
    return int(np.asarray(sample.image)[0, 0, 0])


class TestScenes:
    def test_units_make_the_corpus_and_do_not_depend_on_their_size(self) -> None:
        samples, drops = read_all(ScenesSource(10, 16, rows_per_unit=4))
        again, _ = read_all(ScenesSource(10, 16, rows_per_unit=10))
        assert [sample.key for sample in samples] == [sample.key for sample in again] and not drops
        assert all((a.image == b.image).all() for a, b in zip(samples, again, strict=True))
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
        assert drops == {"no caption": 1, "not a picture": 1, "text is no valid Unicode": 1}

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
        assert drops == {"picture file missing": 1, "captions are no text": 1}

    def test_errors_name_place_and_line(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nowhere is no folder"):
            ImageFolderSource(str(tmp_path / "nowhere"))
        with pytest.raises(FileNotFoundError, match=r"holds no picture"):
            ImageFolderSource(str(tmp_path))
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"name": "b.png"}\n')
        with pytest.raises(ValueError, match=r"metadata.jsonl, line 2"):
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
            "text is no valid Unicode": 1,
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
        named = Drops()
        _ = [list(source.read(unit, named)) for unit in source.units()]
        assert named.listed() == [("third", "not a picture"), ("fourth", "no caption")]

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
        assert [s.captions for s in samples] == [["a"], ["b"]] and drops == {"text is no valid Unicode": 1}

    def test_a_column_that_is_not_there_is_named_before_work(self, tmp_path: Path, streaming: bool) -> None:
        file = str(write_parquet(tmp_path / "a.parquet", ROWS))
        with pytest.raises(ValueError, match=r"no column 'aesthetic'; it has key, image, captions, score, info"):
            HuggingFaceSource("parquet", data_files=file, metadata=["aesthetic"], streaming=streaming)


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


class TestTokenFiles:
    def test_codes_and_captions_in_the_order_of_their_numbers(self, tmp_path: Path) -> None:
        grids = [np.arange(6).reshape(2, 3) + 10 * n for n in range(12)]
        codes = write_token_files(tmp_path, [(str(n), grid, [f"short {n}", "long"]) for n, grid in enumerate(grids)])
        source = TokenFilesSource(str(codes), rows_per_unit=5)
        assert [unit.count for unit in source.units()] == [5, 5, 2]
        samples, drops = read_all(source)
        assert [Path(s.key).name for s in samples] == [f"{n}.npy" for n in range(12)] and not drops
        assert all(s.codes is not None and (s.codes == grid).all() for s, grid in zip(samples, grids, strict=True))
        assert samples[3].captions == ["short 3", "long"]

    def test_they_are_no_pictures(self, tmp_path: Path) -> None:
        source = TokenFilesSource(str(write_token_files(tmp_path, [("0", np.ones((2, 2)), ["zero"])])))
        with pytest.raises(ValueError, match=r"0\.npy' has codes and no picture: this needs a source of pictures"):
            ImageDataModule(source, 1, 8, 8).setup("fit")

    def test_a_list_names_the_files(self, tmp_path: Path) -> None:
        write_token_files(tmp_path, [("7", np.ones((1, 2)), ["seven"])])
        entries = [{"code_path": "512_codes/7.npy", "label_path": "512_labels/7.npy"}]
        entries.append({"code_path": "512_codes/8.npy", "label_path": "512_labels/7.npy"})
        (tmp_path / "meta.json").write_text(json.dumps(entries))
        samples, drops = read_all(TokenFilesSource(str(tmp_path / "meta.json"), root=str(tmp_path)))
        assert [(s.key, s.captions) for s in samples] == [("512_codes/7.npy", ["seven"])]
        assert drops == {"code file missing": 1}
        (tmp_path / "meta.json").write_text('[{"code_path": "x"}]')
        with pytest.raises(ValueError, match=r"meta.json, entry 0 is no object"):
            TokenFilesSource(str(tmp_path / "meta.json"))

    def test_files_that_are_broken_are_counted_and_other_arrays_are_errors(self, tmp_path: Path) -> None:
        codes = write_token_files(tmp_path, [(str(n), np.ones((4, 4)), [f"{n}"]) for n in range(4)])
        (codes / "0.npy").write_bytes((codes / "0.npy").read_bytes()[:-3])
        (codes / "1.npy").write_bytes(b"")
        (tmp_path / "512_labels/2.npy").write_text("\n")
        source = TokenFilesSource(str(codes))
        samples, drops = read_all(source)
        assert len(samples) == 1 and drops == {"truncated or damaged code file": 2, "no caption": 1}
        np.save(codes / "3.npy", np.ones((4, 4), np.float32))
        with pytest.raises(ValueError, match=r"3\.npy holds an array \(4, 4\) of float32"):
            read_all(source)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no directory of codes"):
            TokenFilesSource(str(tmp_path / "512_codes"))
        (tmp_path / "512_codes").mkdir()
        with pytest.raises(FileNotFoundError, match=r"holds no codes"):
            TokenFilesSource(str(tmp_path / "512_codes"))
        with pytest.raises(ValueError, match=r'does not end in "_codes"'):
            TokenFilesSource(str(tmp_path))
