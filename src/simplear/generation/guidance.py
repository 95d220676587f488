"""Classifier-free guidance (Ho and Salimans 2022), in log-probabilities over image ids."""

from __future__ import annotations

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """``unconditional + scale · (conditional − unconditional)``.

    Args:
        conditional: (B, C) log-probabilities over the codebook given the prompts.
        unconditional: (B, C) the same given the negative prompts.
        scale: 1 is the conditional distribution, 0 the unconditional one, above 1 pushes away from it.

    Returns:
        (B, C) log-weights, normalised only where scale is 0 or 1.
    """
    return unconditional + scale * (conditional - unconditional)
