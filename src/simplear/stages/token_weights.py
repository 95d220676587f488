"""Weights of image tokens in the GRPO loss, after the idea of STAGE (arXiv 2509.25027).

Images of one prompt often share tokens, a plain background above all. Where they do, images with advantages of opposite
sign push one and the same token up and down, which teaches nothing about the reward and wears the model out. STAGE
weighs such tokens down.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from simplear.errors import UserError


class TokenWeights(Protocol):
    """What weighs the tokens of the loss; any class with this ``__call__``, by class_path.

    Its types are left open for the same reason as those of `simplear.rewards.Reward`.
    """

    def __call__(self, codes: Any, group_size: Any) -> Any:
        """Weights (P·G, T) float, not negative, of codes (P·G, T) int64; images of one prompt next to each other."""


class SimilarityTokenWeights:
    """Weighs a token down by the share of its group that has the same code at the same place.

    ``weight = 1 - (1 - floor) · share``, where ``share`` is that among the G - 1 other images of the group.

    STAGE itself weighs by ``(1 - c) / 2``, with ``c`` the cosine between vector-quantised embeddings at one place,
    averaged over the images of the group whose advantage has the other sign, and divides by the sum over the group.
    Here codes are equal or not, for those of a finite scalar quantiser have no learned embedding; all others of the
    group count, whatever their advantage; and `grpo_loss` divides by the mean over each image. STAGE also weighs the KL
    penalty, by ``0.5 + 0.5 · min(1, 1 + c)``, which is 1 wherever ``c`` is not negative; the share never is, so the
    penalty stays whole here. Its entropy reward is another part, not done here. So this is after the idea alone:
    STAGE's numbers say nothing about it.
    """

    def __init__(self, floor: float = 0.1) -> None:
        """
        Args:
            floor: weight of a token that all of its group share, in (0, 1]; 1 weighs all tokens alike. Above 0, for an
                image that equals all others of its group would otherwise have no weight at all.

        Raises:
            ValueError: `floor` outside (0, 1].
        """
        if not 0 < floor <= 1:
            raise UserError(f"floor {floor} must be above 0 and at most 1.")
        self.floor = floor

    def __call__(self, codes: Tensor, group_size: int) -> Tensor:
        """Weights of the tokens of whole groups.

        Args:
            codes: (P·G, T) int64, images of one prompt next to each other.
            group_size: G, 2 or more.

        Returns:
            (P·G, T) float32 in [floor, 1].

        Raises:
            ValueError: `group_size` below 2, or a batch that is no whole number of groups.
        """
        if group_size < 2 or len(codes) % group_size:
            raise ValueError(f"{len(codes)} images must be whole groups of {group_size}, and a group 2 images or more.")
        groups = codes.view(-1, group_size, codes.shape[1])
        same = (groups[:, :, None] == groups[:, None]).sum(dim=2)
        share = (same - 1) / (group_size - 1)
        return (1 - (1 - self.floor) * share).flatten(0, 1)
