from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from simplear.scenes import Detection, detect, draw, judge, metadata, sample_scene, verdict


def found(shape: str, color: str, x: float = 0.5, y: float = 0.5, match: float = 0.95) -> Detection:
    return Detection(shape, color, x, y, 0.3, match)


def asked(tag: str, *include: tuple[str, str, int], relation: str | None = None) -> dict[str, Any]:
    items = [{"class": shape, "color": color, "count": count} for shape, color, count in include]
    return {"tag": tag, "include": items, "relation": relation}


RED_CIRCLE, BLUE_SQUARE = ("circle", "red", 1), ("square", "blue", 1)
ABOVE = asked("position", RED_CIRCLE, BLUE_SQUARE, relation="above")


@pytest.mark.parametrize(
    ("prompt", "detections", "reason"),
    [
        (asked("single_object", RED_CIRCLE), [found("circle", "blue")], ""),
        (asked("single_object", RED_CIRCLE), [found("circle", "red"), found("square", "red")], ""),
        (asked("single_object", RED_CIRCLE), [found("square", "red")], "no circle"),
        (asked("single_object", RED_CIRCLE), [], "no circle"),
        (asked("two_object", RED_CIRCLE, BLUE_SQUARE), [found("square", "pink"), found("circle", "cyan")], ""),
        (asked("two_object", RED_CIRCLE, BLUE_SQUARE), [found("circle", "red")], "no square"),
        (asked("counting", ("circle", "red", 2)), [found("circle", "red"), found("circle", "blue")], ""),
        (asked("counting", ("circle", "red", 2)), [found("circle", "red")], "1 × circle, not 2"),
        (asked("counting", ("circle", "red", 2)), [found("circle", "red")] * 3, "3 × circle, not 2"),
        (asked("counting", ("circle", "red", 1)), [found("circle", "red"), found("cross", "red")], ""),
        (asked("colors", RED_CIRCLE), [found("circle", "red")], ""),
        (asked("colors", RED_CIRCLE), [found("circle", "blue"), found("square", "red")], "no red circle"),
        (asked("color_attr", RED_CIRCLE, BLUE_SQUARE), [found("circle", "red"), found("square", "blue")], ""),
        (
            asked("color_attr", RED_CIRCLE, BLUE_SQUARE),
            [found("circle", "blue"), found("square", "red")],
            "no red circle",
        ),
        (ABOVE, [found("circle", "pink", y=0.2), found("square", "cyan", y=0.8)], ""),
        (ABOVE, [found("circle", "red", y=0.8), found("square", "blue", y=0.2)], "circle not above square"),
        (ABOVE, [found("circle", "red", y=0.48), found("square", "blue", y=0.52)], "circle not above square"),
        (ABOVE, [found("circle", "red", y=0.2)], "no square"),
    ],
)
def test_rules_of_each_category(prompt: dict[str, Any], detections: list[Detection], reason: str) -> None:
    result = verdict(prompt, detections)
    assert result.reason == reason
    assert result.correct is judge(prompt, detections) is (reason == "")


def test_a_relation_is_judged_between_the_best_matches() -> None:
    square = found("square", "blue", y=0.5)
    high, low = found("circle", "red", y=0.1, match=0.99), found("circle", "red", y=0.9, match=0.8)
    assert judge(ABOVE, [high, square, low])
    assert not judge(ABOVE, [replace(low, match=0.99), square, replace(high, match=0.8)])


def test_every_drawing_satisfies_its_own_scene() -> None:
    assert all(judge(metadata(s), detect(draw(s, 64))) for s in (sample_scene(0, index) for index in range(300)))


def test_drawings_of_other_scenes_mostly_do_not() -> None:
    scenes = [sample_scene(0, index) for index in range(300)]
    others = [detect(draw(scene, 64)) for scene in scenes[6:] + scenes[:6]]
    satisfied = sum(judge(metadata(scene), detections) for scene, detections in zip(scenes, others, strict=True))
    assert satisfied / len(scenes) < 0.2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({}, "no key 'tag'"),
        ({"tag": "colors"}, "no key 'include'"),
        ({"tag": "colors", "include": [{"class": "circle", "count": 1}]}, "include 0: no key 'color'"),
        ({"tag": "colors", "include": [{"class": "cat", "color": "red", "count": 1}]}, "class is 'cat'"),
        (asked("position", RED_CIRCLE), "relation"),
        (asked("position", RED_CIRCLE, relation="above"), "include has 1 entries"),
    ],
)
def test_damaged_prompts_are_refused_by_key(prompt: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(prompt, [found("circle", "red")])
