"""Captions made false in one respect: another colour, shape, number, relation or background, or two colours swapped.

They ask of whatever scores pictures against captions what it can tell apart, and they are the negatives that a
contrastive model learns most from. Works on the words alone, so any caption of a scene will do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator

import numpy as np

from simplear.errors import UserError
from simplear.scenes.scene import BACKGROUNDS, COLORS, SHAPES

_NUMBERS = ("two", "three", "four")
_OPPOSITES = (("left of", "right of"), ("above", "below"), ("over", "under"), ("higher than", "lower than"))
_OPPOSITE = {a: b for pair in _OPPOSITES for a, b in (pair, pair[::-1])}
_PLURALS = {"cross": "crosses", **{shape: f"{shape}s" for shape in SHAPES if shape != "cross"}}


def _words(*options: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(options)})\b")


_COLOR, _BACKGROUND, _NUMBER = _words(*COLORS), _words(*BACKGROUNDS), _words(*_NUMBERS)
_SHAPE, _RELATION = _words(*_PLURALS, *_PLURALS.values()), _words(*_OPPOSITE)
_PAIR = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")


def _among(options: Collection[str]) -> Callable[[str], list[str]]:
    return lambda found: [option for option in options if option != found]


def _other_shapes(found: str) -> list[str]:
    return _among(_PLURALS.values() if found in _PLURALS.values() else SHAPES)(found)


_CHANGES: dict[str, tuple[re.Pattern[str], Callable[[str], list[str]]]] = {
    "color": (_COLOR, _among(COLORS)),
    "shape": (_SHAPE, _other_shapes),
    "count": (_NUMBER, _among(_NUMBERS)),
    "relation": (_RELATION, lambda found: [_OPPOSITE[found]]),
    "background": (_BACKGROUND, _among(BACKGROUNDS)),
}
PERTURBATIONS = (*_CHANGES, "binding")
"""What can be changed; "binding" swaps the colours of two objects."""


def perturb(caption: str, kind: str, rng: np.random.Generator, avoid: Collection[tuple[str, str]] = ()) -> str | None:
    """The caption with one thing changed, so that it is false of its scene; None when it says nothing of that kind.

    Args:
        caption: of a scene.
        kind: one of `PERTURBATIONS`.
        rng: picks among all that it can become.
        avoid: (shape, colour) pairs that the changed caption must not name: `HELD_OUT` in training, or a model learns
            that captions with those are always false.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in PERTURBATIONS:
        raise UserError(f"kind {kind!r} is unknown, known are {list(PERTURBATIONS)}.")
    changed = [
        other
        for other in map(_with_articles, _changed(caption, kind))
        if avoid == () or not any((shape, color) in avoid for color, shape in _PAIR.findall(other))
    ]
    return changed[int(rng.integers(len(changed)))] if changed else None


def _changed(caption: str, kind: str) -> Iterator[str]:
    if kind == "binding":
        colors = _COLOR.findall(caption)
        if len(set(colors)) == 2:
            swapped = dict(zip(colors, reversed(colors), strict=True))
            yield _COLOR.sub(lambda match: swapped[match[0]], caption)
        return
    pattern, options = _CHANGES[kind]
    for place in pattern.finditer(caption):
        for option in options(place[0]):
            yield caption[: place.start()] + option + caption[place.end() :]


def _with_articles(caption: str) -> str:
    """ "a" and "an" as the next word wants them, so that no changed caption is known by its grammar."""
    return re.sub(r"\ban? (?=(\w))", lambda match: "an " if match[1] in "aeiou" else "a ", caption)
