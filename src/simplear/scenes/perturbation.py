"""Captions made false in one respect: another colour, shape, number, relation or background, or two colours swapped.

They ask of whatever scores pictures against captions what it can tell apart, and they are the negatives that a
contrastive model learns most from. Works on the words alone, so any caption of a scene will do.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from simplear.scenes.scene import BACKGROUNDS, COLORS, SHAPES

_NUMBERS = ("two", "three", "four")
_OPPOSITES = (("left of", "right of"), ("above", "below"), ("over", "under"), ("higher than", "lower than"))
_OPPOSITE = {a: b for pair in _OPPOSITES for a, b in (pair, pair[::-1])}
_PLURALS = {"cross": "crosses", **{shape: f"{shape}s" for shape in SHAPES if shape != "cross"}}


def _words(*options: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(options)})\b")


_COLOR, _BACKGROUND, _NUMBER = _words(*COLORS), _words(*BACKGROUNDS), _words(*_NUMBERS)
_SHAPE, _RELATION = _words(*_PLURALS, *_PLURALS.values()), _words(*_OPPOSITE)


def _other(rng: np.random.Generator, found: str, options: tuple[str, ...]) -> str:
    rest = [option for option in options if option != found]
    return rest[int(rng.integers(len(rest)))]


def _other_shape(rng: np.random.Generator, found: str) -> str:
    plural = found in _PLURALS.values()
    return _other(rng, found, tuple(_PLURALS.values()) if plural else SHAPES)


_CHANGES: dict[str, tuple[re.Pattern[str], Callable[[np.random.Generator, str], str]]] = {
    "color": (_COLOR, lambda rng, found: _other(rng, found, tuple(COLORS))),
    "shape": (_SHAPE, _other_shape),
    "count": (_NUMBER, lambda rng, found: _other(rng, found, _NUMBERS)),
    "relation": (_RELATION, lambda rng, found: _OPPOSITE[found]),
    "background": (_BACKGROUND, lambda rng, found: _other(rng, found, tuple(BACKGROUNDS))),
}
PERTURBATIONS = (*_CHANGES, "binding")
"""What can be changed; "binding" swaps the colours of two objects."""


def perturb(caption: str, kind: str, rng: np.random.Generator) -> str | None:
    """The caption with one thing changed, so that it is false of its scene; None when it says nothing of that kind.

    Args:
        caption: of a scene.
        kind: one of `PERTURBATIONS`.
        rng: picks the word to change, and what it becomes.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind == "binding":
        colors = _COLOR.findall(caption)
        if len(set(colors)) != 2:
            return None
        swapped = dict(zip(colors, reversed(colors), strict=True))
        return _with_articles(_COLOR.sub(lambda match: swapped[match[0]], caption))
    if kind not in _CHANGES:
        raise ValueError(f"kind {kind!r} is unknown, known are {list(PERTURBATIONS)}.")
    pattern, change = _CHANGES[kind]
    places = list(pattern.finditer(caption))
    if not places:
        return None
    place = places[int(rng.integers(len(places)))]
    return _with_articles(caption[: place.start()] + change(rng, place[0]) + caption[place.end() :])


def _with_articles(caption: str) -> str:
    """ "a" and "an" as the next word wants them, so that no changed caption is known by its grammar."""
    return re.sub(r"\ban? (?=(\w))", lambda match: "an " if match[1] in "aeiou" else "a ", caption)
