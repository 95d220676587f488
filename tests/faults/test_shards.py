"""Token shards: damage is found before it is trained on, and the message names file, row and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simplear.cli import main
from simplear.data import TokenDataModule, TokenShards
from simplear.data.shards import MANIFEST_FILE, TokenRow, claim_directory, merge_manifest, write_shard
from toys import write_pretraining

CODEBOOK = 27


def rows(count: int, grid: tuple[int, int], prefix: str) -> list[TokenRow]:
    random = np.random.default_rng(count)
    return [
        TokenRow(f"{prefix}{n}", random.integers(0, CODEBOOK, grid).astype(np.uint16), [f"größe {n}", ""], {"n": n})
        for n in range(count)
    ]


def write(directory: Path, units: dict[str, list[TokenRow]], fingerprint: str = "0" * 64) -> Path:
    claim_directory(directory, {"visual_tokenizer": fingerprint, "codebook_size": CODEBOOK, "downsample": 8})
    for name, made in units.items():
        write_shard(directory, name, made)
    merge_manifest(directory, units)
    return directory


def read_all(directory: Path) -> list[Any]:
    shards = TokenShards(directory)
    read = [shards.read((bucket := shards.bucket(grid)).rows(np.arange(len(bucket)))) for grid in shards.grids]
    return [(part.keys, part.codes.tolist(), part.captions, part.metadata) for part in read]


def flip(file: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1 << bit
    file.write_bytes(content)


def test_whatever_bit_is_flipped_rows_are_right_or_refused(tmp_path: Path) -> None:
    """Through the whole file, its Arrow headers, lengths and offsets included, which could lead out of the file."""
    shard = write(tmp_path, {"unit": rows(3, (2, 2), "a") + rows(3, (1, 3), "b")}) / "unit.arrow"
    whole, right = shard.read_bytes(), read_all(tmp_path)
    refused = 0
    for byte in range(len(whole)):
        flip(shard, byte, byte * 5 % 8)
        try:
            assert read_all(tmp_path) == right
        except ValueError as error:
            assert "unit.arrow" in str(error) and "simplear tokenize" in str(error)
            refused += 1
        shard.write_bytes(whole)
    assert refused > len(whole) // 2


@pytest.mark.parametrize("what", [b"\x07\x00\x08\x00\x09", "größe 1".encode(), b'{"n": 1}', b"a1a2"])
def test_a_flipped_byte_names_file_and_row(tmp_path: Path, what: bytes) -> None:
    """Of codes, captions, metadata and keys; the other rows are read as ever."""
    made = rows(4, (1, 3), "a")
    made[1].codes[:] = [[7, 8, 9]]
    shard = write(tmp_path, {"unit": made}) / "unit.arrow"
    flip(shard, shard.read_bytes().index(what))
    shards = TokenShards(tmp_path)
    with pytest.raises(ValueError, match=r"unit\.arrow, row 1 is damaged \(checksum .*delete it and run the same"):
        shards.read(np.array([3, 1]))
    assert shards.read(np.array([0, 3])).keys == ["a0", "a3"]


@pytest.fixture
def fit(tmp_path: Path, tiny_text_tokenizer: str, tiny_visual_tokenizer: str, tiny_shards: str) -> list[str]:
    """A pretraining on a copy of token shards at ``tmp_path/shards``."""
    directory = tmp_path / "shards"
    directory.mkdir()
    for file in Path(tiny_shards).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = write_pretraining(tmp_path, tiny_text_tokenizer, tiny_visual_tokenizer, str(directory))
    return ["fit", "--config", str(config)]


def refused(arguments: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a training that must not have begun."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert not list(root.glob("run/logs/**/metrics.csv")) and not list(root.glob("run/states/*.ckpt"))
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed


def test_small_sets_are_hashed_before_training(
    fit: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a place that no checksum of a row covers, so that the hash alone can find it."""
    flip(tmp_path / "shards" / "unit.arrow", -1)
    printed = refused(fit, tmp_path, capsys)
    assert "unit.arrow has SHA-256" in printed and "delete it and run the same `simplear tokenize` again" in printed


