"""Scenes to words: a short and a long caption with varied wording, and the prompts of the evaluation.

Everything a caption says is true of its scene. The short one names the objects and what the category is about; the
long one adds the background and, where there is something to say, sizes and places. About sixty words in all.
Evaluation prompts are short captions of scenes with held-out pairs, so they read as the training captions do.
"""

from __future__ import annotations

from typing import Any

from simplear.errors import UserError
from simplear.scenes.sampling import Dice, sample_scene
from simplear.scenes.scene import CATEGORIES, Scene, SceneObject, metadata

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
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


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
    plural = "crosses" if first.shape == "cross" else first.shape + "s"
    return f"{_NUMBERS[count]} {size}{first.color} {plural}"


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
