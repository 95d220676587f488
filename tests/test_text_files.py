"""Text that people write, as editors leave it: each reader of the project takes the same lines out of it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpora import png, write_tar
from simplear.data import ImageFolderSource, Listed, Source, TokenShards, WebDatasetSource
from simplear.data.jobs.texts import write_texts
from simplear.data.sample import Dropped
from simplear.errors import UserError
from simplear.evaluation.dpg_rules import COLUMNS, read_questions
from simplear.text_files import decode, parse_json, read_json, read_lines, read_objects, read_prompts

TEXTS = ["one\u2028line", "next\x85line", "feed\x0cform\x1cfile\x0bvertical", "größe ☃", "separator\u2029end"]
"""One line each, whatever `str.splitlines` says."""


def caption_beside(directory: Path, content: bytes) -> list[str]:
    (directory / "a.png").write_bytes(png((1, 1, 1)))
    (directory / "a.txt").write_bytes(content)
    return captions(ImageFolderSource(str(directory)))


def listing(directory: Path, content: bytes) -> list[str]:
    (directory / "a.png").write_bytes(png((1, 1, 1)))
    (directory / "metadata.jsonl").write_bytes(content)
    return captions(ImageFolderSource(str(directory)))


def caption_in_a_tar(directory: Path, content: bytes) -> list[str]:
    write_tar(directory / "x.tar", [("a.png", png((1, 1, 1))), ("a.txt", content)])
    return captions(WebDatasetSource(str(directory / "x.tar")))


def captions(source: Source) -> list[str]:
    dropped: list[Dropped] = []
    found = [text for unit in source.units() for sample in source.read(unit, dropped) for text in sample.captions]
    if dropped:
        raise UserError(f"dropped: {dropped}")
    return found


def prompts(suffix: str) -> Callable[[Path, bytes], list[str]]:
    def read(directory: Path, content: bytes) -> list[str]:
        (directory / f"prompts{suffix}").write_bytes(content)
        return [prompt for prompt, _ in read_prompts(directory / f"prompts{suffix}")]

    return read


def training_prompts(directory: Path, content: bytes) -> list[str]:
    (directory / "prompts.jsonl").write_bytes(content)
    shards = TokenShards(str(directory / "prompts.jsonl"))
    return [caption for row in shards.read(np.arange(len(shards))).captions for caption in row]


def texts(suffix: str) -> Callable[[Path, bytes], list[str]]:
    def read(directory: Path, content: bytes) -> list[str]:
        (directory / f"texts{suffix}").write_bytes(content)
        write_texts([str(directory / f"texts{suffix}")], str(directory / "out"))
        shards = TokenShards(directory / "out")
        return [line for row in shards.read(np.arange(len(shards))).captions for line in row[0].split("\n") if line]

    return read


def listed(directory: Path, content: bytes) -> list[str]:
    (directory / "list.txt").write_bytes(content)
    return sorted(Listed(str(directory / "list.txt")).listed, key=TEXTS.index)


def questions(directory: Path, content: bytes) -> list[str]:
    (directory / "dpg_bench.csv").write_bytes(content)
    return [question.text for question in read_questions(directory / "dpg_bench.csv")["0"]]


def as_lines(texts: Sequence[str]) -> list[str]:
    return list(texts)


def as_objects(key: str, **other: Any) -> Callable[[Sequence[str]], list[str]]:
    return lambda texts: [json.dumps({key: text, **other}, ensure_ascii=False) for text in texts]


def as_table(columns: Sequence[str], row: Callable[[int, str], Sequence[Any]]) -> Callable[[Sequence[str]], list[str]]:
    def write(texts: Sequence[str]) -> list[str]:
        file = io.StringIO(newline="")
        csv.writer(file, lineterminator="\n").writerows([columns, *(row(n, text) for n, text in enumerate(texts))])
        return file.getvalue().split("\n")[:-1]

    return write


Writer = Callable[[Sequence[str]], list[str]]
DOORS: dict[str, tuple[Callable[[Path, bytes], list[str]], Writer]] = {
    "caption beside a picture": (caption_beside, as_lines),
    "caption in a tar": (caption_in_a_tar, as_lines),
    "metadata.jsonl": (listing, as_objects("text", file_name="a.png")),
    "prompts.txt": (prompts(".txt"), as_lines),
    "prompts.jsonl": (prompts(".jsonl"), as_objects("prompt")),
    "prompts.json": (prompts(".json"), lambda texts: json.dumps(texts, ensure_ascii=False, indent=1).split("\n")),
    "prompts of training": (training_prompts, as_objects("prompt")),
    "data text .txt": (texts(".txt"), as_lines),
    "data text .jsonl": (texts(".jsonl"), as_objects("text")),
    "list of a filter": (listed, as_lines),
    "questions": (questions, as_table(COLUMNS, lambda n, text: ["0", n + 1, 0, "entity - whole (x)", text])),
}
LEFT_BY_EDITORS: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: text,
    "byte order mark": lambda text: "\ufeff" + text,
    "carriage returns": lambda text: "\ufeff" + text.replace("\n", "\r\n"),
    "carriage returns alone": lambda text: text.replace("\n", "\r"),
    "blank last lines": lambda text: text + "\n\n",
    "no end of the last line": lambda text: text.rstrip("\n"),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_line_is_a_line_whatever_an_editor_adds(tmp_path: Path, door: str) -> None:
    read, write = DOORS[door]
    for number, left in enumerate(LEFT_BY_EDITORS.values()):
        directory = tmp_path / str(number)
        directory.mkdir()
        assert read(directory, left("\n".join(write(TEXTS)) + "\n").encode()) == TEXTS, list(LEFT_BY_EDITORS)[number]


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16LE", "UTF-16BE"])
@pytest.mark.parametrize("door", DOORS)
def test_another_encoding_is_refused(tmp_path: Path, door: str, encoding: str) -> None:
    """A file of captions that is UTF-16 costs its picture and is counted so; any other is an error."""
    read, write = DOORS[door]
    with pytest.raises(UserError, match="not UTF-8"):
        read(tmp_path, "\n".join(write(["a red circle"])).encode(encoding))


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (
            lambda file: list(read_lines(file)),
            r"x is not UTF-8 \(line 3\), perhaps .*: convert it \(iconv",
        ),
        (lambda file: decode(file.read_bytes(), str(file)), r"x is not UTF-8 \(line 3\)"),
        (lambda file: list(read_objects(file)), r"x, line 1 is not JSON"),
        (lambda file: read_json(file), r"x is not UTF-8 \(line 3\)"),
    ],
)
def test_a_line_that_is_not_utf8_is_named(tmp_path: Path, read: Callable[[Path], Any], message: str) -> None:
    (tmp_path / "x").write_bytes(b"one\r\r\xe9\n")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "x")


@pytest.mark.parametrize("opening", ["[", '{"a": ', '[{"a": '])
def test_nesting_beyond_any_reason_is_an_error_like_others(opening: str) -> None:
    """Python's own limit depends on who calls, so an object at the limit could be read and not be written."""
    closing = "".join({"[": "]", "{": "}"}[mark] for mark in reversed(opening) if mark in "[{")
    for depth in (2000, 100_000):
        with pytest.raises(ValueError, match="nested too deep"):
            parse_json(opening * depth + "1" + closing * depth)
    assert json.dumps(parse_json(opening * 50 + "1" + closing * 50))
