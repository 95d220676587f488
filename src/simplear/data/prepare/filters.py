"""Which samples are left out: by size, shape, captions, any column of their metadata, or a score.

Filters are objects in a list, applied in its order; each drops with its own reasons, which are counted. They look at
sizes, captions and metadata before a picture is decoded; only `MinimumScore` runs later, wherever it stands in the
list, on cropped pictures beside the encoder. Derive your own from `Filter` and name it by its class path.

    filters:
      - {class_path: simplear.data.ShortEdge, init_args: {minimum: 1024}}
      - {class_path: simplear.data.Column, init_args: {column: pwatermark, maximum: 0.5}}

Left out: what needs the whole corpus at once, as finding duplicates does. Other programs write lists of them, which
`Listed` takes out. Of two samples of one key in a unit the second is always dropped, without a filter.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from simplear.data.sample import Drop, Sample
from simplear.data.sample import column as value_of
from simplear.described import Described
from simplear.errors import MissingFileError, UserError
from simplear.hashing import sha256_of_lines
from simplear.text_files import read_lines


class Filter(Described, ABC):
    """Decides whether a sample is dropped, and why; its arguments are settings of what is made with it."""

    @abstractmethod
    def check(self, sample: Sample) -> None:
        """Raises `Drop` for a sample to leave out; the picture need not be decoded for it."""


class ShortEdge(Filter):
    """Drops pictures whose short edge has fewer pixels; the paper keeps 1,024 and more for fine-tuning."""

    def __init__(self, minimum: int) -> None:
        """
        Args:
            minimum: Pixels.
        """
        self.minimum = minimum

    def check(self, sample: Sample) -> None:
        if min(sample.size) < self.minimum:
            raise Drop(f"short edge under {self.minimum} pixels")


class AspectRatio(Filter):
    """Drops pictures that are longer, long side over short, in either direction."""

    def __init__(self, maximum: float) -> None:
        """
        Args:
            maximum: Long side over short, 1 or more.
        """
        self.maximum = maximum

    def check(self, sample: Sample) -> None:
        if max(sample.size) > self.maximum * min(sample.size):
            raise Drop(f"aspect ratio over {self.maximum:g}")


class PixelLimit(Filter):
    """Drops pictures with more pixels, before they are decoded and fill the memory.

    Without it the limit is Pillow's, 179 million pixels. A picture takes 4 to 12 bytes a pixel while it is decoded, as
    WebP or JPEG 2000 up to 20: at the limit 0.7 to 2.1 gigabytes, or 3.6, for each loader process.
    """

    def __init__(self, maximum: int) -> None:
        """
        Args:
            maximum: Pixels, width times height.
        """
        self.maximum = maximum

    def check(self, sample: Sample) -> None:
        if sample.size[0] * sample.size[1] > self.maximum:
            raise Drop(f"more than {self.maximum} pixels")


class CaptionLength(Filter):
    """Drops samples of which any caption is shorter or longer."""

    def __init__(self, minimum: int = 1, maximum: int | None = None) -> None:
        """
        Args:
            minimum: Characters.
            maximum: Characters; by default any number.
        """
        self.minimum, self.maximum = minimum, maximum

    def check(self, sample: Sample) -> None:
        for caption in sample.captions:
            if len(caption) < self.minimum:
                raise Drop(f"caption under {self.minimum} characters")
            if self.maximum is not None and len(caption) > self.maximum:
                raise Drop(f"caption over {self.maximum} characters")


class Column(Filter):
    """Drops by a column of the metadata, such as an aesthetic or watermark score."""

    def __init__(
        self,
        column: str,
        minimum: float | None = None,
        maximum: float | None = None,
        equals: bool | int | float | str | None = None,
        missing: Literal["drop", "keep"] = "drop",
    ) -> None:
        """
        Args:
            column: Its name; "a.b" is b of the object a.
            minimum: Smallest number to keep.
            maximum: Largest number to keep.
            equals: The value to keep.
            missing: Whether to drop or keep samples without it.

        Raises ValueError if minimum, maximum and equals are all missing.
        """
        if minimum is None and maximum is None and equals is None:
            raise UserError(f"nothing is asked of column {column!r}: give minimum, maximum or equals.")
        self.column, self.minimum, self.maximum, self.equals, self.missing = column, minimum, maximum, equals, missing

    def check(self, sample: Sample) -> None:
        value = value_of(sample.metadata, self.column)
        if value is None:
            if self.missing == "drop":
                raise Drop(f"no {self.column}")
            return
        if self.equals is not None and value != self.equals:
            raise Drop(f"{self.column} differs")
        if self.minimum is None and self.maximum is None:
            return
        if not isinstance(value, int | float) or math.isnan(value):
            raise Drop(f"{self.column} is not a number")
        if self.minimum is not None and value < self.minimum:
            raise Drop(f"{self.column} under {self.minimum}")
        if self.maximum is not None and value > self.maximum:
            raise Drop(f"{self.column} over {self.maximum}")


class Listed(Filter):
    """Drops what a list names: duplicates, pictures of a benchmark, requests to be left out."""

    not_described = frozenset({"path"})

    def __init__(self, path: str, column: str | None = None) -> None:
        """
        Args:
            path: Text file, one key (or value of the column) a line.
            column: Column of the metadata to look up, such as "sha256" or "phash"; by default the key.

        Raises ValueError for a list that is missing or empty.
        """
        if not Path(path).is_file():
            raise MissingFileError(f"there is no list of what to leave out at {path}.")
        self.column, self.listed = column, frozenset(line.strip() for _, line in read_lines(Path(path)))
        if not self.listed:
            raise UserError(f"{path} lists nothing: leave the filter out, or name the list.")
        self.reason = f"listed in {Path(path).name}"

    def check(self, sample: Sample) -> None:
        value = sample.key if self.column is None else value_of(sample.metadata, self.column)
        if value is not None and str(value) in self.listed:
            raise Drop(self.reason)

    def describe(self) -> dict[str, Any]:
        """The entries in place of the list's path."""
        return {**super().describe(), "entries": sha256_of_lines(sorted(self.listed))}


