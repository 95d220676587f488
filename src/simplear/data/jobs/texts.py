"""Sets of texts without images, so that a language model does not forget how to write: ``simplear data text``.

They are token shards like others, whose rows have no codes and one caption, the text; their settings name no visual
tokenizer, so they go with sets of any. A long text becomes several rows, cut where a line or a word ends. Each file is
read once, from its beginning to its end, in pieces; a shard is committed when it is full, and what is committed stays,
so a run that was stopped is run again.

Left out: filtering and deduplication of text, for which there are good tools (datatrove, for one) that write what is
read here.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simplear.atomic import remove_abandoned
from simplear.data.shards import (
    MANIFEST_FILE,
    TokenRow,
    claim_directory,
    committed_sidecar,
    merge_manifest,
    write_shard,
)
from simplear.data.sources.base import distinct_names
from simplear.errors import MissingFileError, UserError
from simplear.hashing import file_identity
from simplear.progress import progress_bar
from simplear.text_files import parse_json, read_lines, valid_unicode

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 1800
"""Of a row: some 450 tokens of English under Qwen2.5's tokenizer, below the 512 that captions are cut to."""
PARQUET_ROWS = 1000
"""Rows of a parquet file in memory at once."""
ENOUGH, MUCH = 10_000, 1_000_000
"""Bytes of a .txt after which it may be cut where a line is blank, and must be where one ends."""
WHITE_SPACE = re.compile(r"\s*")
NO_CODES = np.empty((0, 0), np.uint16)

Texts = Iterator[tuple[str, str, int]]
"""Key within the file, text, and bytes of the file read for it."""


def write_texts(
    files: list[str],
    out: str,
    *,
    column: str = "text",
    max_characters: int = MAX_CHARACTERS,
    rows_per_shard: int = 10_000,
) -> None:
    """Write token shards of texts without images; run again after a stop, it goes on where it was.

    Args:
        files: .txt (one running text each), .jsonl (an object a line) or .parquet files, UTF-8.
        out: Directory for the token shards.
        column: Of .jsonl and .parquet: what holds the text.
        max_characters: Longer texts become several rows, cut at the end of a line or word.
        rows_per_shard: Rows of one token shard.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another kind of file; a parquet file that is damaged or has no such column; a .txt that is not
            UTF-8; no text at all.
    """
    if max_characters < 1 or rows_per_shard < 1:
        raise UserError(f"max_characters {max_characters} and rows_per_shard {rows_per_shard} must be above 0.")
    paths = [Path(file) for file in files]
    for path in paths:
        if path.suffix.lower() not in READERS:
            raise UserError(f"{path} is none of {', '.join(READERS)}: convert it, or take it out.")
        if not path.is_file():
            raise MissingFileError(f"no file of texts at {path}.")
        if path.suffix.lower() == ".parquet":
            _parquet(path, column)
    target = Path(out)
    source = {
        "class": "texts",
        "column": column,
        "max_characters": max_characters,
        "rows_per_shard": rows_per_shard,
    }
    settings = {"visual_tokenizer": None, "codebook_size": None, "downsample": None, "made_by": "simplear data text"}
    claim_directory(target, {**settings, "source": source})
    remove_abandoned(target)
    names: list[str] = []
    dropped: Counter[str] = Counter()
    units = distinct_names([path.with_name(re.sub(r"[^\w-]+", "-", path.name)) for path in paths])
    with progress_bar(sum(path.stat().st_size for path in paths), "texts", "B", unit_scale=True) as bar:
        for path, unit in zip(paths, units, strict=True):
            identity = file_identity(path)
            for number, (rows, drops) in enumerate(_shards(path, column, max_characters, rows_per_shard, bar.update)):
                name = f"{unit}-{number:06d}"
                names.append(name)
                dropped += drops
                if committed_sidecar(target, name, identity) is None:
                    made = [TokenRow(key, NO_CODES, [text], {}, name) for key, text in rows]
                    write_shard(target, name, made, drops, identity)
    for reason, count in sorted(dropped.items()):
        logger.warning("%d texts left out: %s", count, reason)
    manifest = merge_manifest(target, names)
    if not manifest["rows"]:
        (target / MANIFEST_FILE).unlink()
        raise UserError(f"the files hold no text: {', '.join(files)}; of a .jsonl, --column names the key of the text.")
    print(f"{manifest['rows']} texts in {len(names)} shards: {target}")


