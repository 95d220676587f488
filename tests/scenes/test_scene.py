from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from simplear.scenes import BACKGROUNDS, COLORS, HELD_OUT, SHAPES, SceneObject, metadata, sample_scene
from simplear.scenes.scene import RELATIONS, relations_of


def at(x: float, y: float, size: float = 0.2) -> SceneObject:
    return SceneObject("circle", "red", x, y, size)


def test_colors_are_far_from_each_other_and_from_every_background() -> None:
    for a, b in itertools.combinations(COLORS.values(), 2):
        assert np.linalg.norm(np.subtract(a, b)) > 85
    for color, background in itertools.product(COLORS.values(), BACKGROUNDS.values()):
        assert np.linalg.norm(np.subtract(color, background)) > 85


def test_held_out_pairs_leave_every_shape_and_color_to_training() -> None:
    kept = set(itertools.product(SHAPES, COLORS)) - set(HELD_OUT)
    assert len(kept) == 26
    assert {shape for shape, _ in kept} == {shape for shape, _ in HELD_OUT} == set(SHAPES)
    assert {color for _, color in kept} == set(COLORS)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (at(0.2, 0.5), at(0.8, 0.5), {"left of"}),
        (at(0.8, 0.5), at(0.2, 0.5), {"right of"}),
        (at(0.5, 0.2), at(0.5, 0.8), {"above"}),
        (at(0.5, 0.8), at(0.5, 0.2), {"below"}),
        (at(0.1, 0.1), at(0.9, 0.9), {"left of", "above"}),
        (at(0.5, 0.5), at(0.53, 0.5), set()),
        (at(0.5, 0.5), at(0.5, 0.5), set()),
    ],
)
def test_relations_by_hand(a: SceneObject, b: SceneObject, expected: set[str]) -> None:
    assert relations_of(a, b) == expected


def test_relations_are_inverse_when_the_objects_change_places() -> None:
    inverse = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    for x, y in itertools.product(np.linspace(0, 1, 9), repeat=2):
        a, b = at(float(x), float(y)), at(0.5, 0.5)
        assert {inverse[relation] for relation in relations_of(a, b)} == relations_of(b, a)


def test_metadata_counts_and_orders_what_it_includes() -> None:
    counting, position = sample_scene(0, 2), sample_scene(0, 4)
    row = metadata(counting)
    assert json.loads(json.dumps(row)) == row
    first = counting.objects[0]
    assert row["tag"] == "counting"
    assert row["include"] == [{"class": first.shape, "color": first.color, "count": len(counting.objects)}]
    row = metadata(position)
    assert [item["class"] for item in row["include"]] == [item.shape for item in position.objects]
    assert row["relation"] in RELATIONS
