"""Does a picture show what its prompt asks for? GenEval's questions, answered by the exact detector.

What each category requires, whatever else the prompt names:

    single_object   the shape is there
    two_object      both shapes are there
    counting        the shape is there exactly so many times
    colors          the shape is there in the colour
    color_attr      both shapes are there, each in its colour
    position        both shapes are there, and the first stands in the relation to the second; of each shape the
                    detection that matches best counts, as GenEval takes the most confident one

As in GenEval, further objects do no harm; in "counting" only further ones of the same shape do. `strict_verdict` is a
second judge that rejects everything that could not have been drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simplear.errors import UserError
from simplear.scenes.detection import Detection, background_name, background_of, detect, residue
from simplear.scenes.scene import BACKGROUNDS, CATEGORIES, COLORS, RELATIONS, SHAPES, are_apart, relations_of

_WITH_COLOR = ("colors", "color_attr")

KNOWN_BACKGROUND = 60.0
"""Euclidean RGB distance within which a background is one of `BACKGROUNDS`."""

CLOSE = 0.85
"""Smallest overlap (intersection over union) of an object with the mask of its shape."""

CLEARANCE = 0.01
"""Smallest distance of two objects, and of an object from the edge, a share of the picture's width."""

LITTER = 0.003
"""Largest `residue`: 12 pixels at 64 x 64."""


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


def strict_verdict(prompt: Mapping[str, Any], image: NDArray[np.uint8]) -> Verdict:
    """Judge one picture: the question of its category, and whether it could have been drawn.

    It must show exactly the objects asked for, on a plain background of a known colour, whole, apart from each other
    and from the edge, with close-fitting shapes, and nothing else. A model that is rewarded for what `verdict` accepts
    learns to exploit what `verdict` overlooks; this judge gives no reward, so it tells whether that has happened.

    Args:
        prompt: as for `verdict`.
        image: (H, W, 3) uint8 RGB.

    Raises:
        ValueError: the prompt lacks a key, or a value is unknown.
    """
    found = detect(image)
    answer = verdict(prompt, found)
    flaw = _flaw(image, found, sum(item["count"] for item in prompt["include"])) if answer.correct else ""
    return Verdict(False, flaw) if flaw else answer


def _flaw(image: NDArray[np.uint8], found: Sequence[Detection], count: int) -> str:
    """Why the picture could not have been drawn; empty if it could."""
    if len(found) != count:
        return f"{len(found)} objects, not {count}"
    background = background_of(image.astype(np.float32))
    if np.linalg.norm(background - BACKGROUNDS[background_name(image)]) > KNOWN_BACKGROUND:
        return "no background of a known color"
    for item in found:
        if item.match < CLOSE:
            return f"{item.color} object of no shape"
        if min(item.x, item.y, 1 - item.x, 1 - item.y) - item.size / 2 < CLEARANCE:
            return "an object at the edge"
    if not all(are_apart(a, b, CLEARANCE) for a, b in itertools.combinations(found, 2)):
        return "objects that touch"
    litter = residue(image, found)
    return f"litter of {round(litter * image[..., 0].size)} pixels" if litter > LITTER else ""


def _value(row: Mapping[str, Any], key: str, where: str, options: Collection[Any] | None = None) -> Any:
    """``row[key]``, or a ValueError if it is missing or not among ``options``."""
    if key not in row:
        raise UserError(f"{where}: no key {key!r}, only {sorted(row)}; simplear.scenes.metadata writes it.")
    if options is not None and row[key] not in options:
        raise UserError(f"{where}: {key} is {row[key]!r}, known are {list(options)}.")
    return row[key]
