from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pytest

from simplear.data.shards import (
    MANIFEST_FILE,
    Bucket,
    TokenRow,
    TokenShards,
    claim_directory,
    is_committed,
    merge_manifest,
    write_shard,
)

from .conftest import make_rows, write_rows


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    rows = make_rows(30, (3, 2))
    shards = TokenShards(write_rows(tmp_path, {"a": rows[:17], "b": [], "c": rows[17:]}))
    assert len(shards) == 30 and shards.grids == {(3, 2): 30}
    picks = np.array([29, 0, 16, 17, 3])
    read = shards.read(picks)
    assert read.keys == [rows[pick].key for pick in picks]
    assert read.captions == [list(rows[pick].captions) for pick in picks]
    assert read.metadata == [rows[pick].metadata for pick in picks]
    np.testing.assert_array_equal(read.codes, np.stack([rows[pick].codes for pick in picks]))


@pytest.mark.parametrize("captions", [["one\0two", "\0"], ["", "\0\0", ""], ["größe", "字"]])
def test_captions_come_back_whole_whatever_is_in_them(tmp_path: Path, captions: list[str]) -> None:
    write_rows(tmp_path, {"a": [TokenRow("0", np.zeros((1, 1), np.uint16), captions)]})
    assert TokenShards(tmp_path).read(np.array([0])).captions == [captions]


def test_datasets_reads_the_same_file(tmp_path: Path) -> None:
    rows = make_rows(5, (2, 3))
    write_rows(tmp_path, {"a": rows})
    dataset = datasets.Dataset.from_file(str(tmp_path / "a.arrow"))
    assert dataset[3]["tokens"] == rows[3].codes.flatten().tolist()
    assert (dataset[3]["height"], dataset[3]["width"]) == (2, 3)
    assert dataset[3]["captions"] == list(rows[3].captions)
    assert json.loads(dataset[3]["metadata"]) == rows[3].metadata


def test_reading_copies_no_file_and_holds_no_descriptor(shard_directory: Path) -> None:
    shards = TokenShards(shard_directory)
    before = len(list(Path("/proc/self/fd").iterdir()))
    shards.read(np.array([0, 1]))
    assert str(shard_directory / "a.arrow") in Path("/proc/self/maps").read_text()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert len(pickle.dumps(shards)) < 5_000


def test_buckets_divide_all_rows_by_grid(shard_directory: Path) -> None:
    shards = TokenShards(shard_directory)
    seen = []
    for grid, count in shards.grids.items():
        bucket = shards.bucket(grid)
        rows = bucket.rows(np.arange(len(bucket)))
        assert len(bucket) == count == len(rows)
        assert shards.read(rows).codes.shape[1:] == grid
        seen += rows.tolist()
    assert sorted(seen) == list(range(61))


def test_a_pattern_is_one_path_with_the_rows_of_all_its_directories(tmp_path: Path) -> None:
    for name, count in (("train-b", 2), ("train-a", 3), ("validation", 4)):
        write_rows(tmp_path / name, {"unit": make_rows(count, (2, 2), name)})
    shards = TokenShards([tmp_path / "train-*", tmp_path / "validation"])
    assert shards.rows_by_path((2, 2)) == [5, 4]
    assert shards.read(np.arange(4)).keys == ["train-a0", "train-a1", "train-a2", "train-b0"]
    with pytest.raises(FileNotFoundError, match=r"no token shards at .*other-\*"):
        TokenShards(tmp_path / "other-*")


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_rows(tmp_path / name, {"a": make_rows(9, (2, 2))})
    assert (tmp_path / "one/a.arrow").read_bytes() == (tmp_path / "two/a.arrow").read_bytes()
    assert (tmp_path / "one" / MANIFEST_FILE).read_bytes() == (tmp_path / "two" / MANIFEST_FILE).read_bytes()


def test_prompts_are_rows_with_an_empty_grid(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a red circle", "tag": "colors"}\n\n{"prompt": "two", "metadata": {"n": 2}, "x": 1}\n')
    shards = TokenShards(file)
    read = shards.read(np.array([1, 0]))
    assert shards.grids == {(0, 0): 2} and read.codes.shape == (2, 0, 0)
    assert read.captions == [["two"], ["a red circle"]]
    assert read.metadata == [{"n": 2}, {"tag": "colors"}]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"words": "x"}', '{"prompt": 3}'])
def test_a_prompt_that_cannot_be_read_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 2"):
        TokenShards(file)


def test_a_row_without_caption_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'k7' of 's'"):
        write_shard(tmp_path, "a", [TokenRow("k7", np.zeros((1, 1), np.uint16), [], source="s")])


