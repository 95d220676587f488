from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simplear.cli import main
from simplear.data import TokenDataModule, TokenShards
from simplear.data.jobs.texts import pieces, write_texts
from simplear.data.shards import MANIFEST_FILE
from simplear.data.shards.verify import find_damage

from .conftest import CODEBOOK_SIZE

TEXTS = [f"A text of number {number}.\nIt has two lines, größe {number}." for number in range(25)]


def read(directory: Path) -> list[str]:
    shards = TokenShards(directory)
    assert list(shards.grids) == [(0, 0)] and shards.fingerprint is None and shards.codebook_size is None
    return [captions[0] for captions in shards.read(np.arange(len(shards))).captions]


def write(directory: Path, kind: str) -> Path:
    file = directory / f"texts{kind}"
    if kind == ".jsonl":
        file.write_text("".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)))
    elif kind == ".parquet":
        pq.write_table(pa.table({"text": TEXTS, "id": list(range(25))}), file)
    else:
        file.write_text("\ufeff" + "\n\n".join(TEXTS), encoding="utf-8")
    return file


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_a_text_is_a_row(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "text", str(write(tmp_path, kind)), "--out", str(tmp_path / "out"), "--rows-per-shard", "10"])
    assert read(tmp_path / "out") == TEXTS
    assert "25 texts in 3 shards" in capsys.readouterr().out
    assert not find_damage(tmp_path / "out")


def test_a_running_text_is_cut_where_lines_end(tmp_path: Path) -> None:
    write_texts([str(write(tmp_path, ".txt"))], str(tmp_path / "out"), max_characters=120)
    rows = read(tmp_path / "out")
    assert 5 < len(rows) < 25 and max(map(len, rows)) <= 120
    assert "".join("".join(rows).split()) == "".join("".join(TEXTS).split())
    assert all(row.startswith(("A text", "It has")) for row in rows)


def test_no_letter_is_lost_in_pieces() -> None:
    text = "word " * 50 + "x" * 70 + "\n\n" + "line\n" * 9
    parts = list(pieces(text, 30))
    assert max(map(len, parts)) <= 30 and "".join("".join(parts).split()) == "".join(text.split())
    assert list(pieces("  ", 5)) == [] and list(pieces("abc", 3)) == ["abc"]


class Counted(str):
    """Counts the letters that are taken out of it."""

    copied = 0

    def __getitem__(self, place: Any) -> str:
        part = super().__getitem__(place)
        Counted.copied += len(part)
        return part


def plain_pieces(text: str, most: int) -> list[str]:
    """What `pieces` does, with a copy of the rest for each piece."""
    found = []
    while len(text) > most:
        head = text[: most + 1]
        cut = max(head.rfind("\n"), 0) or max(head.rfind(" "), 0) or most
        found.append(text[:cut].strip())
        text = text[cut:].lstrip()
    return [part for part in [*found, text.strip()] if part]


def test_cutting_a_text_takes_each_letter_once() -> None:
    """A line of 16 MB took minutes when what was left was copied for each piece."""
    random = np.random.default_rng(0)
    for kind, letters in enumerate(("ab", "ab  ", "ab\n", "ab \n", " \n\u2028\x85\xa0x")):
        text = "".join(random.choice(list(letters), 20_000))
        for most in (1, 7, 100):
            Counted.copied = 0
            assert list(pieces(Counted(text), most)) == plain_pieces(text, most), (kind, most)
            assert Counted.copied <= len(text)


