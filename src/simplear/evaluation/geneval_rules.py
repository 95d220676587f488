"""GenEval's rules: whether what was found in an image is what its prompt asks for. Pure functions over detections.

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

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD = 0.3
"""Detections count above this confidence …"""
COUNTING_THRESHOLD = 0.9
"""… and where objects are counted, above this one."""
MAX_OBJECTS = 16
"""Of one class, the most confident ones."""
MAX_OVERLAP = 1.0
"""Intersection over union from which a less confident detection of the class is dropped; 1 drops none."""
POSITION_THRESHOLD = 0.1
"""Share of both objects' sizes by which their centres must differ before it is a relation."""
DIRECTION = 0.5
"""Share of the distance, reduced by the above, that must lie in the relation's direction."""


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


def threshold_of(row: Mapping[str, Any]) -> float:
    """The confidence above which detections count for this prompt."""
    return COUNTING_THRESHOLD if row["tag"] == "counting" else THRESHOLD


def counted(
    detections: Sequence[Detection],
    threshold: float,
    max_objects: int = MAX_OBJECTS,
    max_overlap: float = MAX_OVERLAP,
) -> dict[str, list[Detection]]:
    """The detections that count, by class, the most confident first.

    Args:
        detections: all of an image.
        threshold: those above it, not at it, count.
        max_objects: of a class, applied before overlapping ones are dropped.
        max_overlap: a detection is dropped when it overlaps a more confident one of its class by this or more; from 1
            on none is.
    """
    by_class: dict[str, list[Detection]] = {}
    for item in sorted(detections, key=lambda item: -item.score):
        if item.score > threshold:
            by_class.setdefault(item.name, []).append(item)
    kept: dict[str, list[Detection]] = {}
    for name, members in by_class.items():
        kept[name] = []
        for item in members[:max_objects]:
            if max_overlap >= 1 or all(overlap(item.box, other.box) < max_overlap for other in kept[name]):
                kept[name].append(item)
    return kept


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, each a pixel larger on the right and below, as GenEval counts them."""

    def area(box: Sequence[float]) -> float:
        return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)

    common = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - common
    return common / union if union else 0.0


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` lies seen from `b`: none, one or two of "left of", "right of", "above" and "below".

    The offset of the centres is reduced on each axis by `POSITION_THRESHOLD` times the sizes of both; what is left,
    over the whole distance of the centres, must exceed `DIRECTION`.
    """
    left, top, right, bottom = np.stack([a.box, b.box], axis=1)
    centers, sizes = np.stack([left + right, top + bottom]) / 2, np.abs(np.stack([right - left, bottom - top]))
    offset = centers[:, 0] - centers[:, 1]
    reduced = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes.sum(axis=1), 0) * np.sign(offset)
    if (np.abs(reduced) < 1e-3).all():
        return set()
    x, y = reduced / np.linalg.norm(offset)
    found = {"left of": x < -DIRECTION, "right of": x > DIRECTION, "above": y < -DIRECTION, "below": y > DIRECTION}
    return {name for name, holds in found.items() if holds}


def judge(row: Mapping[str, Any], found: Mapping[str, Sequence[Detection]], colors_of: ColorsOf) -> Verdict:
    """Whether an image shows what its prompt asks for, and if not, why: one line for each thing that is wrong.

    Args:
        row: of the prompt, as in ``evaluation_metadata.jsonl``.
        found: as `counted` gives them.
        colors_of: asked only about objects whose colour the row names.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    """Of each entry of ``include``, the objects that fulfil it; None where they do not."""
    for wanted in row.get("include", ()):
        objects = list(found.get(wanted["class"], ()))[: wanted["count"]]
        reason = _missing(wanted, objects, groups, colors_of)
        groups.append(None if reason else objects)
        reasons += [reason] if reason else []
    for unwanted in row.get("exclude", ()):
        number = len(found.get(unwanted["class"], ()))
        if number >= unwanted["count"]:
            reasons.append(f"{number} × {unwanted['class']}, not below {unwanted['count']}")
    return Verdict(not reasons, "\n".join(reasons))


def _missing(
    wanted: Mapping[str, Any],
    objects: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    colors_of: ColorsOf,
) -> str:
    """What keeps the objects from fulfilling an entry of ``include``; empty if nothing does."""
    name, count = wanted["class"], wanted["count"]
    if len(objects) < count:
        return f"{len(objects)} × {name}, not {count}"
    if "color" in wanted:
        colors = list(colors_of(objects, name))
        if colors.count(wanted["color"]) < count:
            return f"{name} is {', '.join(colors)}, not {wanted['color']}"
    if "position" in wanted:
        relation, place = wanted["position"]
        targets = groups[place]
        if targets is None:
            return f"nothing that {name} could be {relation}"
        for item in objects:
            for target in targets:
                seen = relations(item, target)
                if relation not in seen:
                    where = " and ".join(sorted(seen)) or "in no clear direction from"
                    return f"{name} is {where} {target.name}, not {relation}"
    return ""
