from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from simplear.evaluation.scenes import diversity
from simplear.scenes import BACKGROUNDS, COLORS, Scene, SceneObject, draw, sample_scene

ITEM = SceneObject("circle", "red", 0.5, 0.5, 0.4)


def picture(background: str = "white", color: str = "red", x: float = 0.5) -> np.ndarray:
    return draw(Scene("colors", background, (replace(ITEM, color=color, x=x),), None), 64)


def test_images_all_alike_have_none() -> None:
    assert diversity([picture()] * 4, ["a", "a", "b", "b"]) == {
        "background_entropy": 0,
        "color_entropy": 0,
        "sample_distance": 0,
    }


def test_equal_frequencies_have_the_most() -> None:
    images = [picture(background, color) for background in BACKGROUNDS for color in COLORS]
    found = diversity(images, ["a"] * len(images))
    assert found["background_entropy"] == pytest.approx(math.log2(3))
    assert found["color_entropy"] == pytest.approx(3)


def test_distance_is_between_samples_of_one_prompt_alone() -> None:
    white, black = np.full((8, 8, 3), 255, np.uint8), np.zeros((8, 8, 3), np.uint8)
    assert diversity([white, black], ["a", "b"]).keys() == {"background_entropy", "color_entropy"}
    assert diversity([white, white, black, black], ["a", "a", "b", "b"])["sample_distance"] == 0
    # Of three images two pairs of three differ; the other prompt's do not.
    three = diversity([white, black, black, black, black], ["a", "a", "a", "b", "b"])
    assert three["sample_distance"] == pytest.approx((2 / 3 + 0) / 2)


def test_backgrounds_going_white_show() -> None:
    scenes = [sample_scene(0, index) for index in range(200)]
    prompts = [str(index // 4) for index in range(200)]

    def with_white(every: int) -> dict[str, float]:
        drawn = [replace(scene, background="white") if n % every == 0 else scene for n, scene in enumerate(scenes)]
        return diversity([draw(scene, 64) for scene in drawn], prompts)

    none, half, all_of_them = with_white(10**6), with_white(2), with_white(1)
    assert none["background_entropy"] > 1.5 > 1.4 > half["background_entropy"] > all_of_them["background_entropy"] == 0
    assert all_of_them["sample_distance"] < 0.8 * none["sample_distance"]
    assert all_of_them["color_entropy"] == pytest.approx(none["color_entropy"], abs=0.05)
