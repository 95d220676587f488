"""Training states as Lightning writes them: whether they are still what was written.

A state is a file, which is a zip archive with a CRC-32 of each tensor. Sharded training writes a directory of such
archives, one after another in a few files; ``.metadata`` says where each begins. PyTorch compares none of the checksums
on loading. Comparing them costs one reading of the state.

States are pickles, and a pickle can run code. Archives are only ever read as tensors and plain values
(``weights_only``), and a ``.metadata`` that names anything but the classes that describe tensors counts as damaged, so
it is refused before PyTorch would load it.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import metadata

LIGHTNING_METADATA = "meta.pt"
"""What Lightning adds to a sharded state: progress, and the states of callbacks."""
SHARDS_METADATA = ".metadata"
"""What torch.distributed.checkpoint says of the tensors in a sharded state."""
WEIGHTS = "state_dict"
"""Where Lightning keeps a module's weights."""
DAMAGED = "{} is damaged ({}): name another state, or --ckpt_path last."
_DESCRIPTIONS = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {*metadata.__all__, "_MEM_FORMAT_ENCODING"},
}
"""Classes and functions that ``.metadata`` may name, by module; dtypes and paths are admitted beside them."""


def damage(state: Path) -> str | None:
    """What is wrong with a state, file or directory; None if it is whole."""
    try:
        if state.is_dir():
            _check_directory(state)
        else:
            _check_archive(state)
    except Exception as error:  # a damaged archive or pickle raises any of a dozen kinds
        return str(error) or type(error).__name__
    return None


class _DescriptionUnpickler(pickle.Unpickler):
    """Reads ``.metadata`` and cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_path = module.partition(".")[0] == "pathlib" and name.endswith("Path") and name.isidentifier()
        if is_dtype or is_path or name in _DESCRIPTIONS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{SHARDS_METADATA} names {module}.{name}, which describes no tensor")


def _check_archive(archive: Path | IO[bytes]) -> None:
    with zipfile.ZipFile(archive) as opened:
        if (name := opened.testzip()) is not None:
            raise zipfile.BadZipFile(f"{name} does not have its checksum")


def _check_directory(state: Path) -> None:
    _check_archive(state / LIGHTNING_METADATA)
    with (state / SHARDS_METADATA).open("rb") as file:
        description: metadata.Metadata = _DescriptionUnpickler(file).load()
    for place in description.storage_data.values():
        with (state / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            try:
                _check_archive(io.BytesIO(file.read(place.length)))
            except zipfile.BadZipFile as error:
                raise zipfile.BadZipFile(f"{place.relative_path} at byte {place.offset}: {error}") from error
