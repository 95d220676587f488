from __future__ import annotations

import re
from collections import Counter

import pytest

from simplear.scenes import (
    BACKGROUNDS,
    CATEGORIES,
    COLORS,
    HELD_OUT,
    SHAPES,
    Scene,
    captions,
    detect,
    draw,
    evaluation_prompts,
    judge,
    sample_scene,
)
from simplear.scenes.scene import relations_of

NUMBERS = {"one": 1, "single": 1, "a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
RELATION_WORDS = {
    "left of": "left of",
    "right of": "right of",
    "above": "above",
    "over": "above",
    "higher than": "above",
    "below": "below",
    "under": "below",
    "lower than": "below",
}
PHRASE = re.compile(
    rf"\b(?P<number>{'|'.join(NUMBERS)}) (?:(?P<size>small|large) )?(?P<color>{'|'.join(COLORS)}) "
    rf"(?P<shape>{'|'.join(SHAPES)})(?:e?s)?(?: (?:in|at|on) the (?P<place>(?:top|bottom|left|right|center)"
    r"(?: (?:left|right))?)(?! of))?"
)


def parse(caption: str) -> list[dict[str, str]]:
    """The noun phrases of a caption, read without the generator."""
    return [match.groupdict() for match in PHRASE.finditer(caption)]


def assert_true(scene: Scene, caption: str) -> None:
    """Every word of the caption is read, and what it says holds in the scene."""
    phrases = parse(caption)
    named = Counter({(p["shape"], p["color"]): NUMBERS[p["number"]] for p in phrases})
    assert named == Counter((item.shape, item.color) for item in scene.objects), caption
    for phrase in phrases:
        item = next(x for x in scene.objects if (x.shape, x.color) == (phrase["shape"], phrase["color"]))
        if phrase["size"]:
            assert (item.size <= 0.29) if phrase["size"] == "small" else (item.size >= 0.36), caption
        place = phrase["place"] or ""
        for word, holds in (
            ("left", item.x < 0.4),
            ("right", item.x > 0.6),
            ("top", item.y < 0.4),
            ("bottom", item.y > 0.6),
            ("center", 0.4 <= item.x <= 0.6 and 0.4 <= item.y <= 0.6),
        ):
            assert word not in place or holds, caption
    for background in BACKGROUNDS:
        assert background not in caption or background == scene.background, caption
    relation = re.search(rf"({'|'.join(RELATION_WORDS)}) an? ", caption)
    assert (relation is not None) == (scene.category == "position"), caption
    if relation:
        by_shape = {item.shape: item for item in scene.objects}
        first, second = (by_shape[p["shape"]] for p in phrases)
        assert RELATION_WORDS[relation[1]] in relations_of(first, second), caption
    assert not re.search(r"\ba orange|\ban (?!orange|image)|  ", caption), caption


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_caption_is_true(split: str) -> None:
    for index in range(600):
        scene = sample_scene(0, index, split)
        short, long = captions(scene, 0, index)
        assert_true(scene, short)
        assert_true(scene, long)
        assert scene.background in long
        assert len(short.split()) <= 13


def test_the_reader_of_captions_sees_a_lie() -> None:
    scene = sample_scene(0, 10)
    assert scene.category == "position"
    short, _ = captions(scene, 0, 10)
    other = next(color for color in COLORS if color not in short and color != "orange")
    with pytest.raises(AssertionError):
        assert_true(scene, short.replace(scene.objects[0].color, other))


def test_wording_varies_and_is_repeatable() -> None:
    scene = sample_scene(0, 0)
    texts = [captions(scene, 0, index) for index in range(200)]
    assert texts == [captions(scene, 0, index) for index in range(200)]
    assert len({short for short, _ in texts}) > 20
    assert len({long for _, long in texts}) > 30


def test_the_vocabulary_is_small() -> None:
    words: set[str] = set()
    for index in range(1200):
        words.update(re.findall("[a-z]+", " ".join(captions(sample_scene(0, index), 0, index))))
    assert len(words) <= 70


def test_evaluation_prompts_are_distinct_balanced_and_hold_a_held_out_pair() -> None:
    rows = evaluation_prompts()
    assert Counter(row["tag"] for row in rows) == dict.fromkeys(CATEGORIES, 100)
    assert len({row["prompt"] for row in rows}) == 600
    for row in rows:
        assert not {(item["class"], item["color"]) for item in row["include"]}.isdisjoint(HELD_OUT)
        named = Counter({(p["shape"], p["color"]): NUMBERS[p["number"]] for p in parse(row["prompt"])})
        assert named == {(item["class"], item["color"]): item["count"] for item in row["include"]}
    assert rows == evaluation_prompts()
    assert rows != evaluation_prompts(seed=1)


def test_evaluation_prompts_use_the_words_of_training() -> None:
    words = {w for i in range(1200) for w in captions(sample_scene(0, i), 0, i)[0].split()}
    assert {w for row in evaluation_prompts() for w in row["prompt"].split()} <= words


def test_every_evaluation_prompt_can_be_satisfied() -> None:
    turns: Counter[str] = Counter()
    rows = {row["prompt"]: row for row in evaluation_prompts(per_category=10)}
    for index in range(60):
        scene = sample_scene(0, index, "evaluation")
        prompt = captions(scene, 0, index)[0]
        if prompt in rows:
            assert judge(rows[prompt], detect(draw(scene, 64)))
            turns[scene.category] += 1
    assert turns.keys() == set(CATEGORIES)


def test_more_prompts_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="per_category 600 is more than"):
        evaluation_prompts(per_category=600)
