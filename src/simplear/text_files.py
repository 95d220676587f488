"""Text that people write, read the same way by every verb: lines, JSON, JSON lines and prompts.

A line ends at \\n, \\r\\n or \\r and nowhere else: a caption may hold U+2028 or a form feed. A byte order mark is taken
off, blank lines do not count, and a file of another encoding is refused by the name of that encoding.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from simplear.errors import MissingFileError, UserError

FreeText = Annotated[str, "free text"]
"""Type of an option whose value the command line takes as it is typed: no YAML, no interpolation."""

STANDARD_INPUT = "-"
"""In place of a file's name."""
PROMPT_SUFFIXES = (".txt", ".jsonl", ".json", "")
PROMPT_KEYS = ("prompt", "caption", "text")
SAMPLE = 4096
"""Bytes that are looked at to tell UTF-16."""
MAX_NESTING = 100
"""Of lists and objects in JSON."""


class NotUTF8Error(UserError):
    """Text in another encoding."""


def read_lines(file: Path | bytes, name: str = "", *, blank: bool = False) -> Iterator[tuple[int, str]]:
    """Numbers, from 1, and content of the lines that are not blank, without their ends; read as they are asked for.

    Args:
        file: path, or content.
        name: of the content, for messages.
        blank: give blank lines too.

    Raises NotUTF8Error naming file, line and encoding.
    """
    name = name or ("the text" if isinstance(file, bytes) else str(file))
    for number, encoded in encoded_lines(file, name):
        try:
            line = encoded.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(name, number) from error
        if blank or line.strip():
            yield number, line


def encoded_lines(file: Path | bytes, name: str) -> Iterator[tuple[int, bytes]]:
    """As `read_lines`, with blank lines, and not decoded, for whoever can leave out a line that is not UTF-8.

    Raises NotUTF8Error for UTF-16, of which no line could be read.
    """
    number = 0
    with _opened(file) as opened:
        if encoding := utf16_encoding(opened.peek(SAMPLE)[:SAMPLE]):
            raise _not_utf8(name, encoding)
        opened.read(len(BOM_UTF8) if opened.peek(len(BOM_UTF8)).startswith(BOM_UTF8) else 0)
        for ended in opened:  # at \n
            for line in ended.splitlines():  # of bytes: at \n, \r and \r\n; that of text knows eight more
                number += 1
                yield number, line


def decode(content: bytes, name: str) -> str:
    """Text of a whole file. Raises NotUTF8Error naming the file and its encoding."""
    if encoding := utf16_encoding(content[:SAMPLE]):
        raise _not_utf8(name, encoding)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(name, len((error.object[: error.start] + b".").splitlines())) from error


def _opened(file: Path | bytes) -> io.BufferedReader:
    return io.BufferedReader(io.BytesIO(file)) if isinstance(file, bytes) else open(file, "rb")  # type: ignore[arg-type]


def utf16_encoding(beginning: bytes) -> str | None:
    """Name of the encoding of UTF-16, by its byte order mark or by the zero bytes that ASCII has in it; else None."""
    if beginning[:2] in (BOM_UTF16_LE, BOM_UTF16_BE):
        return "UTF-16"
    if beginning.count(0) > len(beginning) / 3:
        return "UTF-16LE" if beginning[1::2].count(0) > beginning[::2].count(0) else "UTF-16BE"
    return None


def _not_utf8(name: str, found: str | int) -> NotUTF8Error:
    """Of the encoding, or of the number of the first line that is in another."""
    if isinstance(found, str):
        return NotUTF8Error(f"{name} is {found}, not UTF-8: convert it (iconv -f {found} -t UTF-8).")
    return NotUTF8Error(
        f"{name} is not UTF-8 (line {found}), perhaps Windows-1252: convert it (iconv -f WINDOWS-1252 -t UTF-8)."
    )


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, whose errors are all ValueErrors, also for what is nested too deep.

    The limit is well below Python's own, which depends on the caller: what was parsed can be written and parsed again.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    level, depth = [content], 0
    while level := [part for parent in level for part in _parts(parent)]:
        depth += 1
        if depth > MAX_NESTING:
            raise ValueError("nested too deep")
    return content


