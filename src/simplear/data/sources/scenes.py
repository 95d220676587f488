"""The procedural corpus as a source."""

from __future__ import annotations

from simplear.data.sample import Sample
from simplear.data.sources.base import IndexedSource
from simplear.scenes import captions, draw, metadata, sample_scene


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