@pytest.mark.parametrize(("verify", "found"), [(True, True), (False, False), (None, False)])
def test_large_sets_are_hashed_at_start_when_asked(
    fit: list[str],
    tmp_path: Path,
    tiny_text_tokenizer: str,
    monkeypatch: pytest.MonkeyPatch,
    verify: bool | None,
    found: bool,
) -> None:
    """Where they are not, no damaged row gets into a batch all the same."""
    monkeypatch.setattr("simplear.data.training.token_data.VERIFIED_AT_START", 100)
    shard = tmp_path / "shards" / "unit.arrow"
    flip(shard, shard.read_bytes().index(b"row3") + 3)
    data = TokenDataModule(str(tmp_path / "shards"), 4, tiny_text_tokenizer, verify=verify)
    if found:
        with pytest.raises(ValueError, match=r"unit\.arrow has SHA-256"):
            data.setup("fit")
        return
    data.setup("fit")
    with pytest.raises(ValueError, match=r"unit\.arrow, row 3 is damaged"):
        list(data.train_dataloader())


def test_ranks_divide_the_hashing(tmp_path: Path) -> None:
    directory = write(tmp_path, {name: rows(2, (1, 1), name) for name in "abc"})
    flip(directory / "b.arrow", -1)
    shards = TokenShards(directory)
    shards.verify(0, 2)
    with pytest.raises(ValueError, match=r"b\.arrow"):
        shards.verify(1, 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "unit.arrow").write_bytes((d / "unit.arrow").read_bytes()[:-9]), "cut short or changed; run"),
        (lambda d: (d / "unit.arrow").unlink(), "unit.arrow is missing: run the same"),
        (
            lambda d: (d / MANIFEST_FILE).write_text((d / MANIFEST_FILE).read_text()[:99]),
            "manifest.json is not JSON",
        ),
        (lambda d: edit(d, format_version=99), "manifest.json has format version 99, this code reads 3: update"),
        (lambda d: edit(d, format_version=1), "format version 1, this code reads 3: remove the directory and tokenize"),
        (lambda d: edit(d, visual_tokenizer="f" * 64), "the token shards: ffffffffffff…"),
        (lambda d: edit(d, codebook_size=28), "codebook of 28 codes, the model one of 27"),
    ],
)
def test_unusable_shards_stop_a_training_before_it_begins(
    fit: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, message: str
) -> None:
    damage(tmp_path / "shards")
    assert message in refused(fit, tmp_path, capsys)


def edit(directory: Path, **changes: Any) -> None:
    manifest = directory / MANIFEST_FILE
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


def test_codes_out_of_range_stop_a_training(
    fit: list[str], tmp_path: Path, tiny_visual_tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole shards, whose manifest claims a tokenizer that cannot have made these codes."""
    claimed = json.loads((tmp_path / "shards" / MANIFEST_FILE).read_text())["visual_tokenizer"]
    made = rows(20, (2, 2), "a")
    made[5].codes[1, 1] = CODEBOOK
    write(tmp_path / "other", {"unit": made}, claimed)
    with pytest.raises(SystemExit):
        main([*fit, "--data.init_args.paths", str(tmp_path / "other"), "--data.init_args.global_batch_size", "20"])
    printed = capsys.readouterr().err
    assert "other/unit.arrow, key 'a5': code 27 in a codebook of 27, in row 5 of the shard" in printed
    assert not list(tmp_path.glob("run/states/*.ckpt"))


def test_text_that_no_file_can_hold_is_refused_by_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 'k' of 's' has text that is no valid Unicode"):
        write_shard(tmp_path, "unit", [TokenRow("k", np.zeros((1, 1), np.uint16), ["\ud800"], source="s")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line", [b'{"prompt": "caf\xe9"}', rb'{"prompt": "\ud800"}', rb'{"prompt": "x", "n": "\ud800"}']
)
def test_prompts_that_are_no_text_are_refused_by_line(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "fine"}\n' + line)
    with pytest.raises(ValueError, match=r"prompts\.jsonl(, line 2| is not UTF-8 \(line 2\))"):
        TokenShards(file)