def test_what_is_no_text_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "texts.jsonl"
    lines = ['{"text": "fine"}', '{"text": ""}', '{"text": 3}', '{"other": "x"}', "", r'{"text": "\ud800"}']
    file.write_text("\n".join([*lines, '{"text": "<|t2i|> end"}']))
    write_texts([str(file)], str(tmp_path / "out"), rows_per_shard=1)
    assert read(tmp_path / "out") == ["fine", "<|t2i|> end"]
    for reason in (
        "1 texts left out: empty",
        "2 texts left out: no text as text",
        "1 texts left out: no valid Unicode",
    ):
        assert reason in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\ncaf\xe9", r"a\.txt is not UTF-8 \(line 2\)"),
        ("a.csv", b"x", r"a\.csv is none of \.txt, \.jsonl, \.parquet"),
        ("a.parquet", b"PAR1 no", r"a\.parquet is no readable parquet file"),
        ("a.jsonl", b"{}", r"hold no text"),
        ("a.txt", b" \n\n", r"hold no text"),
        ("a.jsonl", b'{"text": "x"}\n'.decode().encode("utf-16"), r"a\.jsonl is .*not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\nno json', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b"[1]", r"a\.jsonl, line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"a\.jsonl is not UTF-8 \(line 1\)"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        write_texts([str(tmp_path / name)], str(tmp_path / "out"))
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()


def test_files_come_and_go_and_only_new_ones_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also by another spelling of their paths; a file of other content under a name that was used is an error."""
    monkeypatch.chdir(tmp_path)
    names = ["a.txt", "a b.txt", "a-b.txt", "b.jsonl", "b.txt"]
    for name in names:
        text = f"text of {name}"
        Path(name).write_text(json.dumps({"text": text}) if name.endswith("jsonl") else text)

    def texts(*files: str) -> list[str]:
        write_texts(list(files), "out")
        return [row.removeprefix("text of ") for row in read(Path("out"))]

    assert texts("a.txt", "b.txt") == ["a.txt", "b.txt"]
    first = Path("out/a-txt-000000.arrow").stat().st_mtime_ns
    assert texts(str(tmp_path / "a.txt"), "b.jsonl", "b.txt") == ["a.txt", "b.jsonl", "b.txt"]
    assert texts("b.txt", "./a.txt") == ["b.txt", "a.txt"] and "1 units in out are not of the source" in caplog.text
    assert Path("out/a-txt-000000.arrow").stat().st_mtime_ns == first
    assert sorted(texts(*names)) == sorted(names)
    Path("b.txt").write_text("another")
    with pytest.raises(ValueError, match=r"b-txt-000000\.arrow was made from .* has 7 bytes"):
        texts("a.txt", "b.txt")


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no column body, but \['text', 'id'\]"):
        write_texts([str(write(tmp_path, ".parquet"))], str(tmp_path / "out"), column="body")
    assert not (tmp_path / "out").exists()


def killed_at_rename(number: int) -> None:
    """This process ends instead of renaming its file of that number."""
    count, replace = 0, os.replace

    def counted(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments)

    os.replace = counted  # type: ignore[assignment]


def test_a_writer_killed_again_and_again_ends_in_the_same_bytes(tmp_path: Path) -> None:
    file = str(write(tmp_path, ".jsonl"))

    def hashes(directory: Path) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}

    write_texts([file], str(tmp_path / "whole"), rows_per_shard=4)
    kills, lived = 0, False
    while not lived:
        process = os.fork()
        if process == 0:
            killed_at_rename(3)
            write_texts([file], str(tmp_path / "killed"), rows_per_shard=4)
            os._exit(0)
        lived = os.waitpid(process, 0)[1] == 0
        kills += not lived
    assert kills >= 4
    write_texts([file], str(tmp_path / "killed"), rows_per_shard=4)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


class TestTraining:
    @pytest.fixture
    def texts(self, tmp_path: Path) -> str:
        write_texts([str(write(tmp_path, ".jsonl"))], str(tmp_path / "texts"))
        return str(tmp_path / "texts")

    def test_batches_of_texts_are_plain_text(
        self, texts: str, shard_directory: Path, text_tokenizer_directory: Path
    ) -> None:
        """No control token, prefix or dropout, whatever captions get; images are as ever."""
        paths = [str(shard_directory), texts]
        data = TokenDataModule(
            paths, 8, str(text_tokenizer_directory), weights=[3, 1], caption_dropout=1.0, caption_prefixes=["see: "]
        )
        data.setup("fit")
        assert data.grids == [(0, 0), (2, 2), (2, 3)] and data.codebook_size == CODEBOOK_SIZE and data.holds_texts
        kinds = {True: 0, False: 0}
        for batch in data.train_dataloader():
            plain = batch["codes"].numel() == 0
            kinds[plain] += 1
            for ids, mask, caption in zip(batch["input_ids"], batch["attention_mask"], batch["captions"], strict=True):
                if plain:
                    assert data.text_tokenizer.decode(ids[mask.bool()]) == caption
                else:
                    assert ids[0] == data.layout.text_to_image_id and ids[1] == data.layout.start_of_image_id
            assert bool(batch["dropped"].any()) is not plain
        assert kinds[True] == round(sum(kinds.values()) / 4)

    def test_texts_alone_need_a_codebook_size(self, texts: str, text_tokenizer_directory: Path) -> None:
        with pytest.raises(ValueError, match=r"prompts or texts alone do not say"):
            TokenDataModule(texts, 8, str(text_tokenizer_directory)).setup("fit")
        TokenDataModule(texts, 8, str(text_tokenizer_directory), codebook_size=CODEBOOK_SIZE).setup("fit")

    def test_prompts_beside_texts_are_refused(self, texts: str, text_tokenizer_directory: Path, tmp_path: Path) -> None:
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n')
        data = TokenDataModule([texts, str(tmp_path / "prompts.jsonl")], 2, str(text_tokenizer_directory))
        with pytest.raises(ValueError, match=r"prompts are for GRPO"):
            data.setup("fit")

    def test_damaged_texts_are_found_before_training(self, texts: str, text_tokenizer_directory: Path) -> None:
        shard = next(Path(texts).glob("*.arrow"))
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=r"has SHA-256"):
            TokenDataModule(texts, 8, str(text_tokenizer_directory), codebook_size=8).setup("fit")
