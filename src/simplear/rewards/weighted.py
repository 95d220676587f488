"""Several rewards as one: their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from simplear.errors import UserError
from simplear.rewards.protocol import Reward, RewardOfParts, move, score


class WeightedReward(RewardOfParts):
    """The sum of rewards, each times its weight. Its parts are the rewards, unweighted, and theirs as ``name/part``."""

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float] | None = None) -> None:
        """
        Args:
            rewards: Rewards by name, each by class path.
            weights: The weight of each, by the same names; 1 for all if not given.

        Raises:
            ValueError: no rewards, a name with "/", or names that differ.
        """
        if not rewards or any("/" in name for name in rewards):
            raise UserError(f"rewards {sorted(rewards)}: at least one, with names without '/'.")
        if weights is not None and set(weights) != set(rewards):
            raise UserError(f"weights are given for {sorted(weights)}, the rewards are {sorted(rewards)}.")
        self.rewards = rewards
        self.weights = weights or dict.fromkeys(rewards, 1.0)

    def parts(
        self, images: Tensor, captions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """See `RewardOfParts`; an error names the reward it came from."""
        parts: dict[str, Tensor] = {}
        for name, reward in self.rewards.items():
            parts[name], inner = score(reward, images, captions, metadata)
            parts.update({f"{name}/{part}": values for part, values in inner.items()})
        return parts

    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See `RewardOfParts`."""
        return torch.stack([self.weights[name] * parts[name] for name in self.rewards]).sum(dim=0)

    def to(self, device: torch.device | str) -> WeightedReward:
        """Let each reward read its weights and come to the device."""
        for reward in self.rewards.values():
            move(reward, device)
        return self
