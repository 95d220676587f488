"""What the project asks of the Hugging Face hub beyond downloading: whether a name is one of its, and what it stated.

The hub states the SHA-256 of every large file. A download keeps that statement beside the file, so a file can be held
against it later too, without a network.
"""

from __future__ import annotations

import re
from pathlib import Path

SHA256 = re.compile(r"[0-9a-f]{64}")


def is_hub_id(path: str | Path) -> bool:
    """Whether a name can only mean owner/name on the hub, and not a local path that is missing."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None and not Path(path).parent.is_dir()


def stated_sha256(file: Path) -> str | None:
    """SHA-256 (hex) that the hub stated when it gave this file; None for a file that it did not give.

    In the hub's cache a file is a link to a blob that is named by the statement; in a directory of the user's
    (``hf download --local-dir``) the statement is in ``.cache/huggingface/download``.
    """
    blob = file.resolve()
    if blob.parent.name == "blobs" and SHA256.fullmatch(blob.name):
        return blob.name
    notes = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    if notes.is_file():
        lines = notes.read_text().splitlines()  # commit, ETag, time
        if len(lines) > 1 and SHA256.fullmatch(lines[1]):
            return lines[1]
    return None
