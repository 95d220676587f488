"""Does a picture show what its prompt asked for? GenEval's questions, put to the exact detections.

What each category asks, whatever else the prompt names:

    single_object   the shape is there
    two_object      both shapes are there
    counting        the shape is there exactly so many times
    colors          the shape is there in the colour
    color_attr      both shapes are there, each in its colour
    position        both shapes are there, and the first stands in the relation to the second: of each shape the
                    detection that matches best, as GenEval takes the most confident

As in GenEval, further objects do no harm; in "counting" only further ones of the same shape do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simplear.errors import UserError
from simplear.scenes.detection import Detection
from simplear.scenes.scene import CATEGORIES, COLORS, RELATIONS, SHAPES, entry, known, relations_of

_WITH_COLOR = ("colors", "color_attr")


@dataclass(frozen=True)
class Verdict:
    """Whether a picture is right, and why not."""

    correct: bool
    reason: str
    """Empty when correct, else what is missing, such as "2 × square, not 3"."""


def judge(prompt: Mapping[str, Any], detections: Sequence[Detection]) -> bool:
    """Whether the detections satisfy a prompt; see `verdict`."""
    return verdict(prompt, detections).correct


def verdict(prompt: Mapping[str, Any], detections: Sequence[Detection]) -> Verdict:
    """Judge one picture.

    Args:
        prompt: ``tag``, ``include`` and, for the category "position", ``relation``, as `metadata` and
            `evaluation_prompts` write them.
        detections: of the picture, as `detect` gives them (the best match first).

    Raises:
        ValueError: the prompt lacks a key, or a value is unknown.
    """
    where = "prompt metadata"
    tag = known(prompt, "tag", CATEGORIES, where)
    best: list[Detection] = []
    for number, asked in enumerate(entry(prompt, "include", where)):
        place = f"{where}, include {number}"
        shape, count = known(asked, "class", SHAPES, place), entry(asked, "count", place)
        color = known(asked, "color", COLORS, place) if tag in _WITH_COLOR else None
        name = f"{color} {shape}" if color else shape
        matching = [found for found in detections if found.shape == shape and color in (None, found.color)]
        if tag == "counting" and len(matching) != count:
            return Verdict(False, f"{len(matching)} × {name}, not {count}")
        if len(matching) < count:
            return Verdict(False, f"no {name}" if count == 1 else f"{len(matching)} × {name}, fewer than {count}")
        best.append(matching[0])
    if tag == "position":
        relation = known(prompt, "relation", RELATIONS, where)
        if len(best) != 2:
            raise UserError(f"{where}: include has {len(best)} entries, a relation needs two.")
        first, second = best
        if relation not in relations_of(first, second):
            return Verdict(False, f"{first.shape} not {relation} {second.shape}")
    return Verdict(True, "")
