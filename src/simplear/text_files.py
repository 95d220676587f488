"""Text that people write, read the same way by every verb: lines, JSON, JSON lines and prompts.

A line ends at \\n, \\r\\n or \\r and nowhere else: a caption may hold U+2028 or a form feed. A byte order mark is
removed, blank lines do not count, and text in another encoding than UTF-8 is refused with the number of its line.
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


class NotUTF8Error(UserError):
    """Text in another encoding."""


def read_lines(file: Path | bytes, name: str = "", *, blank: bool = False) -> Iterator[tuple[int, str]]:
    """Numbers, from 1, and content of the lines that are not blank, without their ends, read one at a time.

    Args:
        file: path, or content.
        name: of the content, for messages.
        blank: yield blank lines too.

    Raises NotUTF8Error naming file and line.
    """
    name = name or ("the text" if isinstance(file, bytes) else str(file))
    raw = io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb")  # noqa: SIM115
    with io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            # ASCII in UTF-16 without a byte order mark is valid UTF-8, with a zero byte for every other character.
            if "\0" in line or not valid_unicode(line):
                raise NotUTF8Error(
                    f"{name} is not UTF-8 (line {number}), perhaps UTF-16 or Windows-1252: convert it (iconv -f UTF-16 "
                    "or -f WINDOWS-1252, -t UTF-8)."
                )
            if blank or line.strip():
                yield number, line.removesuffix("\n")


def decode(content: bytes, name: str) -> str:
    """The text of a whole file, with \\n at the ends of lines. Raises NotUTF8Error naming the file and the line."""
    return "\n".join(line for _, line in read_lines(content, name, blank=True))


def valid_unicode(text: str) -> bool:
    """Whether UTF-8 can hold the text: JSON can spell half of a surrogate pair, and file names may be undecodable."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, whose errors are all ValueErrors, also for text that is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises UserError naming the file."""
    text = decode(file.read_bytes(), str(file))
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{file} is not JSON, perhaps cut short ({error}).") from error


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, naming the file, for any other content."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object.")
    return content


def read_objects(file: Path | bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of JSON lines, in a file or as its content.

    Raises UserError naming file and line if it is not a JSON object. Text may still hold half of a surrogate pair.
    """
    name = "the text" if isinstance(file, bytes) else file
    for number, line in read_lines(file):
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise UserError(f"{name}, line {number} is not JSON ({error}).") from error
        if not isinstance(entry, dict):
            raise UserError(f"{name}, line {number} is not a JSON object.")
        yield number, entry


def read_prompts(file: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Prompts of a file, each with its metadata.

    In .txt, a file without a suffix and standard input ("-"), each line is a prompt. In .jsonl, each line is an object;
    .json holds a list of objects or texts. An object has "prompt", "caption" or "text"; its "metadata", or if it has
    none all its other keys, are the metadata.

    Raises:
        MissingFileError: no such file.
        UserError: another kind of file, or an entry without a prompt; names file and line.
    """
    path = Path(file)
    if str(file) == STANDARD_INPUT:
        return [(line, {}) for _, line in read_lines(sys.stdin.buffer.read(), "standard input")]
    if not path.is_file():
        raise MissingFileError(f"there is no file of prompts at {path}.")
    suffix = path.suffix.lower()
    if suffix not in PROMPT_SUFFIXES:
        raise UserError(
            f'{path}: prompts are read from .txt (one a line), .jsonl (an object with a "prompt" a line) and .json (a '
            f"list of these), not from {path.suffix}: convert it."
        )
    if suffix == ".jsonl":
        return [_prompt(entry, f"{path}, line {number}") for number, entry in read_objects(path)]
    if suffix == ".json":
        entries = read_json(path)
        if not isinstance(entries, list):
            raise UserError(f"{path} is not a JSON list of prompts.")
        return [_prompt(entry, f"{path}, entry {number}") for number, entry in enumerate(entries, start=1)]
    return [(line, {}) for _, line in read_lines(path)]


def _prompt(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    entry = {"prompt": entry} if isinstance(entry, str) else entry
    key = next((key for key in PROMPT_KEYS if isinstance(entry, dict) and key in entry), None)
    if key is None or not isinstance(entry[key], str):
        raise UserError(f'{where} has no text "prompt".')
    metadata = entry.get("metadata", {name: value for name, value in entry.items() if name != key})
    if not isinstance(metadata, dict):
        raise UserError(f'{where}: "metadata" must be an object.')
    if not valid_unicode(json.dumps(entry, ensure_ascii=False)):
        raise UserError(f"{where} holds half of a surrogate pair, which is not valid Unicode.")
    return entry[key], metadata
