"""Classifier-free guidance (Ho and Salimans 2022), in log-probabilities over image ids."""

from __future__ import annotations

import torch
from torch import Tensor


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension, in float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """``unconditional + scale · (conditional − unconditional)``.

    Args:
        conditional: (B, C) log-probabilities over the codebook given the prompts.
        unconditional: (B, C) the same given the negative prompts.
        scale: 1 is the conditional distribution, 0 the unconditional one, above 1 pushes away from it.

    Returns:
        (B, C) log-weights, normalised only where scale is 0 or 1.
    """
    if isinstance(scale, Tensor):
        scale = scale.to(conditional.dtype)
    return unconditional + scale * (conditional - unconditional)


def guided_log_weights(logits: Tensor, images: int, scale: float | Tensor) -> Tensor:
    """(B, …, C) log-weights of B images from logits (R, …, C), over the codebook, of their rows.

    The conditional rows stand first; R is B where there are no others, 2 B where the unconditional ones follow.
    """
    log_weights = log_probabilities(logits)
    if len(log_weights) == images:
        return log_weights
    return guide(log_weights[:images], log_weights[images:], scale)