def read_json(file: Path) -> Any:
    """What a file of JSON holds. Raises UserError naming the file."""
    text = decode(file.read_bytes(), str(file))
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}).") from error


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_table(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows, by column, of a .csv whose first line names the columns.

    Raises UserError naming file and line for a row with more or fewer cells, or a quote that is not closed.
    """
    rows = csv.DictReader(io.StringIO(decode(file.read_bytes(), str(file)), newline=""), strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise UserError(f"{file}, line {rows.line_num} does not have {len(rows.fieldnames or ())} cells.")
            yield rows.line_num, row
    except csv.Error as error:
        raise UserError(f"{file}, line {rows.reader.line_num} is not CSV ({error}).") from error


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, naming the file, for any other content."""
    try:
        content = parse_json(decode(file.read_bytes(), str(file)))
    except NotUTF8Error:
        raise
    except ValueError as error:
        raise UserError(f"{file} is not JSON, perhaps cut short ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object.")
    return content


def valid_unicode(text: str) -> bool:
    """Whether UTF-8 can hold the text: JSON can spell half of a surrogate pair, and file names may be undecodable."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_objects(file: Path | bytes, name: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of JSON lines; arguments as for `read_lines`.

    Raises UserError naming file and line for what is not a JSON object. Text may still hold half of a surrogate pair.
    """
    name = name or str(file)
    for number, line in read_lines(file, name):
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise UserError(f"{name}, line {number} is not JSON ({error}).") from error
        if not isinstance(entry, dict):
            raise UserError(f"{name}, line {number} is not a JSON object.")
        yield number, entry


def read_prompts(file: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Prompts of a file, each with its metadata.

    Of .txt, a file without a suffix and standard input ("-") each line is a prompt. Of .jsonl each line is an object,
    and .json is a list of objects or of texts; an object has "prompt", "caption" or "text", and its "metadata", or
    without one all its other keys, are the metadata.

    Raises:
        MissingFileError: no such file.
        UserError: another kind of file, or an entry without a prompt; names file and line.
    """
    path = Path(file)
    if str(file) == STANDARD_INPUT:
        return [(line, {}) for _, line in read_lines(sys.stdin.buffer.read(), "standard input")]
    if not path.is_file():
        raise MissingFileError(f"there is no file of prompts at {path}.")
    if path.suffix.lower() not in PROMPT_SUFFIXES:
        raise UserError(
            f'{path}: prompts are read from .txt (one a line), .jsonl (an object with a "prompt" a line) and .json (a '
            f"list of these), not from {path.suffix}: convert it."
        )
    if path.suffix.lower() == ".jsonl":
        return [_prompt(entry, f"{path}, line {number}") for number, entry in read_objects(path)]
    if path.suffix.lower() == ".json":
        entries = read_json(path)
        if not isinstance(entries, list):
            raise UserError(f"{path} is not a JSON list of prompts.")
        return [_prompt(entry, f"{path}, entry {number}") for number, entry in enumerate(entries, start=1)]
    return [(line, {}) for _, line in read_lines(path)]


def _prompt(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        entry = {"prompt": entry}
    key = next((key for key in PROMPT_KEYS if isinstance(entry, dict) and key in entry), None)
    if key is None or not isinstance(entry[key], str):
        raise UserError(f'{where} has no text "prompt".')
    metadata = entry.get("metadata", {name: value for name, value in entry.items() if name != key})
    if not isinstance(metadata, dict):
        raise UserError(f'{where}: "metadata" must be an object.')
    if not valid_unicode(json.dumps(entry, ensure_ascii=False)):
        raise UserError(f"{where} holds half of a surrogate pair, which is not valid Unicode.")
    return entry[key], metadata
