"""What a scene is: one to four flat coloured shapes on a plain background, in one of GenEval's six categories.

A scene is a description in fractions of the image side, free of any resolution, and travels as JSON beside its
picture and captions. Objects never overlap or touch, lie wholly in the frame and have neither outline nor texture,
so that few image codes draw them and a detector can read them back without a neural network. Left out on purpose:
depth, occlusion, rotation, anything that a yes or no could not decide.

The categories are those of GenEval (Ghosh et al., 2023, https://arxiv.org/abs/2310.11513).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from simplear.errors import UserError

SHAPES = ("circle", "square", "triangle", "cross")
"""The shapes; each fills a bounding square, the triangle stands on its base."""

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
"""The (shape, colour) pairs that no training scene holds. Every shape and every colour occurs in training otherwise."""

POSITION_THRESHOLD = 0.1
"""Share of the two objects' summed sizes by which their centres must differ before a relation counts (GenEval's)."""


class Placed(Protocol):
    """Anything with a centre and a size, as fractions of the image side: an object of a scene, or a detection."""

    @property
    def x(self) -> float: ...
    @property
    def y(self) -> float: ...
    @property
    def size(self) -> float: ...


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
    """What is to be drawn, and the category that it belongs to."""

    category: str
    """One of `CATEGORIES`."""
    background: str
    """One of `BACKGROUNDS`."""
    objects: tuple[SceneObject, ...]
    """One to four; in the category "counting" all of one shape and colour, else of different shapes."""
    relation: str | None
    """In the category "position", how ``objects[0]`` lies to ``objects[1]``: one of `RELATIONS`; else None."""


def relations_of(a: Placed, b: Placed) -> set[str]:
    """Every relation in which ``a`` lies to ``b``: none, one, or two when ``b`` lies diagonally.

    GenEval's rule: the offset of the centres is shortened on each axis by `POSITION_THRESHOLD` of the summed sizes,
    and a relation holds when what remains along it is more than half of the offset's length.
    """
    dx, dy = a.x - b.x, a.y - b.y
    slack = POSITION_THRESHOLD * (a.size + b.size)
    half = (dx * dx + dy * dy) ** 0.5 / 2 + slack
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return {relation for relation, distance in along.items() if distance > half}


def metadata(scene: Scene) -> dict[str, Any]:
    """The scene as JSON-able metadata in the manner of GenEval's prompt files.

    Returns:
        ``tag`` (category), ``include`` (list of ``class``, ``color``, ``count``; in the category "position" the first
        stands in ``relation`` to the second), ``relation``, ``background`` and ``objects`` (all fields of each).
    """
    counts: dict[tuple[str, str], int] = {}
    for item in scene.objects:
        counts[item.shape, item.color] = counts.get((item.shape, item.color), 0) + 1
    return {
        "tag": scene.category,
        "include": [{"class": shape, "color": color, "count": n} for (shape, color), n in counts.items()],
        "relation": scene.relation,
        "background": scene.background,
        "objects": [asdict(item) for item in scene.objects],
    }


def scene_from_metadata(row: Mapping[str, Any]) -> Scene:
    """The scene that `metadata` described. Raises ValueError naming the key that is missing or has an unknown value."""
    objects = []
    for number, item in enumerate(entry(row, "objects", "scene metadata")):
        where = f"scene metadata, object {number}"
        x, y, size = (float(entry(item, key, where)) for key in ("x", "y", "size"))
        shape, color = known(item, "shape", SHAPES, where), known(item, "color", COLORS, where)
        objects.append(SceneObject(shape, color, x, y, size))
    return Scene(
        category=known(row, "tag", CATEGORIES, "scene metadata"),
        background=known(row, "background", BACKGROUNDS, "scene metadata"),
        objects=tuple(objects),
        relation=known(row, "relation", (None, *RELATIONS), "scene metadata"),
    )


def entry(row: Mapping[str, Any], key: str, where: str) -> Any:
    """``row[key]``, or a ValueError that says where it is missing."""
    if key not in row:
        raise UserError(f"{where}: no key {key!r}, only {sorted(row)}; simplear.scenes.metadata writes it.")
    return row[key]


def known(row: Mapping[str, Any], key: str, options: Any, where: str) -> Any:
    """``row[key]``, or a ValueError when it is missing or is none of ``options``."""
    value = entry(row, key, where)
    if value not in options:
        raise UserError(f"{where}: {key} is {value!r}, known are {list(options)}.")
    return value
