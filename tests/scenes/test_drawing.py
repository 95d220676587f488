from __future__ import annotations

import numpy as np
import pytest

from simplear.scenes import BACKGROUNDS, COLORS, SHAPES, Scene, SceneObject, draw, sample_scene
from simplear.scenes.drawing import ARM, coverage

AREAS = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 2 * ARM - ARM**2}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [14.0, 21.3])
def test_coverage_has_the_area_and_the_extent_of_the_shape(shape: str, size: float) -> None:
    centres = np.arange(40, dtype=np.float32) + 0.5
    covered = coverage(shape, 20.2, 19.7, size, centres, centres)
    assert covered.min() == 0
    assert covered.max() == 1
    assert covered.sum() == pytest.approx(AREAS[shape] * size**2, rel=0.02)
    rows, columns = np.nonzero(covered > 0.5)
    for found, centre in ((rows, 19.7), (columns, 20.2)):
        assert abs(found.min() - (centre - size / 2)) < 2
        assert abs(found.max() + 1 - (centre + size / 2)) < 1.01


@pytest.mark.parametrize("resolution", [16, 48, 64, 200])
def test_background_and_color_are_flat(resolution: int) -> None:
    scene = Scene("colors", "gray", (SceneObject("square", "blue", 0.5, 0.5, 0.4),), None)
    image = draw(scene, resolution)
    assert image.shape == (resolution, resolution, 3)
    assert image.dtype == np.uint8
    for corner in (image[0, 0], image[-1, -1]):
        assert tuple(corner) == BACKGROUNDS["gray"]
    assert tuple(image[resolution // 2, resolution // 2]) == COLORS["blue"]


def test_resolutions_agree() -> None:
    for index in range(24):
        scene = sample_scene(0, index)
        shrunk = draw(scene, 256).reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        difference = np.abs(shrunk - draw(scene, 64))
        assert difference.mean() < 0.5
        assert difference.max() < 75


def test_positions_are_continuous() -> None:
    def image(x: float) -> np.ndarray:
        return draw(Scene("colors", "white", (SceneObject("circle", "red", x, 0.5, 0.3),), None), 64)

    assert not np.array_equal(image(0.5), image(0.503))


def test_drawing_is_repeatable() -> None:
    scene = sample_scene(0, 2)
    assert np.array_equal(draw(scene, 64), draw(scene, 64))
