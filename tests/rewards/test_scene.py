"""The scene reward: 1 for what is right and clean and for nothing else, and every known hack costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from simplear.rewards import SceneReward, score
from simplear.scenes import (
    BACKGROUNDS,
    COLORS,
    Scene,
    SceneObject,
    captions,
    detect,
    draw,
    judge,
    metadata,
    sample_scene,
)

SCENES = [(sample_scene(4, index, ("train", "evaluation")[index % 2]), index) for index in range(240)]
FREE = SceneReward(extra_weight=0, residue_weight=0, looseness_weight=0, details_weight=0)
CIRCLE = SceneObject("circle", "red", 0.3, 0.3, 0.32)
SQUARE = SceneObject("square", "blue", 0.7, 0.7, 0.32)
ONE = Scene("colors", "white", (CIRCLE,), None)


def scored(
    images: list[NDArray[np.uint8]], texts: list[str], rows: list[dict[str, Any]], reward: SceneReward | None = None
) -> tuple[list[float], dict[str, list[float]]]:
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    scores, parts = score(reward or SceneReward(), pixels, texts, rows)
    return scores.tolist(), {name: values.tolist() for name, values in parts.items()}


def of(scene: Scene, image: NDArray[np.uint8], text: str = "", **weights: float) -> float:
    return scored([image], [text], [metadata(scene)], SceneReward(**weights))[0][0]


def spoiled(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A drawing with something pasted over it: maybe still right, maybe not."""
    image = image.copy()
    top, left = rng.integers(0, 50, 2)
    color = list((COLORS | BACKGROUNDS).values())[rng.integers(11)]
    image[top : top + rng.integers(2, 16), left : left + rng.integers(2, 16)] = color
    return image


@pytest.mark.parametrize("long", [0, 1])
def test_every_drawing_of_its_scene_scores_one(long: int) -> None:
    texts = [captions(scene, 4, index)[long] for scene, index in SCENES]
    scores, parts = scored([draw(scene, 64) for scene, _ in SCENES], texts, [metadata(scene) for scene, _ in SCENES])
    assert scores == [1.0] * len(SCENES)
    assert all(set(parts[name]) == {0.0} for name in ("extra", "residue", "looseness", "details"))


def test_without_costs_one_is_what_the_judge_accepts_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    right = wrong = 0
    for reward in (FREE, SceneReward(), SceneReward(correct_weight=0, extra_weight=0)):
        images, rows, verdicts = [], [], []
        for (scene, _), (other, _) in zip(SCENES, SCENES[6:] + SCENES[:6], strict=True):
            for image in (draw(other, 64), spoiled(draw(scene, 64), rng)):
                images.append(image)
                rows.append(metadata(scene))
                verdicts.append(judge(rows[-1], detect(image)))
        scores, parts = scored(images, [""] * len(images), rows, reward)
        assert all(0 <= value <= 1 for value in scores)
        assert parts["correct"] == [float(verdict) for verdict in verdicts]
        assert all(verdict for value, verdict in zip(scores, verdicts, strict=True) if value == 1)
        if reward is FREE:
            assert [value == 1 for value in scores] == verdicts
            right, wrong = verdicts.count(True), verdicts.count(False)
    assert right > 100 and wrong > 100


def test_among_wrong_images_the_nearer_scores_more() -> None:
    four = Scene(
        "counting", "white", tuple(replace(CIRCLE, x=x, y=y, size=0.25) for x in (0.2, 0.7) for y in (0.2, 0.7)), None
    )
    by_number = [of(four, draw(replace(four, objects=four.objects[:n]), 64)) for n in range(5)]
    assert by_number == sorted(set(by_number)) and by_number[0] == 0 and by_number[-1] == 1

    two = Scene("color_attr", "white", (CIRCLE, SQUARE), None)
    drawn = {
        "nothing": (),
        "one, other colour": (replace(CIRCLE, color="green"),),
        "one": (CIRCLE,),
        "both, other colours": (replace(CIRCLE, color="green"), replace(SQUARE, color="pink")),
        "both, one in its colour": (CIRCLE, replace(SQUARE, color="pink")),
        "both": (CIRCLE, SQUARE),
    }
    by_objects = [of(two, draw(replace(two, objects=objects), 64)) for objects in drawn.values()]
    assert by_objects == sorted(by_objects) and by_objects[-2] < by_objects[-1] == 1
    assert by_objects[1] < by_objects[2] < by_objects[4] and by_objects[3] < by_objects[4]

    above = Scene("position", "white", (replace(CIRCLE, x=0.5, y=0.25), replace(SQUARE, x=0.5, y=0.75)), "above")
    turned = []
    for angle in (180, 135, 90, 60, 0):
        x, y = 0.25 * np.sin(np.radians(angle)), -0.25 * np.cos(np.radians(angle))
        placed = (replace(CIRCLE, x=0.5 + x, y=0.5 + y), replace(SQUARE, x=0.5 - x, y=0.5 - y))
        turned.append(of(above, draw(replace(above, objects=placed), 64)))
    assert turned == sorted(set(turned)) and turned[-1] == 1
    assert 0 < of(above, draw(replace(above, objects=above.objects[:1]), 64)) < turned[0]


