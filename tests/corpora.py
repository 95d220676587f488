"""One set of pictures in every format that a source reads."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


@dataclass(frozen=True)
class Picture:
    """A file with what is known about it."""

    name: str
    """Without suffix."""
    content: bytes
    captions: Sequence[str]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def png(pixels: np.ndarray | tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    """Of an array (H, W, 3), or of one colour."""
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else Image.new("RGB", size, pixels)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pictures(count: int) -> list[Picture]:
    """Of one colour each, which is their number."""
    return [Picture(f"{n:03d}", png((n, 0, 0)), [f"picture {n}", f"a long text on {n}"]) for n in range(count)]


def write_folder(directory: Path, pictures: Iterable[Picture]) -> Path:
    """With a ``metadata.jsonl``."""
    directory.mkdir(parents=True)
    lines = []
    for picture in pictures:
        (directory / f"{picture.name}.png").write_bytes(picture.content)
        entry = {"file_name": f"{picture.name}.png", "captions": list(picture.captions), **picture.metadata}
        lines.append(json.dumps(entry))
    (directory / "metadata.jsonl").write_text("\n".join(lines))
    return directory


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_webdataset(path: Path, pictures: Iterable[Picture]) -> Path:
    members = []
    for picture in pictures:
        entry = {"captions": list(picture.captions), **picture.metadata}
        members += [(f"{picture.name}.png", picture.content), (f"{picture.name}.json", json.dumps(entry).encode())]
    return write_tar(path, members)


def write_parquet(path: Path, pictures: Sequence[Picture]) -> Path:
    """Columns key, image (as `datasets` holds it), captions, and those of the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[Any]] = {
        "key": [picture.name for picture in pictures],
        "image": [{"bytes": picture.content, "path": None} for picture in pictures],
        "captions": [list(picture.captions) for picture in pictures],
    }
    for name in pictures[0].metadata:
        columns[name] = [picture.metadata[name] for picture in pictures]
    pq.write_table(pa.table(columns), path)
    return path
