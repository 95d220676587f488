"""Training states as Lightning writes them: whether they are what was written, and the weights in them.

A state is a file, which is a zip archive with a CRC-32 of each tensor, or, from sharded training, a directory of such
archives one after another, whose places ``.metadata`` holds. PyTorch itself compares none of the checksums on loading.
One reading of the state is all that a comparison costs.

States hold pickles, and a pickle can run code. None does here: archives are read as tensors and plain values alone
(``weights_only``), and of ``.metadata`` only the classes that describe tensors are admitted. So a state from elsewhere
can be looked at and its weights taken out.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata, load
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata

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
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""Classes and functions that ``.metadata`` may name, by module; dtypes and paths are admitted beside them."""


def damage(state: Path) -> str | None:
    """What is wrong with a state, file or directory; None if it is whole."""
    try:
        if state.is_dir():
            _check_directory(state)
        else:
            _check_archive(state)
    except Exception as error:  # what a damaged archive or pickle raises is any of a dozen kinds
        return str(error) or type(error).__name__
    return None


def read_state(state: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of the module in a state, on CPU, and what else Lightning says there (``global_step``, ``epoch``, …).

    Optimizer states are left where they are: not even read.

    Args:
        state: file or directory; see `damage` for whether it is whole.
        prefix: only weights whose names begin so, and without it; all others are left out.

    Raises pickle.UnpicklingError for one that holds more than tensors and plain values, and whatever a damaged archive
    raises.
    """
    if state.is_dir():
        rest = torch.load(state / LIGHTNING_METADATA, map_location="cpu", weights_only=True)
        weights = _read_shards(state, f"{WEIGHTS}.{prefix}")
        return weights, rest
    rest = torch.load(state, map_location="cpu", weights_only=True, mmap=True)
    saved = rest.pop(WEIGHTS)
    return {name.removeprefix(prefix): weight for name, weight in saved.items() if name.startswith(prefix)}, rest


def _read_shards(state: Path, prefix: str) -> dict[str, Tensor]:
    reader = _SafeReader(state)
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if found:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninit.*")
            load(found, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): weight for name, weight in found.items()}


class _SafeReader(FileSystemReader):
    """torch's reader of sharded states, whose ``.metadata`` cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / SHARDS_METADATA, "rb") as file:
            metadata = _DescriptionUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{SHARDS_METADATA} holds a {type(metadata).__name__} and no metadata")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _DescriptionUnpickler(pickle.Unpickler):
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
    for place in _SafeReader(state).read_metadata().storage_data.values():
        with open(state / place.relative_path, "rb") as file:
            file.seek(place.offset)
            try:
                _check_archive(io.BytesIO(file.read(place.length)))
            except zipfile.BadZipFile as error:
                raise zipfile.BadZipFile(f"{place.relative_path} at byte {place.offset}: {error}") from error
