"""Scenes to words: a short and a long caption with varied wording, evaluation prompts, and false captions.

Everything a caption says is true of its scene. The short one names the objects and what the category is about; the
long one adds the background and, if notable, sizes and places. The vocabulary has about sixty words. Evaluation prompts
are short captions of scenes with held-out pairs, so they read like the training captions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from simplear.errors import UserError
from simplear.scenes.scene import (
    BACKGROUNDS,
    CATEGORIES,
    COLORS,
    SHAPES,
    Dice,
    Scene,
    SceneObject,
    metadata,
    sample_scene,
)

SMALL, LARGE = 0.29, 0.36
"""Objects of at most, or at least, this size may be called small or large."""

_LEADS = ("", "", "a photo of ", "a picture of ", "an image of ", "a drawing of ")
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_BESIDE = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}
_OPPOSITES = (("left of", "right of"), ("above", "below"), ("over", "under"), ("higher than", "lower than"))
_INVERSE = {a: b for pair in _OPPOSITES for a, b in (pair, pair[::-1])}
_PLURALS = {"cross": "crosses", "circle": "circles", "square": "squares", "triangle": "triangles"}
_ALTERNATIVES: dict[str, dict[str, list[str]]] = {
    "shape": {word: [x for x in words if x != word] for words in (SHAPES, _PLURALS.values()) for word in words},
    "count": {word: [x for x in _NUMBERS.values() if x != word] for word in _NUMBERS.values()},
    "background": {word: [x for x in BACKGROUNDS if x != word] for word in BACKGROUNDS},
    "relation": {word: [inverse] for word, inverse in _INVERSE.items()},
}
"""For each kind of perturbation, the words that can be replaced and their replacements."""
PERTURBATIONS = (*_ALTERNATIVES, "binding")
"""What can be changed in a caption; "binding" swaps the colours of two objects."""


def captions(scene: Scene, seed: int, index: int) -> tuple[str, str]:
    """A short and a long caption; their wording is a pure function of (scene, seed, index)."""
    dice = Dice(seed, index, "captions")
    return _short(scene, dice), _long(scene, dice)


def evaluation_prompts(per_category: int = 100, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of the six categories in turn, no two with the same text, each with at least one held-out pair.

    Args:
        per_category: prompts of each category.
        seed: another seed draws other prompts.

    Returns:
        6 · per_category dicts of ``prompt``, ``tag``, ``include`` and ``relation``, as `metadata` has them. All name
        the colours; what is judged is the category's, see `verdict`.

    Raises:
        ValueError: 20 · per_category draws of some category gave too few different prompts.
    """
    rows: list[dict[str, Any]] = []
    texts: set[str] = set()
    for place, category in enumerate(CATEGORIES):
        wanted = len(rows) + per_category
        for turn in range(20 * per_category):
            if len(rows) == wanted:
                break
            index = turn * len(CATEGORIES) + place
            scene = sample_scene(seed, index, "evaluation")
            prompt = captions(scene, seed, index)[0]
            if prompt not in texts:
                texts.add(prompt)
                described = metadata(scene)
                rows.append({"prompt": prompt, **{key: described[key] for key in ("tag", "include", "relation")}})
        if len(rows) < wanted:
            raise UserError(f"per_category {per_category} is more than the different prompts of {category}: lower it.")
    return rows


def _short(scene: Scene, dice: Dice) -> str:
    lead = dice.pick((*_LEADS, _there(scene)))
    if len(scene.objects) == 2 and scene.category != "counting":
        return lead + _pair(scene, dice, [_named(item) for item in scene.objects])
    detail = dice.pick(("", "", "size", "background"))
    size = _size(scene.objects[0]) if detail == "size" else ""
    ending = dice.pick((f" on a {scene.background} background", f" on {scene.background}"))
    return lead + _group(scene, dice, size) + (ending if detail == "background" else "")


