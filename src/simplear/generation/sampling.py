"""From log-weights to one code, with randomness that belongs to an image and not to its batch.

Each (seed, position) has one uniform number; the code is the inverse of the cumulative distribution, in id order, at
that number. So an image does not change with its companions, engines that draw code by code can be compared code by
code, and speculative ones may ask for further numbers under keys of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simplear.hashing import mix


@dataclass(frozen=True)
class SamplingSettings:
    """How a code is drawn from the model's distribution: guidance, then temperature, then top-k, then top-p."""

    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none and costs half."""
    do_sample: bool = True
    """False takes the most probable code."""
    temperature: float = 1.0
    """Divides log-weights; above 0."""
    top_k: int | None = None
    """Keep the k most probable codes (and ties with the last of them); None keeps all."""
    top_p: float | None = None
    """Keep the fewest most probable codes that together have at least this probability; None keeps all."""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale {self.guidance_scale} must be 0 or more; 1 is no guidance.")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature {self.temperature} must be above 0; for the most probable code set do_sample to false."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} must be 1 or more; leave it out to keep all codes.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must lie in (0, 1].")


def uniforms(seeds: Sequence[int], positions: Sequence[int], *keys: int) -> Tensor:
    """One number in [0, 1) for each seed and position, (B, T) float64 on CPU.

    A hash (SplitMix64's finaliser, once for each part of the key), so the same on every machine and in any order.

    Args:
        seeds: B integers.
        positions: T places in the image's raster order.
        keys: what else a number is for, such as a purpose and an iteration; none for the draw of the code itself.
    """
    state = mix(np.array([seed % 2**64 for seed in seeds], dtype=np.uint64))[:, None]
    state = mix(state ^ np.array(positions, dtype=np.uint64)[None])
    for key in keys:
        state = mix(state ^ np.uint64(key + 1))
    return torch.from_numpy((mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def choose(log_weights: Tensor, settings: SamplingSettings, uniform: Tensor | None) -> Tensor:
    """One code a row, (B,) int64.

    Args:
        log_weights: (B, C) guided log-weights over the codebook, in any floating dtype.
        settings: temperature, top-k and top-p; guidance is done.
        uniform: (B,) float64 in [0, 1); not read when greedy.
    """
    if not settings.do_sample:
        return log_weights.argmax(dim=-1)
    assert uniform is not None
    return invert_cumulative(probabilities(log_weights, settings), uniform)


def probabilities(log_weights: Tensor, settings: SamplingSettings) -> Tensor:
    """The distribution that is drawn from, (B, C) float64: tempered, truncated and normalised."""
    scaled = log_weights.double() / settings.temperature
    if settings.top_k is not None and settings.top_k < scaled.shape[-1]:
        smallest_kept = scaled.topk(settings.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest_kept, float("-inf"))
    probability = scaled.softmax(dim=-1)
    if settings.top_p is not None and settings.top_p < 1:
        descending, order = probability.sort(dim=-1, descending=True, stable=True)
        before = descending.cumsum(dim=-1) - descending
        kept = torch.zeros_like(probability, dtype=torch.bool).scatter(-1, order, before < settings.top_p)
        probability = probability.masked_fill(~kept, 0.0)
        probability = probability / probability.sum(dim=-1, keepdim=True)
    return probability


def invert_cumulative(probability: Tensor, uniform: Tensor) -> Tensor:
    """The first code whose cumulative probability, in id order, exceeds the uniform number, (B,) int64.

    The number is scaled by the sum as it came out, so rounding leaves no gap at the end. A code of probability zero is
    never drawn: it has its predecessor's cumulative probability exactly, which parallel sums alone do not promise.
    """
    cumulative = probability.cumsum(dim=-1).masked_fill(probability == 0, 0.0).cummax(dim=-1).values
    threshold = uniform.to(cumulative) * cumulative[:, -1]
    return torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0]
