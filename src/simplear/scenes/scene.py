"""Scenes: one to four flat coloured shapes on a plain background, in one of GenEval's six categories.

A scene is described in fractions of the image side, so it can be drawn at any resolution. Objects never overlap or
touch, lie wholly in the frame and have neither outline nor texture, so that a few image codes draw them and a detector
reads them back without a neural network. Left out on purpose: depth, occlusion and rotation, which would make verdicts
debatable.

`sample_scene` is a pure function of (seed, index, split): any worker can make any part of the corpus. Its random
numbers come from Philox, a counter-based generator that gives the same stream for a key on every platform.

The categories are those of GenEval (Ghosh et al., 2023, https://arxiv.org/abs/2310.11513).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from simplear.errors import UserError

SHAPES = ("circle", "square", "triangle", "cross")
"""Each fills a bounding square; the triangle stands on its base."""

COLORS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (250, 225, 50),
    "green": (30, 150, 60),
    "cyan": (60, 205, 225),
    "blue": (30, 70, 215),
    "purple": (130, 40, 165),
    "pink": (255, 135, 195),
}
"""Name and RGB of each colour; any two differ by more than 85 (Euclidean), and by as much from every background."""

BACKGROUNDS = {"white": (245, 245, 245), "gray": (150, 150, 150), "black": (25, 25, 25)}
"""Name and RGB of each plain background."""

RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's tags of its six categories."""

HELD_OUT = (
    ("circle", "yellow"),
    ("circle", "purple"),
    ("square", "green"),
    ("square", "pink"),
    ("triangle", "blue"),
    ("cross", "red"),
)
"""(shape, colour) pairs that never occur in training, though each of the shapes and colours does."""

POSITION_THRESHOLD = 0.1
"""Share of the two objects' summed sizes by which their centres must differ before a relation counts (GenEval's)."""

SPLITS = ("train", "validation", "evaluation")
"""Training scenes have no pair of `HELD_OUT`; scenes of the other two have at least one."""

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


@dataclass(frozen=True)
class SceneObject:
    """One shape; positions and sizes are fractions of the image side, y grows downwards."""

    shape: str
    """One of `SHAPES`."""
    color: str
    """One of `COLORS`."""
    x: float
    """Centre of the bounding square, from the left edge."""
    y: float
    """Centre of the bounding square, from the top edge."""
    size: float
    """Side of the bounding square."""


@dataclass(frozen=True)
class Scene:
    """Objects on a background, in a category."""

    category: str
    """One of `CATEGORIES`."""
    background: str
    """One of `BACKGROUNDS`."""
    objects: tuple[SceneObject, ...]
    """One to four; in the category "counting" all of one shape and colour, else of different shapes."""
    relation: str | None
    """In the category "position", how ``objects[0]`` lies to ``objects[1]``: one of `RELATIONS`; else None."""


def relations_of(a: SceneObject, b: SceneObject) -> set[str]:
    """The relations of ``a`` to ``b``, see `directions`."""
    size = a.size + b.size
    return directions(a.x - b.x, a.y - b.y, size, size)


def directions(dx: float, dy: float, widths: float, heights: float) -> set[str]:
    """The `RELATIONS` of an object whose centre is offset by (dx, dy) from another's: none, one or two (diagonal).

    GenEval's rule: the offset is shortened on each axis by `POSITION_THRESHOLD` of the summed sizes, and a relation
    holds if the remainder along it exceeds half of the offset's length.

    Args:
        dx: of the centres, positive to the right.
        dy: of the centres, positive downwards.
        widths: of both objects together.
        heights: of both objects together.
    """
    half = (dx * dx + dy * dy) ** 0.5 / 2
    across, down = half + POSITION_THRESHOLD * widths, half + POSITION_THRESHOLD * heights
    holds = {"left of": -dx > across, "right of": dx > across, "above": -dy > down, "below": dy > down}
    return {relation for relation, held in holds.items() if held}


def metadata(scene: Scene) -> dict[str, Any]:
    """The scene as JSON-able metadata in the manner of GenEval's prompt files.

    Returns:
        ``tag`` (category), ``include`` (list of ``class``, ``color``, ``count``; in the category "position" the first
        stands in ``relation`` to the second), ``relation``, ``background`` and ``objects`` (all fields of each).
    """
    counts = Counter((item.shape, item.color) for item in scene.objects)
    return {
        "tag": scene.category,
        "include": [{"class": shape, "color": color, "count": n} for (shape, color), n in counts.items()],
        "relation": scene.relation,
        "background": scene.background,
        "objects": [asdict(item) for item in scene.objects],
    }


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
        index: at least 0, without an upper limit.
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
    objects = _place(dice, pairs, same_size=category == "counting", relation=relation)
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


def _place(dice: Dice, pairs: list[tuple[str, str]], same_size: bool, relation: str | None) -> tuple[SceneObject, ...]:
    """Draw places and sizes until all objects are apart and a relation holds, clearly along its axis."""
    low, high = _SIZES[len(pairs)]
    while True:
        shared = dice.between(low, high)
        objects: list[SceneObject] = []
        for shape, color in pairs:
            size = shared if same_size else dice.between(low, high)
            edge = MARGIN + size / 2
            objects.append(SceneObject(shape, color, dice.between(edge, 1 - edge), dice.between(edge, 1 - edge), size))
        if all(are_apart(a, b) for i, a in enumerate(objects) for b in objects[:i]) and (
            relation is None or _is_clear(relation, *objects)
        ):
            return tuple(objects)


def are_apart(a: SceneObject, b: SceneObject, gap: float = GAP) -> bool:
    """Whether the distance of two bounding squares is at least ``gap``, a fraction of the image side."""
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.size + b.size) / 2 + gap


def _is_clear(relation: str, a: SceneObject, b: SceneObject) -> bool:
    across, along = sorted((abs(a.x - b.x), abs(a.y - b.y)))
    return 2 * across <= along and relation in relations_of(a, b)
