from __future__ import annotations

import re

import numpy as np
import pytest

from simplear.scenes import (
    COLORS,
    HELD_OUT,
    SHAPES,
    Scene,
    captions,
    detect,
    draw,
    judge,
    metadata,
    perturb,
    sample_scene,
)
from simplear.scenes.captions import PERTURBATIONS

SCENES = [(sample_scene(0, index), index) for index in range(300)]
NUMBERS = {"two": 2, "three": 3, "four": 4}


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("kind", "caption", "options"),
    [
        ("shape", "three red crosses", {"three red circles", "three red squares", "three red triangles"}),
        ("shape", "a red circle", {"a red cross", "a red square", "a red triangle"}),
        ("count", "there are three red crosses", {"there are two red crosses", "there are four red crosses"}),
        ("relation", "a red circle to the left of a blue square", {"a red circle to the right of a blue square"}),
        ("relation", "a red circle higher than a blue square", {"a red circle lower than a blue square"}),
        ("background", "a red circle on white", {"a red circle on gray", "a red circle on black"}),
        ("binding", "an orange circle and a red square", {"a red circle and an orange square"}),
    ],
)
def test_changes_of_each_kind(kind: str, caption: str, options: set[str]) -> None:
    generator = rng()
    assert {perturb(caption, kind, generator) for _ in range(200)} == options


@pytest.mark.parametrize(
    ("kind", "caption"),
    [
        ("count", "a red circle"),
        ("relation", "a red circle on the left, on a white background"),
        ("background", "a red circle"),
        ("binding", "a red circle"),
        ("binding", "a red circle and a red square"),
        ("shape", "a dog"),
    ],
)
def test_what_a_caption_does_not_say_cannot_be_changed(kind: str, caption: str) -> None:
    assert perturb(caption, kind, rng()) is None


def test_every_caption_of_a_category_can_be_changed_in_what_the_category_is_about() -> None:
    about = {"counting": "count", "position": "relation", "color_attr": "binding"}
    for scene, index in SCENES:
        for caption in captions(scene, 0, index):
            assert perturb(caption, about.get(scene.category, "shape"), rng())


def _says(caption: str) -> tuple[list[tuple[str, str]], int, str | None]:
    """Objects (shape, colour), number and background that a caption names."""
    pairs = re.findall(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})", caption)
    number = next((NUMBERS[word] for word in caption.split() if word in NUMBERS), 1)
    background = re.search(r"\b(white|gray|black)\b", caption)
    return [(shape, color) for color, shape in pairs], number, background[0] if background else None


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_changed_captions_are_false_of_their_scene(kind: str) -> None:
    """Read back by words: the objects, the number, the background or the relation are no longer the scene's."""
    generator, changed = rng(), 0
    for scene, index in SCENES:
        for caption in captions(scene, 0, index):
            other = perturb(caption, kind, generator)
            if other is None:
                continue
            changed += 1
            assert _true_of(scene, caption)
            assert not _true_of(scene, other), (caption, other)
    assert changed > 50


def _true_of(scene: Scene, caption: str) -> bool:
    pairs, number, background = _says(caption)
    objects = [(item.shape, item.color) for item in scene.objects]
    if any(objects.count(pair) < pairs.count(pair) for pair in pairs):
        return False
    if number > 1 and objects.count(pairs[0]) != number:
        return False
    if background not in (None, scene.background):
        return False
    if scene.relation is None:
        return True
    axis = {"left of": "left of", "right of": "right of", "above": "above", "over": "above", "higher than": "above"}
    axis |= {"below": "below", "under": "below", "lower than": "below"}
    words = next(words for words in axis if words in caption)
    include = [{"class": shape, "color": color, "count": 1} for shape, color in pairs]
    prompt = {"tag": "position", "include": include, "relation": axis[words]}
    return judge(prompt, detect(draw(scene, 64)))


def test_no_change_breaks_the_grammar() -> None:
    generator = rng()
    for scene, index in SCENES:
        for kind in PERTURBATIONS:
            other = perturb(captions(scene, 0, index)[1], kind, generator)
            assert other is None or not re.search(r"\ban [^aeiou]|\ba [aeiou]", other)


def test_pairs_to_avoid_are_named_by_no_changed_caption() -> None:
    generator = rng()
    found = set()
    for scene, index in SCENES:
        for kind in ("shape", "binding"):
            free = perturb(captions(scene, 0, index)[0], kind, generator)
            found |= set(_says(free or "")[0])
            other = perturb(captions(scene, 0, index)[0], kind, generator, avoid=HELD_OUT)
            assert other is None or not set(_says(other)[0]) & set(HELD_OUT)
    assert set(HELD_OUT) <= found
    assert perturb("a cyan circle and a red square", "binding", generator, avoid=[("square", "cyan")]) is None


def test_metadata_of_the_scenes_is_judged_true() -> None:
    """The oracle above is the judge's own."""
    assert all(judge(metadata(scene), detect(draw(scene, 64))) for scene, _ in SCENES[:30])
