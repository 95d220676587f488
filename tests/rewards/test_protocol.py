from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from simplear.command_line import PARSER_MODE
from simplear.rewards import CLIPReward, HPSv2Reward, Reward, RewardOfParts, SceneReward, WeightedReward, move, score

IMAGES = torch.linspace(0, 1, 3 * 3 * 4 * 4).view(3, 3, 4, 4)
CAPTIONS = ["one", "two", "three"]
METADATA: list[dict[str, Any]] = [{}, {}, {}]


class Brightness:
    """One's own reward: no base class, no annotations."""

    def __init__(self, factor: float = 1.0):
        self.factor = factor
        self.device = None

    def __call__(self, images, captions, metadata):
        return self.factor * images.mean(dim=(1, 2, 3))

    def to(self, device):
        self.device = device


class Constant:
    def __init__(self, *values: float):
        self.values = values

    def __call__(self, images: Tensor, captions: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float64)


class Parts(RewardOfParts):
    def __init__(self) -> None:
        self.calls = 0

    def parts(self, images, captions, metadata) -> dict[str, Tensor]:
        self.calls += 1
        return {"length": torch.tensor([len(caption) for caption in captions]), "zero": torch.zeros(len(images))}

    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        return 2.0 * parts["length"] + parts["zero"]


def test_scores_are_float32_without_gradient() -> None:
    images = IMAGES.double().requires_grad_()
    scores, parts = score(Brightness(2.0), images, CAPTIONS, METADATA)
    assert scores.dtype == torch.float32 and not scores.requires_grad and parts == {}
    torch.testing.assert_close(scores, 2 * IMAGES.mean(dim=(1, 2, 3)))


def test_parts_are_computed_once_and_given_beside_the_score() -> None:
    reward = Parts()
    scores, parts = score(reward, IMAGES, CAPTIONS, METADATA)
    assert scores.tolist() == [6, 6, 10] and parts["length"].tolist() == [3, 3, 5] and reward.calls == 1
    assert reward(IMAGES, CAPTIONS, METADATA).tolist() == scores.tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_scores_name_reward_and_caption(value: float) -> None:
    with pytest.raises(ValueError, match=f"Constant returned {value} for the caption 'two'"):
        score(Constant(1.0, value, float("nan")), IMAGES, CAPTIONS, METADATA)


def test_broken_parts_are_named_too() -> None:
    class Broken(Parts):
        def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
            return torch.zeros(3)

        def parts(self, images, captions, metadata) -> dict[str, Tensor]:
            return {"length": torch.tensor([0.0, 0.0, float("nan")])}

    with pytest.raises(ValueError, match="part 'length' of Broken returned nan for the caption 'three'"):
        score(Broken(), IMAGES, CAPTIONS, METADATA)
    inside = WeightedReward({"mine": Constant(1.0, 1.0, float("inf"))})
    with pytest.raises(ValueError, match="Constant returned inf for the caption 'three'"):
        score(inside, IMAGES, CAPTIONS, METADATA)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Constant(1.0), r"Constant must return one score for each of 3 images, not \(1,\)"),
        (lambda images, captions, metadata: images, r"not \(3, 3, 4, 4\)"),
        (lambda images, captions, metadata: [1.0, 2.0], r"not \(2,\)"),
        (lambda images, captions, metadata: [None] * 3, "not list"),
        (lambda images, captions, metadata: None, "not NoneType"),
        (lambda images, captions, metadata: torch.tensor(1.0), r"not \(\)"),
        (lambda images, captions, metadata: (torch.ones(3), {"mean": 1.0}), "not tuple"),
        (lambda images, captions, metadata: "123", "not str"),
        (lambda images, captions, metadata: torch.ones(1, 3), r"not \(1, 3\)"),
    ],
)
def test_other_shapes_are_refused(reward: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(reward, IMAGES, CAPTIONS, METADATA)


@pytest.mark.parametrize(
    "scores",
    [
        torch.tensor([1.0, 0.0, 1.0]),
        torch.tensor([[1.0], [0.0], [1.0]]),
        torch.tensor([True, False, True]),
        np.array([1.0, 0.0, 1.0]),
        [1, 0.0, True],
        [torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0)],
    ],
    ids=["tensor", "column", "booleans", "array", "list", "list of tensors"],
)
def test_one_number_for_each_image_is_a_score(scores: Any) -> None:
    found = score(lambda images, captions, metadata: scores, IMAGES, CAPTIONS, METADATA)[0]
    assert found.dtype == torch.float32 and found.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES * 2 - 1, r"float in \[0, 1\], not .* in \[-1.000, 1.000\]"),
        (IMAGES.clone().fill_(float("nan")), r"float in \[0, 1\]"),
        ((IMAGES * 255).to(torch.uint8), "float"),
        (IMAGES[:, 0], "float"),
        (IMAGES[:2], "2 images, 3 captions and 3 metadata"),
    ],
)
def test_other_images_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(Brightness(), images, CAPTIONS, METADATA)


