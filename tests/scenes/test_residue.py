from __future__ import annotations

import numpy as np
import pytest

from simplear.scenes import BACKGROUNDS, COLORS, Scene, SceneObject, detect, draw, residue, sample_scene


def empty(background: str = "white") -> np.ndarray:
    return draw(Scene("colors", background, (), None), 64)


@pytest.mark.parametrize("resolution", [32, 64, 128])
def test_drawings_leave_nothing_unexplained(resolution: int) -> None:
    for index in range(120):
        image = draw(sample_scene(1, index), resolution)
        found = detect(image)
        if len(found) == len(sample_scene(1, index).objects):
            assert residue(image, found) == 0


def test_specks_are_counted_by_their_area() -> None:
    image = empty()
    image[5:8, 5:8] = COLORS["red"]
    image[40:42, 40:42] = (245, 200, 245)  # fainter than the detector sees
    assert detect(image) == []
    assert residue(image, []) == pytest.approx(13 / 64**2)


def test_noise_of_a_decoder_does_not_count() -> None:
    noisy = empty("gray") + np.random.default_rng(0).normal(0, 4, (64, 64, 3))
    assert residue(np.clip(noisy, 0, 255).astype(np.uint8), []) < 0.001


def test_a_second_background_counts_by_its_area() -> None:
    image = empty("black")
    image[44:] = BACKGROUNDS["white"]
    assert residue(image, detect(image)) == pytest.approx(20 / 64, abs=0.01)


def test_a_patch_of_another_colour_within_an_object_counts() -> None:
    scene = Scene("colors", "white", (SceneObject("square", "red", 0.5, 0.5, 0.4),), None)
    image = draw(scene, 64)
    found = detect(image)
    image[30:33, 30:33] = COLORS["blue"]
    assert residue(image, found) == pytest.approx(9 / 64**2)


def test_objects_that_are_not_reported_count() -> None:
    scene = sample_scene(0, 1)
    image = draw(scene, 64)
    whole, part = residue(image, []), residue(image, detect(image)[:1])
    assert whole > part > 0.01
