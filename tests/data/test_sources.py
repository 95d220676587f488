from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simplear.data import ImageFolderSource, ScenesSource, Source, WebDatasetSource
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
        assert [unit.name for unit in source.units()] == ["000000-0", "000001-0", "1"]
        assert len(read_all(source)[0]) == 2

    def test_errors_name_the_tar(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no tar file at .*/\*\.tar"):
            WebDatasetSource(str(tmp_path / "*.tar"))
        write_tar(tmp_path / "cut.tar", {f"{n}.txt": b"x" * 5000 for n in range(9)})
        content = (tmp_path / "cut.tar").read_bytes()
        (tmp_path / "cut.tar").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"cut.tar is damaged or cut short"):
            read_all(WebDatasetSource(str(tmp_path / "cut.tar")))
