"""Scenes as a pure function of (seed, index, split): any worker makes any part of the corpus without the rest.

The category goes round with the index, so each is a sixth of any run of six. The draws use nothing but uniform
numbers of a counter-based generator (Philox), whose stream is fixed by its key on every platform.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from simplear.errors import UserError
from simplear.scenes.scene import (
    BACKGROUNDS,
    CATEGORIES,
    COLORS,
    HELD_OUT,
    RELATIONS,
    SHAPES,
    Scene,
    SceneObject,
    relations_of,
)

SPLITS = ("train", "validation", "evaluation")
"""Training scenes hold no pair of `HELD_OUT`; those of the other two hold at least one."""

GAP = 0.05
"""Smallest distance between two bounding squares, a fraction of the image side: 3.2 pixels at 64."""

MARGIN = 0.03
"""Smallest distance between a bounding square and the edge of the image."""

_PAIRS = tuple((shape, color) for shape in SHAPES for color in COLORS)
_TRAIN_PAIRS = tuple(pair for pair in _PAIRS if pair not in HELD_OUT)
_SIZES = {1: (0.30, 0.46), 2: (0.28, 0.40), 3: (0.25, 0.33), 4: (0.24, 0.30)}
"""Range of sizes for each number of objects."""
_STREAMS = (*SPLITS, "captions")


T = TypeVar("T")


class Dice:
    """Uniform draws keyed by (seed, index, stream), the same on every platform and in every process."""

    def __init__(self, seed: int, index: int, stream: str):
        if not (0 <= seed < 2**64 and 0 <= index < 2**62):
            raise UserError(f"seed {seed} must lie in [0, 2**64) and index {index} in [0, 2**62).")
        key = np.array([seed, index * len(_STREAMS) + _STREAMS.index(stream)], dtype=np.uint64)
        self.uniform = np.random.Generator(np.random.Philox(key=key)).random
        """Next number in [0, 1)."""

    def between(self, low: float, high: float) -> float:
        """A number in [low, high), rounded to five decimals to be short as JSON."""
        return round(low + (high - low) * self.uniform(), 5)

    def pick(self, options: tuple[T, ...]) -> T:
        """One of the options, each as likely as another."""
        return options[int(self.uniform() * len(options))]


def sample_scene(seed: int, index: int, split: str = "train") -> Scene:
    """Scene number ``index`` of a split; its category is ``CATEGORIES[index % 6]``.

    Args:
        seed: of the whole corpus, at least 0.
        index: at least 0; there is no last one.
        split: one of `SPLITS`; equal indices of different splits are unrelated scenes.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} is unknown, known are {list(SPLITS)}.")
    dice = Dice(seed, index, split)
    category = CATEGORIES[index % len(CATEGORIES)]
    count = {"single_object": 1, "colors": 1, "counting": dice.pick((2, 3, 4))}.get(category, 2)
    pairs = _draw_pairs(dice, category, count, split)
    relation = dice.pick(RELATIONS) if category == "position" else None
    background = dice.pick(tuple(BACKGROUNDS))
    places = _draw_places(dice, count, same_size=category == "counting", relation=relation)
    objects = tuple(SceneObject(*pair, *place) for pair, place in zip(pairs, places, strict=True))
    return Scene(category, background, objects, relation)


def _draw_pairs(dice: Dice, category: str, count: int, split: str) -> list[tuple[str, str]]:
    allowed = _TRAIN_PAIRS if split == "train" else _PAIRS
    while True:
        if category == "counting":
            pairs = [dice.pick(allowed)] * count
        else:
            pairs = [dice.pick(allowed) for _ in range(count)]
            shapes, colors = (len(set(names)) for names in zip(*pairs, strict=True))
            if shapes < count or (category == "color_attr" and colors < count):
                continue
        if split == "train" or not set(pairs).isdisjoint(HELD_OUT):
            return pairs


def _draw_places(dice: Dice, count: int, same_size: bool, relation: str | None) -> list[tuple[float, float, float]]:
    """Centres and sizes: apart from each other and, for a relation, clearly nearer to its axis than to the other."""
    low, high = _SIZES[count]
    while True:
        shared = dice.between(low, high)
        places: list[tuple[float, float, float]] = []
        for _ in range(count):
            size = shared if same_size else dice.between(low, high)
            edge = MARGIN + size / 2
            places.append((dice.between(edge, 1 - edge), dice.between(edge, 1 - edge), size))
        if all(_apart(a, b) for i, a in enumerate(places) for b in places[:i]) and _stands(relation, places):
            return places


def _apart(a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    return max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= (a[2] + b[2]) / 2 + GAP


def _stands(relation: str | None, places: list[tuple[float, float, float]]) -> bool:
    if relation is None:
        return True
    a, b = (SceneObject("", "", *place) for place in places)
    across, along = sorted((abs(a.x - b.x), abs(a.y - b.y)))
    return 2 * across <= along and relation in relations_of(a, b)
