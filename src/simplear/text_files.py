"""Text that people write, read the same way by every verb: lines, JSON, JSON lines and prompts.

A line ends at \\n, \\r\\n or \\r and nowhere else: a caption may hold U+2028 or a form feed. A byte order mark is taken
off, blank lines do not count, and a file of another encoding is refused by the name of that encoding.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
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


class NotUTF8Error(UserError):
    """Text in another encoding."""


def read_lines(file: Path | bytes, name: str = "") -> Iterator[tuple[int, str]]:
    """Numbers, from 1, and content of the lines that are not blank, without their ends; read as they are asked for.

    Args:
        file: path, or content.
        name: of the content, for messages.

    Raises NotUTF8Error naming file, line and encoding.
    """
    name = name or ("the text" if isinstance(file, bytes) else str(file))
    with _opened(file) as opened:
        try:
            if _encoding(opened.peek(SAMPLE)[:SAMPLE]) is not None:
                raise UnicodeError
            # Universal newlines are \n, \r and \r\n; str.splitlines knows eight more.
            for number, line in enumerate(io.TextIOWrapper(opened, "utf-8-sig", newline=None), start=1):
                if line.strip():
                    yield number, line.rstrip("\n")
        except UnicodeError as error:
            raise _not_utf8(file, name) from error


def decode(content: bytes, name: str) -> str:
    """Text of a whole file. Raises NotUTF8Error naming the file and its encoding."""
    try:
        if _encoding(content[:SAMPLE]) is not None:
            raise UnicodeError
        return content.decode("utf-8-sig")
    except UnicodeError as error:
        raise _not_utf8(content, name) from error


def _opened(file: Path | bytes) -> io.BufferedReader:
    return io.BufferedReader(io.BytesIO(file)) if isinstance(file, bytes) else open(file, "rb")  # type: ignore[arg-type]


def _encoding(beginning: bytes) -> str | None:
    """UTF-16 by its byte order mark, or by the zero bytes that ASCII has in it."""
    if beginning[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    if beginning.count(0) > len(beginning) / 3:
        return "UTF-16LE" if beginning[1::2].count(0) > beginning[::2].count(0) else "UTF-16BE"
    return None


def _not_utf8(file: Path | bytes, name: str) -> NotUTF8Error:
    with _opened(file) as opened:
        encoding = _encoding(opened.peek(SAMPLE)[:SAMPLE])
        if encoding is not None:
            return NotUTF8Error(f"{name} is {encoding}, not UTF-8: convert it (iconv -f {encoding} -t UTF-8).")
        valid = (line.decode(errors="ignore").encode() == line for line in opened)
        number = next((number for number, fine in enumerate(valid, start=1) if not fine), 0)
    return NotUTF8Error(
        f"{name} is not UTF-8 (line {number}), perhaps Windows-1252: convert it (iconv -f WINDOWS-1252 -t UTF-8)."
    )


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, whose every error is a ValueError: objects nested too deep for it are not."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


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

    Raises UserError naming file and line for what is not a JSON object, or holds text that is not valid Unicode.
    """
    name = name or str(file)
    for number, line in read_lines(file, name):
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise UserError(f"{name}, line {number} is not JSON ({error}).") from error
        if not isinstance(entry, dict):
            raise UserError(f"{name}, line {number} is not a JSON object.")
        if "\\u" in line and not valid_unicode(json.dumps(entry, ensure_ascii=False)):
            raise UserError(f"{name}, line {number} holds half of a surrogate pair, which is not valid Unicode.")
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
        try:
            entries = parse_json(decode(path.read_bytes(), str(path)))
        except NotUTF8Error:
            raise
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}).") from error
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
