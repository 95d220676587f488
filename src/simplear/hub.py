"""What the project asks of the Hugging Face hub beyond downloading: whether a name is one of its, and what it stated.

The hub states the SHA-256 of every large file. A download keeps that statement beside the file, so a file can be held
against it later too, without a network.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub.constants import HF_HUB_OFFLINE

SHA256 = re.compile(r"[0-9a-f]{64}")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
LOCAL_DIRECTORIES = frozenset("checkpoints data configs logs models outputs out results runs states".split())  # noqa: SIM905
"""First parts of names that are paths, whether or not there is such a directory."""
FILE_SUFFIXES = (".ckpt", ".safetensors", ".json", ".yaml", ".bin", ".pt")


def is_hub_id(path: str | Path) -> bool:
    """Whether a name that is no local path can be owner/name on the hub, and does not look like a path."""
    name = str(path)
    return (
        HUB_ID.fullmatch(name) is not None
        and not Path(name).parent.is_dir()
        and name.partition("/")[0] not in LOCAL_DIRECTORIES
        and not name.endswith(FILE_SUFFIXES)
    )


def missing_on_hub(name: str | Path, error: Exception) -> str:
    """Why a name that `is_hub_id` gave nothing, for messages: it may have been meant as a path, too."""
    reason = "it is not asked, HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else type(error).__name__
    return f"there is no directory {Path(name).absolute()}, and {name} could not be had from the hub ({reason})"


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