def test_weighted_sum_with_all_parts() -> None:
    reward = WeightedReward({"light": Brightness(), "words": Parts()}, {"light": 3.0, "words": -0.5})
    scores, parts = score(reward, IMAGES, CAPTIONS, METADATA)
    light = IMAGES.mean(dim=(1, 2, 3))
    torch.testing.assert_close(scores, 3 * light - 0.5 * torch.tensor([6.0, 6.0, 10.0]))
    assert list(parts) == ["light", "words", "words/length", "words/zero"]
    torch.testing.assert_close(parts["light"], light)
    torch.testing.assert_close(
        score(WeightedReward({"a": Brightness(), "b": Brightness()}), IMAGES, CAPTIONS, METADATA)[0], 2 * light
    )


@pytest.mark.parametrize(
    ("rewards", "weights"),
    [({}, None), ({"a/b": Brightness()}, None), ({"a": Brightness()}, {"b": 1.0}), ({"a": Brightness()}, {})],
)
def test_names_must_match(rewards: dict[str, Any], weights: dict[str, float] | None) -> None:
    with pytest.raises(ValueError, match="rewards"):
        WeightedReward(rewards, weights)


def test_rewards_are_moved_where_they_can_be() -> None:
    inner = Brightness()
    move(WeightedReward({"a": inner, "b": Constant(1.0)}), "cpu")
    move(Constant(1.0), "cpu")
    assert inner.device == "cpu"


class Holder:
    """As a training stage holds it."""

    def __init__(self, reward: Reward):
        self.reward = reward


def parsed(text: str) -> Any:
    parser = ArgumentParser(parser_mode=PARSER_MODE, exit_on_error=False)
    parser.add_class_arguments(Holder, "holder")
    return parser.instantiate(parser.parse_string(f"holder: {{reward: {text}}}")).holder.reward


def here(name: str) -> str:
    return f"{sys.modules[__name__].__name__}.{name}"


def test_every_reward_is_a_line_of_yaml() -> None:
    clip = parsed("{class_path: simplear.rewards.CLIPReward, init_args: {model: ViT-H-14, pretrained: weights.pt}}")
    assert type(clip) is CLIPReward and clip.pretrained == "weights.pt"
    hps = parsed("{class_path: simplear.rewards.HPSv2Reward}")
    assert isinstance(hps, HPSv2Reward) and hps.model == "ViT-H-14"
    scene = parsed("{class_path: simplear.rewards.SceneReward, init_args: {residue_weight: 2}}")
    assert isinstance(scene, SceneReward) and scene.weights["residue"] == 2
    mine = f"{{class_path: {here('Brightness')}, init_args: {{factor: 2}}}}"
    own = parsed(mine)
    assert isinstance(own, Brightness) and own.factor == 2
    assert isinstance(parsed(f"{{class_path: {here('Parts')}}}"), Parts)
    both = parsed(
        "{class_path: simplear.rewards.WeightedReward, init_args: {rewards: "
        f"{{mine: {mine}, scene: {{class_path: simplear.rewards.SceneReward}}}}, weights: {{mine: 0.1, scene: 1}}}}}}"
    )
    assert isinstance(both.rewards["mine"], Brightness) and both.weights == {"mine": 0.1, "scene": 1.0}


def test_a_class_that_is_no_reward_is_refused_at_once() -> None:
    with pytest.raises(Exception, match="does not implement protocol Reward"):
        parsed(f"{{class_path: {here('NoReward')}}}")


class NoReward:
    def __call__(self, pictures: Tensor) -> Tensor:
        return pictures