def _long(scene: Scene, dice: Dice) -> str:
    lead = dice.pick((*_LEADS, _there(scene)))
    if len(scene.objects) == 2 and scene.category != "counting":
        places = scene.category != "position" and dice.pick((True, False))
        text = _pair(scene, dice, [_named(x, _size(x), _place(x) if places else "") for x in scene.objects])
    else:
        text = _group(scene, dice, _size(scene.objects[0]))
        text += _place(scene.objects[0]) if len(scene.objects) == 1 else ""
    where = dice.pick(("on a {}", "on a plain {}", "in front of a {}")) + " background"
    return f"{lead}{text}, {where.format(scene.background)}"


def _there(scene: Scene) -> str:
    return "there are " if scene.category == "counting" else "there is "


def _group(scene: Scene, dice: Dice, size: str) -> str:
    """One object, or several of a kind."""
    first, count = scene.objects[0], len(scene.objects)
    if count == 1:
        one = dice.pick(("", "one ", "a single "))
        return one + f"{size}{first.color} {first.shape}" if one else _named(first, size)
    return f"{_NUMBERS[count]} {size}{first.color} {_PLURALS[first.shape]}"


def _pair(scene: Scene, dice: Dice, named: list[str]) -> str:
    """Two objects, in either order."""
    swap = dice.pick((True, False))
    first, second = reversed(named) if swap else named
    if scene.relation is None:
        return f"{first} {dice.pick(('and', 'with', 'together with'))} {second}"
    return f"{first} {dice.pick(_BESIDE[_INVERSE[scene.relation] if swap else scene.relation])} {second}"


def _named(item: SceneObject, size: str = "", place: str = "") -> str:
    words = f"{size}{item.color} {item.shape}{place}"
    return f"{'an' if words.startswith('o') else 'a'} {words}"


def _size(item: SceneObject) -> str:
    return "small " if item.size <= SMALL else "large " if item.size >= LARGE else ""


def _place(item: SceneObject) -> str:
    """The ninth of the picture that holds the centre."""
    row = "top" if item.y < 0.4 else "bottom" if item.y > 0.6 else ""
    column = "left" if item.x < 0.4 else "right" if item.x > 0.6 else ""
    if row and column:
        return f" in the {row} {column}"
    return f" at the {row}" if row else f" on the {column}" if column else " in the center"


def perturb(caption: str, kind: str, rng: np.random.Generator, avoid: Collection[tuple[str, str]] = ()) -> str | None:
    """The caption with one thing changed, so that it is false of its scene; None if it says nothing of that kind.

    False captions are the negatives from which a contrastive model learns most.

    Args:
        caption: of any scene.
        kind: one of `PERTURBATIONS`.
        rng: picks one of all possible changes.
        avoid: (shape, colour) pairs that the changed caption must not name: `HELD_OUT` in training, or a model learns
            that captions with those are always false.
    """
    pairs = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")
    changed = [
        other
        for other in map(_with_articles, _changes(caption, kind))
        if not any((shape, color) in avoid for color, shape in pairs.findall(other))
    ]
    return changed[int(rng.integers(len(changed)))] if changed else None


def _changes(caption: str, kind: str) -> Iterator[str]:
    if kind == "binding":
        colors = _pattern(COLORS).findall(caption)
        if len(set(colors)) == 2:
            swapped = dict(zip(colors, reversed(colors), strict=True))
            yield _pattern(COLORS).sub(lambda match: swapped[match[0]], caption)
        return
    for place in _pattern(_ALTERNATIVES[kind]).finditer(caption):
        for option in _ALTERNATIVES[kind][place[0]]:
            yield caption[: place.start()] + option + caption[place.end() :]


def _pattern(words: Collection[str]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(words)})\b")


def _with_articles(caption: str) -> str:
    """With "a" and "an" as the next word requires, so that grammar does not give a changed caption away."""
    return re.sub(r"\ban? (?=(\w))", lambda match: "an " if match[1] in "aeiou" else "a ", caption)
