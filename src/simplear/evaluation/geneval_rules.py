"""GenEval's rules: whether the objects found in an image are what its prompt asks for. Pure functions over detections.

A prompt's row has ``include``, each a class with a count and perhaps a colour or a position relative to an earlier
entry, and ``exclude``, classes with a count that must not be reached. Of each class the most confident detections
count, as many as are asked for: the colour and the position of further ones do not matter.

Source: Ghosh, Hajishirzi and Schmidt 2023, "GenEval: an object-focused framework for evaluating text-to-image
alignment", and the thresholds and rules of the authors' evaluation program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simplear.scenes import Verdict
from simplear.scenes.scene import directions

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD = 0.3
"""Detections count above this confidence …"""
COUNTING_THRESHOLD = 0.9
"""… and in the category "counting" above this one."""
MAX_OBJECTS = 16
"""Of one class, the most confident ones."""


@dataclass(frozen=True, eq=False)
class Detection:
    """An object found in an image."""

    name: str
    """Of its class, as GenEval spells it."""
    score: float
    """Confidence in [0, 1]."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels; right and bottom lie behind the last pixel."""
    mask: NDArray[np.bool_] | None = None
    """(H, W) of the image, true on the object; None: not known."""


ColorsOf = Callable[[Sequence[Detection], str], Sequence[str]]
"""The colours, each one of `COLORS`, of detections of one class, with its name."""


def counted(row: Mapping[str, Any], detections: Sequence[Detection]) -> dict[str, list[Detection]]:
    """The detections that count for a prompt, by class, the most confident first.

    Overlapping ones all count, as in the official program with its defaults.

    Args:
        row: of the prompt.
        detections: all of an image.
    """
    threshold = COUNTING_THRESHOLD if row["tag"] == "counting" else THRESHOLD
    by_class: dict[str, list[Detection]] = {}
    for item in sorted(detections, key=lambda item: -item.score):
        if item.score > threshold:
            by_class.setdefault(item.name, []).append(item)
    return {name: members[:MAX_OBJECTS] for name, members in by_class.items()}


def relations(a: Detection, b: Detection) -> set[str]:
    """The relations of `a` to `b`, see `simplear.scenes.directions`."""
    (left, top, right, bottom), (left_b, top_b, right_b, bottom_b) = a.box, b.box
    dx, dy = (left + right - left_b - right_b) / 2, (top + bottom - top_b - bottom_b) / 2
    return directions(dx, dy, right - left + right_b - left_b, bottom - top + bottom_b - top_b)


def judge(row: Mapping[str, Any], found: Mapping[str, Sequence[Detection]], colors_of: ColorsOf) -> Verdict:
    """Whether an image shows what its prompt asks for, and if not, why: one line for each thing that is wrong.

    Args:
        row: of the prompt, as in ``evaluation_metadata.jsonl``.
        found: as `counted` gives them.
        colors_of: asked only about objects whose colour the row names.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection]] = []
    """For each entry of ``include``, the objects that satisfy it; empty if they do not."""
    for wanted in row.get("include", ()):
        objects = list(found.get(wanted["class"], ()))[: wanted["count"]]
        reason = _missing(wanted, objects, groups, colors_of)
        groups.append([] if reason else objects)
        reasons += [reason] if reason else []
    for unwanted in row.get("exclude", ()):
        number = len(found.get(unwanted["class"], ()))
        if number >= unwanted["count"]:
            reasons.append(f"{number} × {unwanted['class']}, not below {unwanted['count']}")
    return Verdict(not reasons, "\n".join(reasons))


def _missing(
    wanted: Mapping[str, Any],
    objects: Sequence[Detection],
    groups: Sequence[Sequence[Detection]],
    colors_of: ColorsOf,
) -> str:
    """Why the objects do not satisfy an entry of ``include``; empty if they do."""
    name, count = wanted["class"], wanted["count"]
    if len(objects) < count:
        return f"{len(objects)} × {name}, not {count}"
    if "color" in wanted:
        colors = list(colors_of(objects, name))
        if colors.count(wanted["color"]) < count:
            return f"{name} is {', '.join(colors)}, not {wanted['color']}"
    if "position" in wanted:
        relation, place = wanted["position"]
        if not groups[place]:
            return f"nothing that {name} could be {relation}"
        for item in objects:
            for target in groups[place]:
                present = relations(item, target)
                if relation not in present:
                    where = " and ".join(sorted(present)) or "in no clear direction from"
                    return f"{name} is {where} {target.name}, not {relation}"
    return ""
