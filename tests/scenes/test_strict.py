from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scenes.test_detection import blurred
from simplear.scenes import COLORS, Scene, SceneObject, detect, draw, judge, metadata, sample_scene, strict_verdict

CIRCLE = SceneObject("circle", "red", 0.3, 0.3, 0.32)
SQUARE = SceneObject("square", "blue", 0.7, 0.7, 0.32)
ONE = Scene("colors", "white", (CIRCLE,), None)
TWO = Scene("color_attr", "gray", (CIRCLE, SQUARE), None)


def reason(scene: Scene, image: np.ndarray) -> str:
    verdict = strict_verdict(metadata(scene), image)
    assert verdict.correct == (verdict.reason == "")
    return verdict.reason


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_every_drawing_passes(split: str) -> None:
    for index in range(180):
        scene = sample_scene(2, index, split)
        assert reason(scene, draw(scene, 64)) == ""


@pytest.mark.parametrize("resolution", [48, 128])
def test_other_resolutions(resolution: int) -> None:
    scenes = [sample_scene(2, index) for index in range(60)]
    assert sum(not reason(scene, draw(scene, resolution)) for scene in scenes) >= 58


def test_blur_and_noise_of_a_decoder_pass() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(2, index) for index in range(120)]
    soft = [np.clip(blurred(draw(scene, 64), 0.6) + rng.normal(0, 3, (64, 64, 3)), 0, 255) for scene in scenes]
    passed = sum(not reason(scene, np.rint(image).astype(np.uint8)) for scene, image in zip(scenes, soft, strict=True))
    assert passed >= 0.95 * len(scenes)


def test_drawings_of_other_scenes_do_not_pass_where_the_judge_says_no() -> None:
    scenes = [sample_scene(2, index) for index in range(120)]
    for scene, other in zip(scenes, scenes[6:] + scenes[:6], strict=True):
        image = draw(other, 64)
        if not judge(metadata(scene), detect(image)):
            assert reason(scene, image)


def lenient(scene: Scene, image: np.ndarray) -> bool:
    return judge(metadata(scene), detect(image))


def speckled(image: np.ndarray) -> np.ndarray:
    for row, column in ((50, 10), (55, 30), (5, 55), (20, 58)):
        image[row : row + 2, column : column + 2] = COLORS["green"]
    return image


def faint(image: np.ndarray) -> np.ndarray:
    image[48:60, 5:20] = (245, 210, 245)
    return image


def two_tone(image: np.ndarray) -> np.ndarray:
    image[48:] = (150, 150, 150)
    return image


def gradient(image: np.ndarray) -> np.ndarray:
    shade = np.linspace(1, 0.7, 64)[None, :, None]
    return np.rint(image * shade).astype(np.uint8)


def off_white(image: np.ndarray) -> np.ndarray:
    image[(image == 245).all(axis=2)] = (200, 245, 200)
    return image


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(speckled, "litter of 16"), (faint, "litter of 180"), (two_tone, ""), (gradient, ""), (off_white, "")],
)
def test_litter_and_backgrounds_that_are_not_plain_fail_though_the_judge_lets_them_pass(spoil, said: str) -> None:
    image = spoil(draw(ONE, 64))
    assert lenient(ONE, image)
    assert reason(ONE, image) and said in reason(ONE, image)


def test_an_extra_object_fails_whatever_it_is() -> None:
    for extra in (SQUARE, replace(SQUARE, shape="circle"), replace(CIRCLE, x=0.7)):
        image = draw(replace(ONE, objects=(CIRCLE, extra)), 64)
        assert lenient(ONE, image)
        assert reason(ONE, image) == "2 objects, not 1"


def test_an_object_at_the_edge_fails() -> None:
    image = np.roll(draw(ONE, 64), -9, axis=0)
    assert reason(ONE, image) in ("an object at the edge", "red object of no shape")


def test_an_object_of_two_colors_fails() -> None:
    image = draw(TWO, 64)
    red = (image == COLORS["red"]).all(axis=2)
    red[:, :18] = False
    image[red] = COLORS["pink"]
    assert reason(TWO, image)


def test_objects_that_touch_fail() -> None:
    image = draw(replace(TWO, objects=()), 64)
    image[20:40, 12:32] = COLORS["red"]
    apart = image.copy()
    for picture, column in ((image, 32), (apart, 36)):
        picture[20:40, column : column + 20] = COLORS["blue"]
    squares = {"tag": "color_attr", "include": [{"class": "square", "color": c, "count": 1} for c in ("red", "blue")]}
    assert judge(squares, detect(image)) and not strict_verdict(squares, image).correct
    assert strict_verdict(squares, apart).correct


def test_a_loose_shape_fails() -> None:
    """A disc with a bite passes the detector, with an overlap of 0.80, and not here."""
    image = draw(ONE, 64)
    rows, columns = np.mgrid[:64, :64]
    image[(rows - 12) ** 2 + (columns - 28) ** 2 < 50] = (245, 245, 245)
    assert lenient(ONE, image)
    assert "of no shape" in reason(ONE, image)


def test_wrong_answers_keep_the_judges_reasons() -> None:
    assert reason(replace(ONE, objects=(replace(CIRCLE, color="blue"),)), draw(ONE, 64)) == "no blue circle"
    assert reason(ONE, np.full((64, 64, 3), 245, np.uint8)) == "no red circle"


def test_mere_noise_is_an_answer_too() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert reason(ONE, noise)
    with pytest.raises(ValueError, match="no key 'tag'"):
        strict_verdict({}, draw(ONE, 64))