class TestFaults:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        return write_rows(tmp_path, {"a": make_rows(4, (2, 2)), "b": make_rows(4, (2, 2))})

    def test_missing_directory(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nowhere.*simplear tokenize"):
            TokenShards(tmp_path / "nowhere")

    def test_missing_manifest(self, directory: Path) -> None:
        (directory / MANIFEST_FILE).unlink()
        with pytest.raises(FileNotFoundError, match=r"manifest.json.*again"):
            TokenShards(directory)

    def test_newer_version(self, directory: Path) -> None:
        manifest = json.loads((directory / MANIFEST_FILE).read_text())
        (directory / MANIFEST_FILE).write_text(json.dumps(manifest | {"format_version": 99}))
        with pytest.raises(ValueError, match=r"version 99"):
            TokenShards(directory)

    def test_missing_shard(self, directory: Path) -> None:
        (directory / "b.arrow").unlink()
        with pytest.raises(FileNotFoundError, match=r"b.arrow"):
            TokenShards(directory)

    def test_truncated_shard(self, directory: Path) -> None:
        content = (directory / "b.arrow").read_bytes()
        (directory / "b.arrow").write_bytes(content[:-1])
        assert is_committed(directory, "a") and not is_committed(directory, "b")
        with pytest.raises(ValueError, match=rf"b.arrow has {len(content) - 1} bytes instead of {len(content)}"):
            TokenShards(directory)
        with pytest.raises(ValueError, match=r"unit b"):
            merge_manifest(directory, ["a", "b"])

    def test_one_changed_bit(self, directory: Path) -> None:
        TokenShards(directory).verify()
        content = bytearray((directory / "b.arrow").read_bytes())
        content[len(content) // 2] ^= 1
        (directory / "b.arrow").write_bytes(content)
        with pytest.raises(ValueError, match=r"b.arrow has SHA-256"):
            TokenShards(directory).verify()

    def test_no_arrow_stream(self, directory: Path) -> None:
        size = (directory / "b.arrow").stat().st_size
        (directory / "b.arrow").write_bytes(b"\x01" * size)
        with pytest.raises(ValueError, match=r"b.arrow is no readable"):
            TokenShards(directory).read(np.array([5]))

    def test_more_shards_than_a_process_may_map(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is wrong with the file then, and nobody must be told to delete it."""

        def refuse(*_: object, **__: object) -> None:
            raise OSError(12, "Memory mapping file failed: Cannot allocate memory")

        monkeypatch.setattr("pyarrow.memory_map", refuse)
        with pytest.raises(OSError, match=r"b\.arrow could not be mapped .*Cannot allocate memory.* vm\.max_map_count"):
            TokenShards(directory).read(np.array([5]))

    def test_code_outside_the_codebook(self, tmp_path: Path) -> None:
        rows = make_rows(3, (2, 2))
        rows[1].codes[0, 1] = 256
        shards = TokenShards(write_rows(tmp_path, {"a": rows}))
        with pytest.raises(ValueError, match=r"a.arrow, key 'row1': code 256 in a codebook of 256"):
            shards.read(np.array([2, 1]))

    @pytest.mark.parametrize("row", [-1, 8])
    def test_row_that_does_not_exist(self, directory: Path, row: int) -> None:
        with pytest.raises(IndexError, match=rf"row {row} "):
            TokenShards(directory).read(np.array([0, row]))

    def test_two_tokenizers(self, directory: Path, tmp_path: Path) -> None:
        other = write_rows(tmp_path / "other", {"a": make_rows(4, (2, 2))}, fingerprint="0" * 64)
        with pytest.raises(ValueError, match=r"other was made with the visual tokenizer 000000000000"):
            TokenShards([directory, other])

    def test_other_settings(self, tmp_path: Path) -> None:
        claim_directory(tmp_path, {"source": {"seed": 0}, "height": 64})
        claim_directory(tmp_path, {"source": {"seed": 0}, "height": 64})
        with pytest.raises(ValueError, match=r"source.seed = 0, not 1"):
            claim_directory(tmp_path, {"source": {"seed": 1}, "height": 64})


class Watched(dict[int, np.ndarray]):
    """Rows of shards of several grids, and which shards were looked at."""

    looked_at: ClassVar[list[int]] = []

    def __getitem__(self, shard: int) -> np.ndarray:
        self.looked_at.append(shard)
        return super().__getitem__(shard)

    def items(self) -> Any:
        raise AssertionError("all shards")


def test_of_many_shards_of_several_grids_only_those_of_the_batch_are_looked_at() -> None:
    """Each has rows 1, 3 and 5 of its six."""
    count = 2000
    picks = Watched({shard: np.array([1, 3, 5]) for shard in range(count)})
    bucket = Bucket(6 * np.arange(count), 3 * np.arange(1, count + 1), picks)
    positions = np.array([5999, 0, 1, 3000, 2])
    assert bucket.rows(positions).tolist() == [6 * (p // 3) + 2 * (p % 3) + 1 for p in positions.tolist()]
    assert set(Watched.looked_at) == {1999, 0, 1000}
