"""Does a picture show what its prompt asks for? GenEval's questions, answered by the exact detector.

What each category requires, whatever else the prompt names:

    single_object   the shape is there
    two_object      both shapes are there
    counting        the shape is there exactly so many times
    colors          the shape is there in the colour
    color_attr      both shapes are there, each in its colour
    position        both shapes are there, and the first stands in the relation to the second; of each shape the
                    detection that matches best counts, as GenEval takes the most confident one

As in GenEval, further objects do no harm; in "counting" only further ones of the same shape do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simplear.errors import UserError
from simplear.scenes.detection import Detection
from simplear.scenes.scene import CATEGORIES, COLORS, RELATIONS, SHAPES, relations_of

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
    tag = _value(prompt, "tag", where, CATEGORIES)
    best: list[Detection] = []
    for number, item in enumerate(_value(prompt, "include", where)):
        place = f"{where}, include {number}"
        shape, count = _value(item, "class", place, SHAPES), _value(item, "count", place)
        color = _value(item, "color", place, COLORS) if tag in _WITH_COLOR else None
        name = f"{color} {shape}" if color else shape
        matching = [found for found in detections if found.shape == shape and color in (None, found.color)]
        if tag == "counting" and len(matching) != count:
            return Verdict(False, f"{len(matching)} × {name}, not {count}")
        if len(matching) < count:
            return Verdict(False, f"no {name}" if count == 1 else f"{len(matching)} × {name}, fewer than {count}")
        best.append(matching[0])
    if tag == "position":
        relation = _value(prompt, "relation", where, RELATIONS)
        if len(best) != 2:
            raise UserError(f"{where}: include has {len(best)} entries, a relation needs two.")
        first, second = best
        if relation not in relations_of(first, second):
            return Verdict(False, f"{first.shape} not {relation} {second.shape}")
    return Verdict(True, "")


def _value(row: Mapping[str, Any], key: str, where: str, options: Collection[Any] | None = None) -> Any:
    """``row[key]``, or a ValueError if it is missing or not among ``options``."""
    if key not in row:
        raise UserError(f"{where}: no key {key!r}, only {sorted(row)}; simplear.scenes.metadata writes it.")
    if options is not None and row[key] not in options:
        raise UserError(f"{where}: {key} is {row[key]!r}, known are {list(options)}.")
    return row[key]
