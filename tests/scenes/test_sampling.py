from __future__ import annotations

from collections import Counter

import pytest

from simplear.scenes import BACKGROUNDS, CATEGORIES, HELD_OUT, Scene, sample_scene
from simplear.scenes.scene import GAP, MARGIN, RELATIONS, SPLITS, relations_of


def pairs(scene: Scene) -> set[tuple[str, str]]:
    return {(item.shape, item.color) for item in scene.objects}


def test_a_scene_is_pinned_across_processes_and_platforms() -> None:
    scene = sample_scene(0, 7)
    assert (scene.category, scene.background, scene.relation) == ("two_object", "black", None)
    assert [(item.shape, item.color, item.x, item.y, item.size) for item in scene.objects] == [
        ("square", "cyan", 0.71316, 0.65404, 0.38488),
        ("circle", "green", 0.43109, 0.20448, 0.32147),
    ]


def test_order_and_repetition_do_not_matter() -> None:
    forwards = [sample_scene(5, index) for index in range(30)]
    assert [sample_scene(5, index) for index in reversed(range(30))][::-1] == forwards
    assert len(set(forwards)) == 30
    assert sample_scene(6, 0) != forwards[0]
    assert len({sample_scene(5, 0, split).objects for split in SPLITS}) == 3


def test_categories_go_round() -> None:
    assert [sample_scene(1, index).category for index in range(12)] == list(CATEGORIES) * 2


def test_training_holds_no_held_out_pair_and_all_others() -> None:
    seen = Counter(pair for index in range(1500) for pair in pairs(sample_scene(0, index)))
    assert seen.keys().isdisjoint(HELD_OUT)
    assert len(seen) == 26
    assert min(seen.values()) > 30


@pytest.mark.parametrize("split", ["validation", "evaluation"])
def test_other_splits_hold_a_held_out_pair_in_every_scene(split: str) -> None:
    seen = [pairs(sample_scene(0, index, split)) for index in range(600)]
    assert all(not found.isdisjoint(HELD_OUT) for found in seen)
    assert set().union(*seen) > set(HELD_OUT)


@pytest.mark.parametrize("split", SPLITS)
def test_objects_are_whole_and_apart(split: str) -> None:
    for index in range(600):
        objects = sample_scene(2, index, split).objects
        for number, a in enumerate(objects):
            for centre in (a.x, a.y):
                assert centre - a.size / 2 >= MARGIN - 1e-4
                assert centre + a.size / 2 <= 1 - MARGIN + 1e-4
            for b in objects[:number]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) - (a.size + b.size) / 2 >= GAP - 1e-9


def test_each_category_holds_what_it_is_about() -> None:
    counts: Counter[int] = Counter()
    relations: Counter[str | None] = Counter()
    for index in range(900):
        scene = sample_scene(4, index)
        shapes = [item.shape for item in scene.objects]
        colors = {item.color for item in scene.objects}
        assert scene.background in BACKGROUNDS
        assert (scene.relation is not None) == (scene.category == "position")
        if scene.category == "counting":
            assert len(pairs(scene)) == 1
            counts[len(shapes)] += 1
        else:
            assert len(set(shapes)) == len(shapes) == (1 if scene.category in ("single_object", "colors") else 2)
        if scene.category == "color_attr":
            assert len(colors) == 2
        if scene.category == "position":
            relations[scene.relation] += 1
            assert scene.relation in relations_of(*scene.objects)
    assert counts.keys() == {2, 3, 4}
    assert min(counts.values()) > 30
    assert relations.keys() == set(RELATIONS)
    assert min(relations.values()) > 20


@pytest.mark.parametrize("arguments", [(-1, 0), (0, -1), (0, 2**62), (0, 0, "test")])
def test_arguments_out_of_range_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"must lie in|is unknown"):
        sample_scene(*arguments)
