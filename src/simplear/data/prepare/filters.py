"""Which samples are left out: by size, shape, captions, any column of their metadata, or a score.

Filters are objects in a list, applied in its order; each drops for reasons of its own, which are counted. They look at
sizes, captions and metadata before a picture is decoded; `MinimumScore` alone runs later, wherever it stands in the
list, on cropped pictures beside the encoder. One of your own derives from `Filter` and is named by its class path.

    filters:
      - {class_path: simplear.data.ShortEdge, init_args: {minimum: 1024}}
      - {class_path: simplear.data.Column, init_args: {column: pwatermark, maximum: 0.5}}

Left out: what needs the whole corpus at once, as finding duplicates does. Other programs write lists of them, which
`Listed` takes out. Two samples of one key in a unit are no matter of filters: the second is always dropped.
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
    """Says of a sample whether it is dropped, and why; its arguments are settings of what is made with it."""

    @abstractmethod
    def check(self, sample: Sample) -> None:
        """Raises `Drop`, with one of `reasons`, for a sample to leave out; the picture need not be decoded for it."""

    @abstractmethod
    def reasons(self) -> list[str]:
        """All reasons that this filter drops for, each its own."""


class SingleReasonFilter(Filter):
    """Base of filters that drop for one reason."""

    reason: str

    def reasons(self) -> list[str]:
        return [self.reason]


class ShortEdge(SingleReasonFilter):
    """Drops pictures whose short edge has fewer pixels; the paper keeps 1,024 and more for fine-tuning."""

    def __init__(self, minimum: int) -> None:
        """
        Args:
            minimum: Pixels.
        """
        self.minimum = minimum
        self.reason = f"short edge under {minimum} pixels"

    def check(self, sample: Sample) -> None:
        if min(sample.size) < self.minimum:
            raise Drop(self.reason)


class AspectRatio(SingleReasonFilter):
    """Drops pictures that are longer, long side over short, however they are turned."""

    def __init__(self, maximum: float) -> None:
        """
        Args:
            maximum: Long side over short, 1 or more.
        """
        if maximum < 1:
            raise UserError(f"an aspect ratio of {maximum} is no long side over a short one: 1 or more.")
        self.maximum = maximum
        self.reason = f"aspect ratio over {maximum:g}"

    def check(self, sample: Sample) -> None:
        if max(sample.size) > self.maximum * min(sample.size):
            raise Drop(self.reason)


class PixelLimit(SingleReasonFilter):
    """Drops pictures with more pixels, before they are decoded and fill the memory.

    Without it the limit is Pillow's, 179 million pixels. A picture takes 4 to 8 bytes a pixel while it is decoded, as
    WebP or JPEG 2000 up to 20: at the limit 0.7 to 1.4 gigabytes, or 3.6, for each loader process.
    """

    def __init__(self, maximum: int) -> None:
        """
        Args:
            maximum: Pixels, width times height.
        """
        self.maximum = maximum
        self.reason = f"more than {maximum} pixels"

    def check(self, sample: Sample) -> None:
        if sample.size[0] * sample.size[1] > self.maximum:
            raise Drop(self.reason)


class CaptionLength(Filter):
    """Drops samples of which any caption is shorter or longer."""

    def __init__(self, minimum: int = 1, maximum: int | None = None) -> None:
        """
        Args:
            minimum: Characters.
            maximum: Characters; by default any number.
        """
        self.minimum, self.maximum = minimum, maximum
        self.short, self.long = f"caption under {minimum} characters", f"caption over {maximum} characters"

    def check(self, sample: Sample) -> None:
        lengths = [len(caption) for caption in sample.captions]
        if lengths and min(lengths) < self.minimum:
            raise Drop(self.short)
        if lengths and self.maximum is not None and max(lengths) > self.maximum:
            raise Drop(self.long)

    def reasons(self) -> list[str]:
        return [self.short] if self.maximum is None else [self.short, self.long]


class Column(Filter):
    """Drops by a column of the metadata, such as an aesthetic or watermark score."""

    def __init__(
        self,
        column: str,
        minimum: float | None = None,
        maximum: float | None = None,
        equals: bool | int | float | str | None = None,
        missing: Literal["drop", "keep", "error"] = "drop",
    ) -> None:
        """
        Args:
            column: Its name; "a.b" is b of the object a.
            minimum: Smallest number to keep.
            maximum: Largest number to keep.
            equals: The value to keep.
            missing: What to do with samples without it: drop them under a reason of their own, keep them, or stop.

        Raises ValueError when nothing is asked of the column.
        """
        if minimum is None and maximum is None and equals is None:
            raise UserError(f"nothing is asked of column {column!r}: give minimum, maximum or equals.")
        self.column, self.minimum, self.maximum, self.equals, self.missing = column, minimum, maximum, equals, missing
        self.absent, self.no_number = f"no {column}", f"{column} is no number"
        self.small, self.large, self.other = (
            f"{column} under {minimum}",
            f"{column} over {maximum}",
            f"{column} differs",
        )

    def check(self, sample: Sample) -> None:
        """Also raises ValueError, naming the sample, for a missing column that is to stop the work."""
        value = value_of(sample.metadata, self.column)
        if value is None:
            if self.missing == "error":
                raise UserError(f"sample {sample.key!r} has no {self.column!r}; it has {', '.join(sample.metadata)}.")
            if self.missing == "drop":
                raise Drop(self.absent)
            return
        if self.equals is not None and value != self.equals:
            raise Drop(self.other)
        if self.minimum is None and self.maximum is None:
            return
        if not isinstance(value, int | float) or math.isnan(value):
            raise Drop(self.no_number)
        if self.minimum is not None and value < self.minimum:
            raise Drop(self.small)
        if self.maximum is not None and value > self.maximum:
            raise Drop(self.large)

    def reasons(self) -> list[str]:
        numeric = self.minimum is not None or self.maximum is not None
        asked = {
            self.absent: self.missing == "drop",
            self.other: self.equals is not None,
            self.no_number: numeric,
            self.small: self.minimum is not None,
            self.large: self.maximum is not None,
        }
        return [reason for reason, possible in asked.items() if possible]


class Listed(SingleReasonFilter):
    """Drops what a list names: duplicates, pictures of a benchmark, wishes to be left out."""

    not_described = frozenset({"path"})

    def __init__(self, path: str, column: str | None = None) -> None:
        """
        Args:
            path: Text file, one key (or value of the column) a line.
            column: Column of the metadata to look up, such as "sha256" or "phash"; by default the key.

        Raises ValueError for a list that is missing or empty.
        """
        self.path, self.column = path, column
        if not Path(path).is_file():
            raise MissingFileError(f"there is no list of what to leave out at {path}.")
        self.listed = frozenset(line.strip() for _, line in read_lines(Path(path)))
        if not self.listed:
            raise UserError(f"{path} lists nothing to leave out.")
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
    """What scores pictures: every reward of `simplear.rewards` does, or a class with this ``__call__``."""

    def __call__(self, images: Any, captions: Any, metadata: Any) -> Any:
        """Scores (B,) of images (B, 3, H, W) in [0, 1], B captions and B dictionaries."""


class MinimumScore(SingleReasonFilter):
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
        """Nothing: a score needs the cropped picture. Raises ValueError for a sample that has codes in its place."""
        if sample.codes is not None:
            raise UserError(f"sample {sample.key!r} has codes and no picture, which {self.reason} asks for.")

    def keep(self, images: Tensor, samples: Sequence[Sample]) -> Tensor:
        """Which pictures (B, 3, H, W) in [0, 1] to keep, (B,) bool.

        Raises ValueError for scores of another shape, or that are no numbers, naming the first sample.
        """
        captions = [sample.captions[0] for sample in samples]
        scores = torch.as_tensor(self.scorer(images, captions, [dict(sample.metadata) for sample in samples]))
        if scores.shape != (len(samples),) or scores.isnan().any():
            raise UserError(
                f"{type(self.scorer).__name__} gave scores {tuple(scores.shape)}, not {len(samples)} numbers, for the "
                f"batch that begins with {samples[0].key!r}."
            )
        return scores.to(images.device) >= self.minimum