def _shards(
    path: Path, column: str, max_characters: int, rows_per_shard: int, advance: Callable[[int], object]
) -> Iterator[tuple[list[tuple[str, str]], Counter[str]]]:
    """Rows of one shard after another, with what was left out among them."""
    drops: Counter[str] = Counter()
    rows: list[tuple[str, str]] = []
    for key, text, size in READERS[path.suffix.lower()](path, column, drops):
        advance(size)
        parts = list(pieces(text, max_characters))
        for number, part in enumerate(parts):
            rows.append((f"{path.stem}:{key}" + (f".{number}" if len(parts) > 1 else ""), part))
            if len(rows) == rows_per_shard:
                yield rows, drops.copy()
                rows = []
                drops.clear()
    if rows or drops:
        yield rows, drops


def pieces(text: str, max_characters: int) -> Iterator[str]:
    """A text in parts of at most so many characters, cut where a line ends, else a word, else anywhere."""
    place = 0  # in place of copies of the rest, which would take the square of its length
    while len(text) - place > max_characters:
        end = place + max_characters + 1
        found = (text.rfind(mark, place + 1, end) for mark in "\n ")
        cut = next((cut for cut in found if cut > 0), end - 1)
        if part := text[place:cut].strip():
            yield part
        place = WHITE_SPACE.match(text, cut).end()  # type: ignore[union-attr]
    if part := text[place:].strip():
        yield part


def _running_text(path: Path, column: str, drops: Counter[str]) -> Texts:
    """A .txt: lines up to a blank one, some ten thousand bytes together or more, for the cutting to choose from."""
    first, held, size = 1, list[str](), 0
    for number, line in read_lines(path, blank=True):
        held.append(f"{line}\n")
        size += len(line.encode()) + 1
        if size >= ENOUGH and (not line.strip() or size >= MUCH):
            yield str(first), "".join(held), size
            first, held, size = number + 1, [], 0
    if held:
        yield str(first), "".join(held), size


def _json_lines(path: Path, column: str, drops: Counter[str]) -> Texts:
    for number, line in read_lines(path):
        yield str(number), _json_text(line, column, drops), len(line.encode()) + 1


def _json_text(line: str, column: str, drops: Counter[str]) -> str:
    try:
        entry = parse_json(line)
    except ValueError:
        entry = None
    if not isinstance(entry, Mapping):
        drops["no JSON object"] += 1
        return ""
    if column not in entry:
        drops[f"no key {column}"] += 1
        return ""
    return _text(entry[column], drops)


def _parquet_rows(path: Path, column: str, drops: Counter[str]) -> Texts:
    file = _parquet(path, column)
    size = path.stat().st_size // max(file.metadata.num_rows, 1)
    number = 0
    try:
        for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield str(number), _text(value, drops), size
                number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged near row {number} ({error}): fetch it again.") from error


def _parquet(path: Path, column: str) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no readable parquet file ({error}): fetch it again.") from error
    if column not in file.schema_arrow.names:
        raise UserError(f"{path} has no column {column}, but {file.schema_arrow.names}: name one (--column).")
    return file


def _text(value: object, drops: Counter[str]) -> str:
    """The text, or an empty one, with the reason counted."""
    if not isinstance(value, str):
        drops["no string"] += 1
        return ""
    if not valid_unicode(value):
        drops["no valid Unicode"] += 1
        return ""
    if not value.strip():
        drops["empty"] += 1
        return ""
    return value


READERS: dict[str, Callable[[Path, str, Counter[str]], Texts]] = {
    ".txt": _running_text,
    ".jsonl": _json_lines,
    ".parquet": _parquet_rows,
}
