"""Where pictures and captions come from: drawn scenes, folders of files, WebDataset tars.

A source is divided into units of work, which name the token shards made of them, so that any process can take any
unit. What cannot be used is dropped and counted by reason. A source of one's own derives from `Source` and is named by
its class path in YAML.

Left out: downloads. Tars are read from paths, one after the other member, never unpacked.
"""

from __future__ import annotations

import glob
import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from simplear.data.pictures import Drop, Pixels, open_rgb
from simplear.scenes import captions, draw, metadata, sample_scene

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
CAPTION_KEYS = ("captions", "caption", "text")
"""Where JSON metadata holds captions; the first that is there counts."""


@dataclass(frozen=True)
class Sample:
    """One picture with its captions."""

    key: str
    """Names the sample within its source."""
    image: Image.Image | Pixels
    """RGB."""
    captions: Sequence[str]
    """At least one, none empty."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Unit:
    """A piece of a source, as large as one token shard."""

    name: str
    """Unique in the source, safe as a file name."""
    part: Any
    """What the source needs to find it; picklable."""
    count: int | None = None
    """Samples in it, dropped ones included, where that is known beforehand."""


class Source(ABC):
    """Pictures and captions in units of work."""

    @abstractmethod
    def units(self) -> list[Unit]:
        """All units, in an order that does not change."""

    @abstractmethod
    def read(self, unit: Unit, drops: Counter[str]) -> Iterator[Sample]:
        """The unit's samples in their order; counts in `drops`, by reason, what is left out."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Settings that decide what the samples are; JSON values, kept in the manifest."""


class IndexedSource(Source):
    """A source whose samples have numbers, in units of `rows_per_unit` of them."""

    rows_per_unit: int
    unit_prefix: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """Sample `index`. Raises `Drop` when it cannot be used."""

    def units(self) -> list[Unit]:
        starts = range(0, len(self), self.rows_per_unit)
        parts = [range(start, min(start + self.rows_per_unit, len(self))) for start in starts]
        return [Unit(f"{self.unit_prefix}-{part.start:09d}", part, len(part)) for part in parts]

    def read(self, unit: Unit, drops: Counter[str]) -> Iterator[Sample]:
        for index in unit.part:
            try:
                yield self.sample(index)
            except Drop as reason:
                drops[str(reason)] += 1


class ScenesSource(IndexedSource):
    """The procedural corpus, drawn on demand."""

    def __init__(
        self,
        count: int,
        resolution: int,
        *,
        seed: int = 0,
        split: str = "train",
        rows_per_unit: int = 1000,
        first: int = 0,
    ) -> None:
        """
        Args:
            count: Number of scenes.
            resolution: Pixels along each side.
            seed: Seed of the corpus.
            split: "train", or "validation", whose scenes hold (shape, colour) pairs that training scenes never do.
            rows_per_unit: Scenes in one token shard.
            first: Index of the first scene, to take another part of the corpus.
        """
        self.count, self.resolution, self.seed, self.split = count, resolution, seed, split
        self.rows_per_unit, self.first = rows_per_unit, first
        self.unit_prefix = f"{split}-seed{seed}"

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        """Scene `first + index` with its short and long caption."""
        number = self.first + index
        scene = sample_scene(self.seed, number, self.split)
        key = f"{self.split}-seed{self.seed}-{number:09d}"
        return Sample(key, draw(scene, self.resolution), captions(scene, self.seed, number), metadata(scene))

    def describe(self) -> dict[str, Any]:
        names = ("count", "resolution", "seed", "split", "rows_per_unit", "first")
        return {"class": "ScenesSource", **{name: getattr(self, name) for name in names}}


class ImageFolderSource(IndexedSource):
    """A folder of pictures, sub-folders included, in the order of their paths.

    Captions stand in a .txt beside each picture, one a line; or in a ``metadata.jsonl`` at the top, which then says
    which pictures there are: ``file_name``, and ``captions``, ``caption`` or ``text``; other keys become metadata.
    """

    unit_prefix = "images"

    def __init__(self, path: str, *, rows_per_unit: int = 1000) -> None:
        """
        Args:
            path: The folder.
            rows_per_unit: Pictures in one token shard.

        Raises:
            FileNotFoundError: the folder is missing or holds no picture.
            ValueError: a line of metadata.jsonl is no object with a file_name.
        """
        self.path, self.rows_per_unit = Path(path), rows_per_unit
        if not self.path.is_dir():
            raise FileNotFoundError(f"{path} is no folder: give one that holds pictures.")
        listing = self.path / "metadata.jsonl"
        self._entries: list[tuple[str, dict[str, Any] | None]]
        if listing.exists():
            self._entries = _read_listing(listing)
        else:
            found = (file for file in self.path.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
            self._entries = [(name, None) for name in sorted(file.relative_to(self.path).as_posix() for file in found)]
        if not self._entries:
            raise FileNotFoundError(f"{path} holds no picture ({', '.join(sorted(PICTURE_SUFFIXES))}).")

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, index: int) -> tuple[Path, list[str], dict[str, Any]]:
        """File, captions and metadata of picture `index` of the sorted or listed paths; the picture is not opened.

        Raises `Drop` for captions that are no text.
        """
        name, listed = self._entries[index]
        file = self.path / name
        if listed is not None:
            return file, *captions_and_metadata(listed)
        text = file.with_suffix(".txt")
        return file, _caption_lines(text.read_bytes()) if text.exists() else [], {}

    def sample(self, index: int) -> Sample:
        """Picture `index` of the sorted or listed paths."""
        file, captions, metadata = self.entry(index)
        if not captions:
            raise Drop("no caption")
        return Sample(_valid(self._entries[index][0]), open_rgb(file), captions, metadata)

    def describe(self) -> dict[str, Any]:
        names = {"path": str(self.path), "pictures": len(self), "rows_per_unit": self.rows_per_unit}
        return {"class": "ImageFolderSource", **names}


