"""Where two engines part in float32: only where two codes nearly tie, or one of them is wrong.

Rounding moves log-weights by millionths, so two engines that are right may draw different codes where two are that near
to each other at the end of their race, and from there on their images differ altogether. The first difference is
judged, by the model's own distribution after the codes before it, which both share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simplear.generation import SamplingSettings, guide
from simplear.generation.guidance import log_probabilities
from simplear.generation.sampling import Noise, probabilities
from simplear.language_model import LanguageModel

SAMPLED = 1e-4
"""The log of either code's probability over its random number is no farther than this from the largest."""
GREEDY = 1e-3
"""The guided log-weight of either code is no farther than this from the largest."""


@torch.no_grad()
def margins(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    negatives: Sequence[Tensor],
    grid: tuple[int, int],
    sampling: SamplingSettings,
    seeds: Sequence[int],
    one: Tensor,
    other: Tensor,
) -> list[float | None]:
    """For each image None if codes (B, h, w) are equal, else how far the model is from a tie at the first difference.

    How far the guided log-weight of either is from the largest; sampled, how far the log of its probability over its
    random number is. A tie at the border of top-k or top-p is not recognised.
    """
    found: list[float | None] = []
    for image, (a, b) in enumerate(zip(one.flatten(1), other.flatten(1), strict=True)):
        if torch.equal(a, b):
            found.append(None)
            continue
        place = int((a != b).nonzero()[0])
        before = model.layout.ids_of_codes(a[:place])
        log_weights = _next(model, torch.cat([prompts[image], before]), len(prompts[image]), grid)
        if sampling.guidance_scale != 1.0:
            unconditional = _next(model, torch.cat([negatives[image], before]), len(negatives[image]), grid)
            log_weights = guide(log_weights, unconditional, sampling.guidance_scale)
        scores = log_weights[0]
        if sampling.do_sample:
            noise = Noise([seeds[image]], scores.shape[-1], scores.device).at(
                torch.tensor([[place]], device=scores.device)
            )[0, 0]
            scores = (probabilities(log_weights, sampling)[0] / noise).log()
        found.append(max(float(scores.max() - scores[int(codes[place])]) for codes in (a, b)))
    return found


def _next(model: LanguageModel, ids: Tensor, prompt: int, grid: tuple[int, int]) -> Tensor:
    """Log-probabilities of the code that follows, (1, C)."""
    places, lengths = torch.arange(len(ids), device=ids.device)[None], torch.tensor([prompt], device=ids.device)
    position = model.positions_at(places, lengths, grid)
    return log_probabilities(model.image_logits(model.hidden_states(ids[None], position, None)[:, -1]))


def right(found: Sequence[float | None], sampling: SamplingSettings) -> int:
    """How many images are equal or part at a near tie."""
    limit = SAMPLED if sampling.do_sample else GREEDY
    return sum(margin is None or margin <= limit for margin in found)
