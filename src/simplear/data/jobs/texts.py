"""Sets of texts without images, so that a language model does not forget how to write: ``simplear data text``.

They are token shards whose rows have no codes and one caption, the text. Their settings name no visual tokenizer, so
they go with image sets of any. A long text becomes several rows, cut at the end of a line or word. Files are read in
pieces, and a shard is committed when it is full; a run that was stopped is run again and keeps what is committed.

Filtering and deduplication of text are left to tools made for it (datatrove, for one).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simplear.data.shards import (
    SETTINGS_FILE,
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
from simplear.text_files import read_lines, read_objects, valid_unicode

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 1800
"""Of a row: some 450 tokens of English under Qwen2.5's tokenizer, below the 512 that captions are cut to."""
SUFFIXES = (".txt", ".jsonl", ".parquet")
WHITE_SPACE = re.compile(r"\s*")


def write_texts(
    files: list[str],
    out: str,
    *,
    column: str = "text",
    max_characters: int = MAX_CHARACTERS,
    rows_per_shard: int = 10_000,
) -> None:
    """Write token shards of texts without images. You can stop it at any time; run it again to resume.

    Args:
        files: .txt (one running text each), .jsonl (an object a line) or .parquet files, UTF-8.
        out: Directory for the token shards.
        column: Of .jsonl and .parquet: what holds the text.
        max_characters: Longer texts become several rows, cut at the end of a line or word.
        rows_per_shard: Rows of one token shard.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another kind of file; a file that is damaged or has no such column; no text at all.
    """
    if max_characters < 1 or rows_per_shard < 1:
        raise UserError(f"max_characters {max_characters} and rows_per_shard {rows_per_shard} must be above 0.")
    paths = [Path(file) for file in files]
    for path in paths:
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path} is none of {', '.join(SUFFIXES)}: convert it, or take it out.")
        if not path.is_file():
            raise MissingFileError(f"no file of texts at {path}.")
        if path.suffix.lower() == ".parquet":
            _require_column(path, column)
    target = Path(out)
    source = {"class": "texts", "column": column, "max_characters": max_characters, "rows_per_shard": rows_per_shard}
    settings = {"visual_tokenizer": None, "codebook_size": None, "downsample": None, "made_by": "simplear data text"}
    claim_directory(target, {**settings, "source": source})
    names: list[str] = []
    units = distinct_names([path.with_name(re.sub(r"[^\w-]+", "-", path.name)) for path in paths])
    with progress_bar(None, "texts", " rows") as bar:
        for path, unit in zip(paths, units, strict=True):
            identity, drops = file_identity(path), Counter[str]()
            texts = _rows(path, column, max_characters, drops)
            for number, rows in enumerate(iter(lambda: list(islice(texts, rows_per_shard)), [])):  # noqa: B023
                names.append(f"{unit}-{number:06d}")
                if committed_sidecar(target, names[-1], identity) is None:
                    shard = [TokenRow(key, np.empty((0, 0), np.uint16), [text], {}, names[-1]) for key, text in rows]
                    write_shard(target, names[-1], shard, identity=identity)
                bar.update(len(rows))
            for reason, count in sorted(drops.items()):
                logger.warning("%s: %d texts left out: %s", path, count, reason)
    if not names:
        (target / SETTINGS_FILE).unlink()  # so that another --column can be tried
        raise UserError(f"the files hold no text: {', '.join(files)}; of a .jsonl, --column names the key of the text.")
    manifest = merge_manifest(target, names)
    print(f"{manifest['rows']} texts in {len(names)} shards: {target}")


def _rows(path: Path, column: str, max_characters: int, drops: Counter[str]) -> Iterator[tuple[str, str]]:
    """Keys and texts of a file's rows; counts what is left out."""
    for number, text in enumerate(_texts(path, column)):
        if not isinstance(text, str):
            drops[f"no text as {column}"] += 1
        elif not valid_unicode(text):
            drops["no valid Unicode"] += 1
        elif not text.strip():
            drops["empty"] += 1
        else:
            for part_number, part in enumerate(pieces(text, max_characters)):
                yield f"{path.stem}:{number}.{part_number}", part


def _texts(path: Path, column: str) -> Iterator[Any]:
    """What a file has in place of texts. Raises ValueError, naming file and place, for one that is damaged."""
    if path.suffix.lower() == ".txt":
        yield "\n".join(line for _, line in read_lines(path, blank=True))
    elif path.suffix.lower() == ".jsonl":
        for _, entry in read_objects(path):
            yield entry.get(column)
    else:
        try:
            for batch in pq.ParquetFile(path).iter_batches(columns=[column]):
                yield from batch.column(0).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged ({error}): fetch it again.") from error


def _require_column(path: Path, column: str) -> None:
    try:
        columns = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no readable parquet file ({error}): fetch it again.") from error
    if column not in columns:
        raise UserError(f"{path} has no column {column}, but {columns}: name one (--column).")


def pieces(text: str, max_characters: int) -> Iterator[str]:
    """A text in parts of at most so many characters, cut at the end of a line, else of a word, else anywhere."""
    place = 0  # copies of the rest would take time with the square of its length
    while len(text) - place > max_characters:
        end = place + max_characters + 1
        found = (text.rfind(mark, place + 1, end) for mark in "\n ")
        cut = next((cut for cut in found if cut > 0), end - 1)
        if part := text[place:cut].strip():
            yield part
        place = WHITE_SPACE.match(text, cut).end()  # type: ignore[union-attr]
    if part := text[place:].strip():
        yield part
