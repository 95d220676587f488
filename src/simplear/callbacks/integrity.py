"""Whether a training state is what was written, by the checksums that PyTorch puts into it.

A state is a file, which is a zip archive with a CRC-32 of each tensor, or, from sharded training, a directory of such
archives one after another, whose places ``.metadata`` holds. PyTorch itself compares none of the checksums on loading.
One reading of the state is all it costs.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import IO

from torch.distributed.checkpoint import FileSystemReader

LIGHTNING_METADATA = "meta.pt"
"""What Lightning adds to a sharded state: progress, and the states of callbacks."""


def damage(state: Path) -> str | None:
    """What is wrong with a state, None if it is whole.

    Args:
        state: a .ckpt, file or directory, of one's own: the directory's ``.metadata`` is a pickle.
    """
    try:
        if state.is_dir():
            _check_directory(state)
        else:
            _check_archive(state)
    except Exception as error:  # what a damaged archive or pickle raises is any of a dozen kinds
        return str(error) or type(error).__name__
    return None


def _check_archive(archive: Path | IO[bytes]) -> None:
    with zipfile.ZipFile(archive) as opened:
        if (name := opened.testzip()) is not None:
            raise zipfile.BadZipFile(f"{name} does not have its checksum")


def _check_directory(state: Path) -> None:
    _check_archive(state / LIGHTNING_METADATA)
    for place in FileSystemReader(state).read_metadata().storage_data.values():
        with open(state / place.relative_path, "rb") as file:
            file.seek(place.offset)
            try:
                _check_archive(io.BytesIO(file.read(place.length)))
            except zipfile.BadZipFile as error:
                raise zipfile.BadZipFile(f"{place.relative_path} at byte {place.offset}: {error}") from error
