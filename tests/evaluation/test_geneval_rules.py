"""GenEval's rules on synthetic detections: the six categories, each rule's edges, and wrong variants that the edges
tell.

The relations are also held against angles and shares worked out by hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from simplear.evaluation.geneval import object_names, prompts
from simplear.evaluation.geneval_rules import COLORS, Detection, counted, judge, relations
from simplear.scenes import CATEGORIES, Verdict

Box = tuple[float, float, float, float]


def seen(name: str, score: float = 0.95, box: Box = (0, 0, 10, 10)) -> Detection:
    return Detection(name, score, box)


def square(x: float, y: float, side: float = 10, name: str = "dog", score: float = 0.95) -> Detection:
    """Of this centre."""
    return Detection(name, score, (x - side / 2, y - side / 2, x + side / 2, y + side / 2))


def painted(**colors: str | Sequence[str]) -> Callable[[Sequence[Detection], str], list[str]]:
    """Colours by class, spelled with "_": one for all, or one for each place in the order of confidence."""

    def colors_of(objects: Sequence[Detection], name: str) -> list[str]:
        said = colors[name.replace(" ", "_")]
        return [said] * len(objects) if isinstance(said, str) else list(said[: len(objects)])

    return colors_of


def verdict(row: dict[str, Any], *found: Detection, **colors: str | Sequence[str]) -> Verdict:
    return judge(row, counted(row, found), painted(**colors))


BENCH = {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}
BENCH_AND_BALL = {
    "tag": "two_object",
    "include": [{"class": "bench", "count": 1}, {"class": "sports ball", "count": 1}],
}
TWO_CLOCKS = {
    "tag": "counting",
    "include": [{"class": "clock", "count": 2}],
    "exclude": [{"class": "clock", "count": 3}],
}
BLUE_HYDRANT = {"tag": "colors", "include": [{"class": "fire hydrant", "count": 1, "color": "blue"}]}
DOG_RIGHT_OF_BEAR = {
    "tag": "position",
    "include": [
        {"class": "teddy bear", "count": 1},
        {"class": "dog", "count": 1, "position": ["right of", 0]},
    ],
}
PURPLE_GLASS_BLACK_APPLE = {
    "tag": "color_attr",
    "include": [
        {"class": "wine glass", "count": 1, "color": "purple"},
        {"class": "apple", "count": 1, "color": "black"},
    ],
}


def test_the_shipped_prompts_are_what_the_rules_are_for() -> None:
    rows = prompts()
    assert len(rows) == 553 and len({row["prompt"] for row in rows}) == 553
    assert Counter(row["tag"] for row in rows) == dict(zip(CATEGORIES, (80, 99, 80, 94, 100, 100), strict=True))
    entries = [entry for row in rows for entry in row["include"]]
    assert {key for entry in entries for key in entry} == {"class", "count", "color", "position"}
    assert {entry["class"] for entry in entries} <= set(object_names()) and len(object_names()) == 80
    assert {entry["color"] for entry in entries if "color" in entry} <= set(COLORS)
    assert {tuple(entry["position"]) for entry in entries if "position" in entry} == {
        (relation, 0) for relation in ("left of", "right of", "above", "below")
    }
    for row in rows:
        if row["tag"] == "counting":
            [wanted], [unwanted] = row["include"], row["exclude"]
            assert unwanted == {"class": wanted["class"], "count": wanted["count"] + 1}
        else:
            assert "exclude" not in row


def test_single_object() -> None:
    assert verdict(BENCH, seen("bench")) == Verdict(True, "")
    assert verdict(BENCH, seen("bench"), seen("bench"), seen("dog")).correct, "more than asked for does no harm"
    assert verdict(BENCH, seen("chair")) == Verdict(False, "0 × bench, not 1")


def test_two_objects() -> None:
    assert verdict(BENCH_AND_BALL, seen("sports ball"), seen("bench")).correct
    assert verdict(BENCH_AND_BALL, seen("bench"), seen("bench")) == Verdict(False, "0 × sports ball, not 1")
    assert verdict(BENCH_AND_BALL).reason == "0 × bench, not 1\n0 × sports ball, not 1"


def test_counting() -> None:
    clocks = [seen("clock", score) for score in (0.99, 0.95, 0.92, 0.9, 0.5)]
    assert not verdict(TWO_CLOCKS, *clocks[:1]).correct
    assert verdict(TWO_CLOCKS, *clocks[:2], *clocks[3:]).correct, (
        "those at the stricter threshold or below do not count"
    )
    assert verdict(TWO_CLOCKS, *clocks).reason == "3 × clock, not below 3"


def test_counts_are_capped_at_sixteen_of_a_class() -> None:
    many = [seen("clock", 0.99 - k / 1000) for k in range(20)]
    assert [item.score for item in counted(TWO_CLOCKS, many)["clock"]] == [item.score for item in many[:16]]
    both = counted(TWO_CLOCKS, [*many, *[seen("dog")] * 3])
    assert {name: len(items) for name, items in both.items()} == {"clock": 16, "dog": 3}


def test_confidence_must_exceed_the_threshold_and_decides_the_order() -> None:
    found = counted(BENCH, [seen("dog", score) for score in (0.3, 0.31, 0.8, 0.29)])
    assert [item.score for item in found["dog"]] == [0.8, 0.31]
    assert counted(BENCH, [seen("dog", 0.3)]) == {} == counted(TWO_CLOCKS, [seen("dog", 0.9)])


def test_colors() -> None:
    hydrant = seen("fire hydrant")
    assert verdict(BLUE_HYDRANT, hydrant, fire_hydrant="blue").correct
    wrong = verdict(BLUE_HYDRANT, hydrant, fire_hydrant="red")
    assert wrong == Verdict(False, "fire hydrant is red, not blue")
    assert verdict(BLUE_HYDRANT, fire_hydrant="blue").reason == "0 × fire hydrant, not 1", (
        "no colour of what is not there"
    )


def test_only_the_most_confident_objects_color_counts() -> None:
    """A variant that asks whether any of them is blue would call the first right; whether all are, the next wrong."""
    two = (seen("fire hydrant", 0.5), seen("fire hydrant", 0.9))
    assert not verdict(BLUE_HYDRANT, *two, fire_hydrant=("red", "blue")).correct
    assert verdict(BLUE_HYDRANT, *two, fire_hydrant=("blue", "red")).correct


def test_as_many_as_asked_for_must_have_the_color() -> None:
    row = {"tag": "colors", "include": [{"class": "cup", "count": 2, "color": "red"}]}
    cups = [seen("cup", score) for score in (0.9, 0.8, 0.7)]
    assert verdict(row, *cups, cup=("red", "red", "blue")).correct
    assert verdict(row, *cups, cup=("red", "blue", "red")).reason == "cup is red, blue, not red"


def test_color_attribution() -> None:
    both = (seen("apple"), seen("wine glass"))
    assert verdict(PURPLE_GLASS_BLACK_APPLE, *both, wine_glass="purple", apple="black").correct
    swapped = verdict(PURPLE_GLASS_BLACK_APPLE, *both, wine_glass="black", apple="purple")
    assert swapped.reason == "wine glass is black, not purple\napple is purple, not black"
    half = verdict(PURPLE_GLASS_BLACK_APPLE, *both, wine_glass="purple", apple="green")
    assert half.reason == "apple is green, not black"


def test_colors_are_asked_only_where_a_row_names_them() -> None:
    def never(objects: Sequence[Detection], name: str) -> list[str]:
        raise AssertionError

    assert judge(BENCH, counted(BENCH, [seen("bench")]), never).correct


def test_position() -> None:
    bear = square(50, 50, name="teddy bear")
    assert verdict(DOG_RIGHT_OF_BEAR, bear, square(80, 50)).correct
    assert verdict(DOG_RIGHT_OF_BEAR, bear, square(20, 50)).reason == "dog is left of teddy bear, not right of"
    assert verdict(DOG_RIGHT_OF_BEAR, bear, square(51, 50)).reason == (
        "dog is in no clear direction from teddy bear, not right of"
    )
    assert verdict(DOG_RIGHT_OF_BEAR, square(80, 50)).reason == (
        "0 × teddy bear, not 1\nnothing that dog could be right of"
    )
    assert verdict(DOG_RIGHT_OF_BEAR, bear).reason == "0 × dog, not 1"


def test_position_looks_at_the_most_confident_of_each_class() -> None:
    """A variant that takes any pair would call the first right."""
    bears = square(50, 50, name="teddy bear", score=0.9), square(5, 50, name="teddy bear", score=0.4)
    assert not verdict(DOG_RIGHT_OF_BEAR, *bears, square(20, 50)).correct
    dogs = square(80, 50, score=0.9), square(20, 50, score=0.8)
    assert verdict(DOG_RIGHT_OF_BEAR, bears[0], *dogs).correct


def test_each_object_must_stand_so_to_each_target() -> None:
    row = {
        "tag": "position",
        "include": [{"class": "cat", "count": 2}, {"class": "dog", "count": 2, "position": ["above", 0]}],
    }
    cats = square(30, 50, name="cat"), square(60, 50, name="cat")
    assert verdict(row, *cats, square(40, 10), square(50, 10)).correct
    assert not verdict(row, *cats, square(40, 10), square(50, 90)).correct


def test_a_target_that_fails_its_own_requirement_is_none() -> None:
    row = {
        "tag": "position",
        "include": [
            {"class": "cat", "count": 1, "color": "red"},
            {"class": "dog", "count": 1, "position": ["above", 0]},
        ],
    }
    found = square(50, 50, name="cat"), square(50, 10)
    assert verdict(row, *found, cat="red").correct
    assert verdict(row, *found, cat="blue").reason == "cat is blue, not red\nnothing that dog could be above"


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (30, 0, {"right of"}),
        (-30, 0, {"left of"}),
        (0, -30, {"above"}),
        (0, 30, {"below"}),
        (30, 30, {"right of", "below"}),
        (-30, -30, {"left of", "above"}),
        (30, 10, {"right of"}),  # 8 of 31.6 across: a fourth
        (0, 0, set()),
        (1.9, 0, set()),  # 2 is a tenth of both sizes together
        (3, 0, set()),  # 1 of 3 is left: a third
        (4.1, 0, {"right of"}),  # 2.1 of 4.1: just more than half
        (3.9, 0, set()),  # 1.9 of 3.9: just less
        (0, -4.1, {"above"}),
        (0, -3.9, set()),
    ],
)
def test_relations(x: float, y: float, expected: set[str]) -> None:
    """Of two squares of side 10."""
    assert relations(square(50 + x, 50 + y), square(50, 50)) == expected
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(square(50, 50), square(50 + x, 50 + y)) == {opposite[name] for name in expected}


def test_the_offset_is_reduced_by_the_sizes_on_each_axis_and_measured_by_the_whole_distance() -> None:
    """Wrong variants: no reduction; the reduced offset over its own length, which makes any remainder a direction."""
    wide = Detection("dog", 0.9, (0, 45, 100, 55))  # centre (50, 50), 100 by 10
    beside = square(75, 50)  # 25 across, of which 11 are the sizes': 14 of 25 is left
    assert relations(beside, wide) == {"right of"}
    near = square(70, 50)  # 9 of 20 is left
    assert relations(near, wide) == set()
    assert min(20 / 20, 9 / 9) > 0.5, "what the wrong variants would see"
    assert relations(square(50, 29), wide) == {"above"}, "the tall side has no part in it: 21 less 2"


def test_overlapping_detections_all_count() -> None:
    same = [seen("dog", 0.9), seen("dog", 0.8), seen("dog", 0.7, (20, 20, 30, 30)), seen("cat", 0.6)]
    assert len(counted(BENCH, same)["dog"]) == 3, "two detections of one object are two, as the official program counts"


def test_exclusion_holds_whatever_else_is_right() -> None:
    row = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "exclude": [{"class": "cat", "count": 1}]}
    assert verdict(row, seen("dog")).correct
    assert verdict(row, seen("dog"), seen("cat")).reason == "1 × cat, not below 1"