class WebDatasetSource(Source):
    """Tar files in WebDataset's layout, one unit each.

    Files of a sample follow each other and share their path up to the first dot of its last part: a picture, and a
    .txt (a caption a line) or a .json (``captions``, ``caption`` or ``text``; the rest becomes metadata).
    """

    def __init__(self, paths: str | list[str]) -> None:
        """
        Args:
            paths: Paths of tar files, or patterns such as "data/*.tar".

        Raises:
            FileNotFoundError: a pattern fits no file.
        """
        self.paths = [paths] if isinstance(paths, str) else list(paths)
        self.tars: list[Path] = []
        for pattern in self.paths:
            found = sorted(glob.glob(pattern))
            if not found:
                raise FileNotFoundError(f"no tar file at {pattern}.")
            self.tars += map(Path, found)

    def units(self) -> list[Unit]:
        stems = Counter(tar.stem for tar in self.tars)
        # Tars of one name from several folders are told apart by their number in the list.
        return [
            Unit(tar.stem if stems[tar.stem] == 1 else f"{number:06d}-{tar.stem}", tar)
            for number, tar in enumerate(self.tars)
        ]

    def read(self, unit: Unit, drops: Counter[str]) -> Iterator[Sample]:
        """The samples of a tar. Raises ValueError for a tar that is damaged."""
        try:
            for key, members in _tar_groups(unit.part):
                try:
                    yield _tar_sample(key, members)
                except Drop as reason:
                    drops[str(reason)] += 1
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(
                f"{unit.part} is damaged or cut short ({error}): fetch it again, or take it out of the paths."
            ) from error

    def describe(self) -> dict[str, Any]:
        return {"class": "WebDatasetSource", "tars": [str(tar) for tar in self.tars]}


def captions_and_metadata(entry: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Captions of a JSON object and its other keys. Raises `Drop` for captions that are no text."""
    name = next((key for key in CAPTION_KEYS if key in entry), None)
    rest = {key: value for key, value in entry.items() if key != name}
    if name is None:
        return [], rest
    found = entry[name]
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Drop("captions are no text")
    _valid(json.dumps(entry, ensure_ascii=False))  # JSON can spell half of a surrogate pair, which no file can hold
    return [text.strip() for text in texts if text.strip()], rest


def _valid(text: str) -> str:
    """The text itself. Raises `Drop` for what UTF-8 cannot hold, such as file names in another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Drop("text is no valid Unicode") from error
    return text


def _caption_lines(content: bytes) -> list[str]:
    try:
        return [line.strip() for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise Drop("text is no valid Unicode") from error


def _read_listing(listing: Path) -> list[tuple[str, dict[str, Any] | None]]:
    entries: list[tuple[str, dict[str, Any] | None]] = []
    with open(listing, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line.decode())
                entries.append((entry.pop("file_name"), entry))
            except (ValueError, AttributeError, TypeError, KeyError) as error:
                raise ValueError(
                    f'{listing}, line {number} is no UTF-8 JSON object with a "file_name": {error}.'
                ) from error
    return entries


def _tar_groups(tar: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    key, members = "", dict[str, bytes]()
    with tarfile.open(tar, "r|*") as opened:
        for member in opened:
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            file = opened.extractfile(member) if member.isfile() else None
            if file is None or not stem:
                continue
            if members and key != f"{folder}/{stem}":
                yield key, members
                members = {}
            key = f"{folder}/{stem}"
            members[f".{suffix.lower()}"] = file.read()
    if members:
        yield key, members


def _tar_sample(key: str, members: Mapping[str, bytes]) -> Sample:
    picture = next((content for suffix, content in members.items() if suffix in PICTURE_SUFFIXES), None)
    if picture is None:
        raise Drop("no picture")
    captions, metadata = list[str](), dict[str, Any]()
    if ".json" in members:
        try:
            entry = json.loads(members[".json"])
        except ValueError as error:
            raise Drop("broken JSON") from error
        if not isinstance(entry, dict):
            raise Drop("JSON is no object")
        captions, metadata = captions_and_metadata(entry)
    if not captions:
        captions = _caption_lines(members.get(".txt", b""))
    if not captions:
        raise Drop("no caption")
    return Sample(_valid(key.removeprefix("./").removeprefix("/")), open_rgb(io.BytesIO(picture)), captions, metadata)
