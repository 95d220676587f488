"""What a reward is: images, their captions and their metadata in, one score for each image out.

Your own reward is a class with that ``__call__``, or a function, named in YAML by its import path. There is nothing to
derive from and nothing to register. If it has a method ``to(device)``, that is called once before training: the place
to read weights and to fail early. A reward that derives from `RewardOfParts` also has its parts logged.

Training calls `score`, which checks what a reward returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from simplear.described import Described
from simplear.errors import UserError


@runtime_checkable
class Reward(Protocol):
    """Scores images; frozen, without gradient. An image's score must not depend on the rest of the batch.

    The types are left open: jsonargparse would require the same annotations of your own class.
    """

    def __call__(self, images: Any, captions: Any, metadata: Any) -> Any:
        """Scores (B,) float32 on the images' device; higher is better. An array or a list of B numbers will do.

        Args:
            images: (B, 3, H, W) float in [0, 1].
            captions: B texts (``list[str]``), without the model's prefix.
            metadata: B dictionaries, each the metadata of its prompt's row; empty where a source has none.
        """


class RewardOfParts(Described, ABC):
    """A reward computed from named parts, which are logged beside it."""

    @abstractmethod
    def parts(
        self, images: Tensor, captions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """Each part of the score, (B,) float32 on the images' device. Arguments as for `Reward`."""

    @abstractmethod
    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The scores (B,) that the parts make."""

    def __call__(self, images: Tensor, captions: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """See `Reward`."""
        return self.combine(self.parts(images, captions, metadata))


class WeightedReward(RewardOfParts):
    """The weighted sum of rewards. Its parts are the rewards, unweighted, and their own parts as ``name/part``."""

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float] | None = None) -> None:
        """
        Args:
            rewards: Rewards by name, each by class path.
            weights: The weight of each, by the same names; all 1 if left out.

        Raises:
            ValueError: no rewards, a name with "/", or other names in weights than in rewards.
        """
        if not rewards or any("/" in name for name in rewards):
            raise UserError(f"rewards {sorted(rewards)}: give at least one, with names without '/'.")
        self.rewards = rewards
        self.weights = dict.fromkeys(rewards, 1.0) if weights is None else weights
        if set(self.weights) != set(rewards):
            raise UserError(f"weights are given for {sorted(self.weights)}, the rewards are {sorted(rewards)}.")

    def parts(
        self, images: Tensor, captions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """See `RewardOfParts`; an error names the reward that it came from."""
        parts: dict[str, Tensor] = {}
        for name, reward in self.rewards.items():
            parts[name], inner = score(reward, images, captions, metadata)
            parts.update({f"{name}/{part}": values for part, values in inner.items()})
        return parts

    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See `RewardOfParts`."""
        return torch.stack([self.weights[name] * parts[name] for name in self.rewards]).sum(dim=0)

    def to(self, device: torch.device | str) -> WeightedReward:
        """Move each reward to the device."""
        for reward in self.rewards.values():
            move(reward, device)
        return self


def move(reward: Reward, device: torch.device | str) -> None:
    """Call the reward's method ``to``, if it has one: it reads its weights and brings them to the device."""
    if hasattr(reward, "to"):
        reward.to(device)


def score(
    reward: Reward, images: Tensor, captions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores and parts, checked; each part is computed once. Arguments as for `Reward`.

    Returns:
        scores (B,) float32 on the images' device, and the parts of a `RewardOfParts` by name, each like the scores.

    Raises:
        UserError: the input is not as `Reward` says, or the reward returns the wrong number of scores, NaN or an
            infinite number. The message names the reward and the caption.
    """
    if not len(images) == len(captions) == len(metadata):
        raise UserError(f"{len(images)} images, {len(captions)} captions and {len(metadata)} metadata do not match.")
    valid = images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point()
    if not (valid and images.amin() >= 0 and images.amax() <= 1):  # refuses NaN too
        raise UserError(
            f"a reward needs images (B, 3, H, W), float in [0, 1], not {tuple(images.shape)} {images.dtype} in "
            f"[{images.amin():.3f}, {images.amax():.3f}]: scale what a visual tokenizer decodes, (pixels + 1) / 2."
        )
    name = getattr(reward, "__name__", type(reward).__name__)
    parts: dict[str, Tensor] = {}
    with torch.no_grad():
        if isinstance(reward, RewardOfParts):
            parts = reward.parts(images, captions, metadata)
            scores = reward.combine(parts)
        else:
            scores = reward(images, captions, metadata)
    parts = {part: _checked(values, f"part {part!r} of {name}", images, captions) for part, values in parts.items()}
    return _checked(scores, name, images, captions), parts


def _checked(values: Any, name: str, images: Tensor, captions: Sequence[str]) -> Tensor:
    """One finite score for each image as (B,) float32, from a tensor (B,) or (B, 1), an array or a list."""
    found: Any = type(values).__name__
    try:
        scores = torch.as_tensor(values).detach().to(images.device, torch.float32)
        scores = scores.squeeze(1) if scores.ndim == 2 else scores
        found = tuple(scores.shape)
    except (TypeError, ValueError, RuntimeError):
        pass
    if found != (len(images),):
        raise UserError(f"{name} must return one score for each of {len(images)} images, not {found}.")
    broken = (~scores.isfinite()).nonzero()
    if len(broken):
        first = int(broken[0])
        raise UserError(f"{name} returned {scores[first].item()} for the caption {captions[first]!r}.")
    return scores