@runtime_checkable
class Scorer(Protocol):
    """Scores pictures: every reward of `simplear.rewards` does, or a class with this ``__call__``."""

    def __call__(self, images: Any, captions: Any, metadata: Any) -> Any:
        """Scores (B,) of images (B, 3, H, W) in [0, 1], B captions and B dictionaries."""


class MinimumScore(Filter):
    """Drops pictures whose score is lower, as they are tokenized: cropped, with their first caption."""

    def __init__(self, scorer: Scorer, minimum: float) -> None:
        """
        Args:
            scorer: A reward, such as simplear.rewards.CLIPReward.
            minimum: Lowest score to keep.
        """
        self.scorer, self.minimum = scorer, minimum
        self.reason = f"{type(scorer).__name__} under {minimum:g}"

    def check(self, sample: Sample) -> None:
        """Nothing: a score needs the cropped picture."""

    def keep(self, images: Tensor, samples: Sequence[Sample]) -> Tensor:
        """Which pictures (B, 3, H, W) in [0, 1] to keep, (B,) bool.

        Raises ValueError for scores of another shape or NaN, naming the first sample.
        """
        captions = [sample.captions[0] for sample in samples]
        scores = torch.as_tensor(self.scorer(images, captions, [dict(sample.metadata) for sample in samples]))
        if scores.shape != (len(samples),) or scores.isnan().any():
            raise UserError(
                f"{type(self.scorer).__name__} gave scores {tuple(scores.shape)}, not {len(samples)} numbers, for the "
                f"batch that begins with {samples[0].key!r}."
            )
        return scores.to(images.device) >= self.minimum
