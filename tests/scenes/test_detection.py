from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest

from simplear.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    Detection,
    Scene,
    SceneObject,
    detect,
    draw,
    sample_scene,
)

Spoil = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def kinds(objects: Iterable[SceneObject | Detection]) -> list[tuple[str, str]]:
    return sorted((item.shape, item.color) for item in objects)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    weights = np.exp(-(np.arange(-3, 4) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    padded = np.pad(image.astype(np.float32), ((3, 3), (3, 3), (0, 0)), mode="edge")
    down = sum(w * padded[i : i + image.shape[0]] for i, w in enumerate(weights))
    return sum(w * down[:, i : i + image.shape[1]] for i, w in enumerate(weights))


def soft(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noisy = blurred(image, 0.7) + rng.normal(0, 6, image.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def soft_and_tinted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noisy = blurred(image, 0.7) + rng.normal(0, 6, image.shape) + rng.uniform(-20, 20, 3)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def share_right(count: int, resolution: int, spoil: Spoil = lambda image, rng: image) -> float:
    """Share of scenes of which every object is found with its shape and colour, and nothing else."""
    rng = np.random.default_rng(0)
    right = 0
    for index in range(count):
        scene = sample_scene(1, index, ("train", "validation")[index % 2])
        right += kinds(detect(spoil(draw(scene, resolution), rng))) == kinds(scene.objects)
    return right / count


def test_own_drawings_are_read_exactly() -> None:
    assert share_right(900, 64) >= 0.995


@pytest.mark.parametrize("resolution", [32, 48, 128])
def test_other_resolutions(resolution: int) -> None:
    assert share_right(240, resolution) >= 0.97


@pytest.mark.parametrize("spoil", [soft, soft_and_tinted])
def test_blur_noise_and_tint_are_tolerated(spoil: Spoil) -> None:
    assert share_right(360, 64, spoil) >= 0.97


def test_places_and_sizes_are_found_within_a_pixel() -> None:
    for index in range(0, 300, 6):
        item = sample_scene(0, index).objects[0]
        (found,) = detect(draw(sample_scene(0, index), 64))
        for name in ("x", "y", "size"):
            assert getattr(found, name) == pytest.approx(getattr(item, name), abs=1 / 64)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_shape_in_every_color_at_the_smallest_size(background: str) -> None:
    for shape in SHAPES:
        for color in COLORS:
            item = SceneObject(shape, color, 0.512, 0.473, 0.2)
            found = detect(draw(Scene("colors", background, (item,), None), 64))
            assert kinds(found) == [(shape, color)]


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_picture_holds_nothing(background: str) -> None:
    assert detect(draw(Scene("colors", background, (), None), 64)) == []


def test_objects_of_two_colors_that_touch_are_taken_apart() -> None:
    touching = (SceneObject("square", "red", 0.3, 0.5, 0.3), SceneObject("square", "blue", 0.6, 0.5, 0.3))
    assert kinds(detect(draw(Scene("color_attr", "white", touching, None), 64))) == kinds(touching)


def test_specks_and_shapeless_pieces_are_no_objects() -> None:
    image = draw(Scene("colors", "white", (), None), 64)
    image[5:8, 5:8] = COLORS["red"]
    image[30:34, 10:50] = COLORS["blue"]
    assert detect(image) == []


def test_a_shape_cut_in_two_is_not_one() -> None:
    image = draw(Scene("colors", "white", (SceneObject("circle", "red", 0.5, 0.5, 0.35),), None), 64)
    image[:, 30:34] = BACKGROUNDS["white"]
    assert ("circle", "red") not in kinds(detect(image))


def test_pieces_join_where_their_rows_meet() -> None:
    image = draw(Scene("colors", "white", (), None), 64)
    image[10:30, 10:16] = image[10:30, 34:40] = image[30:36, 10:40] = COLORS["green"]
    image[16:26, 20:30] = COLORS["green"]
    assert kinds(detect(image)) == [("square", "green")]


def test_mere_noise_ends_without_warning() -> None:
    rng = np.random.default_rng(0)
    with np.errstate(all="raise"):
        for _ in range(10):
            found = detect(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
            assert all(0.75 <= item.match <= 1 for item in found)


def test_detections_come_best_match_first() -> None:
    matches = [item.match for item in detect(draw(sample_scene(0, 2), 64))]
    assert len(matches) == 4
    assert matches == sorted(matches, reverse=True)


@pytest.mark.parametrize("image", [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.float32)])
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        detect(image)