def test_a_right_image_with_an_extra_object_beats_a_wrong_one() -> None:
    extra = of(ONE, draw(replace(ONE, objects=(CIRCLE, SQUARE)), 64))
    wrong = of(ONE, draw(replace(ONE, objects=(replace(CIRCLE, color="pink"),)), 64))
    assert wrong < extra < 1


@pytest.mark.parametrize("extra", [SQUARE, replace(CIRCLE, x=0.7), replace(SQUARE, shape="cross", color="green")])
def test_extra_objects_cost_by_their_number(extra: SceneObject) -> None:
    second = replace(extra, x=0.3, y=0.72, size=0.3)
    drawn = [
        draw(replace(ONE, objects=objects), 64) for objects in ((CIRCLE,), (CIRCLE, extra), (CIRCLE, extra, second))
    ]
    assert all(judge(metadata(ONE), detect(image)) for image in drawn)
    scores, parts = scored(drawn, [""] * 3, [metadata(ONE)] * 3)
    assert parts["extra"] == [0, 1, 2] and scores[0] == 1 and scores[0] > scores[1] > scores[2]
    assert of(ONE, drawn[2], extra_weight=0) == 1


def specks(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Too small for the detector."""
    image[50:54, 8:11] = image[40:43, 50:54] = COLORS["green"]
    return image


def faint_specks(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Too faint for the detector."""
    image[45:60, 5:30] = (230, 220, 245)
    return image


def second_background(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image[48:] = BACKGROUNDS["black"]
    return image


def smear(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """No shape, so no object."""
    image[52:56, 4:60] = COLORS["cyan"]
    return image


def patch_inside(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Too small to be taken apart from the circle."""
    image[18:22, 17:21] = COLORS["blue"]
    return image


@pytest.mark.parametrize("hack", [specks, faint_specks, second_background, smear, patch_inside])
def test_what_the_judge_overlooks_costs(hack: Any) -> None:
    image = hack(draw(ONE, 64))
    assert judge(metadata(ONE), detect(image))
    clean, littered = of(ONE, draw(ONE, 64)), of(ONE, image)
    assert clean == 1 and littered < 0.99
    assert of(ONE, image, residue_weight=0, looseness_weight=0) == 1
    assert of(ONE, image, residue_weight=50) < littered


def test_a_shape_that_barely_counts_costs() -> None:
    image = draw(ONE, 64)
    rows, columns = np.mgrid[:64, :64]
    image[(rows - 12) ** 2 + (columns - 28) ** 2 < 50] = BACKGROUNDS["white"]
    assert judge(metadata(ONE), detect(image))
    assert of(ONE, image) < of(ONE, image, looseness_weight=0)


def test_colors_and_backgrounds_that_the_caption_names_count_where_the_judge_does_not_ask() -> None:
    """A policy that may draw all in the colour that is easiest will."""
    scene = Scene("single_object", "gray", (CIRCLE,), None)
    text = "a red circle on a gray background"
    other_color = draw(replace(scene, objects=(replace(CIRCLE, color="cyan"),)), 64)
    other_background = draw(replace(scene, background="white"), 64)
    for image in (other_color, other_background):
        assert judge(metadata(scene), detect(image))
        assert of(scene, image, text) == pytest.approx(np.exp(-0.1), abs=1e-6)
        assert of(scene, image, text, details_weight=0) == 1
    assert of(scene, other_background, "a red circle") == 1
    assert of(scene, draw(scene, 64), text) == 1


def test_parts_that_are_not_asked_for_are_no_part_of_the_score() -> None:
    weights = {"count_weight": 100.0, "relation_weight": 100.0}
    image = draw(replace(ONE, objects=(replace(CIRCLE, color="cyan"),)), 64)
    assert of(ONE, image, **weights) == of(ONE, image)


def test_prompts_without_a_scenes_metadata_are_named() -> None:
    with pytest.raises(ValueError, match=r"SceneReward cannot judge the caption 'a dog': .*no key 'tag'"):
        scored([draw(ONE, 64)], ["a dog"], [{}])


@pytest.mark.parametrize("weights", [{"extra_weight": -1.0}, {"correct_weight": 0.0, "objects_weight": 0.0}])
def test_weights_that_make_no_score_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        SceneReward(**weights)
