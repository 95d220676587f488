"""Speculative Jacobi decoding that draws, seed by seed, what drawing one code after another gives.

Behind the final codes of an image, W more stand on its canvas as drafts. One pass of the decoder gives the
distribution at each of these places and at the one after them, and each place draws its code with its own random
numbers, the same in every pass (`sampling.Noise`). From left to right, a draft that equals the drawn code had the right
context behind it, so the place after it has the right distribution: codes are final up to and including the first that
differs, and the codes drawn behind it are the next drafts. Each pass makes 1 to W + 1 codes final. W = 0 is drawing one
by one.

Fixing the randomness makes drawing a fixed-point problem, which Jacobi's iteration solves (Song et al. 2021, arXiv
2002.03629; for sampling, Wiggers and Hoogeboom 2020, arXiv 2002.09928). Speculative Jacobi decoding (Teng et al. 2024,
arXiv 2410.01699) accepts a draft at random and replaces a rejected one by a draw from a residual: it accepts as often,
but what a seed draws then depends on W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simplear.generation.sampling import Noise, SamplingTensors, draw


def verify_drafts(
    logits: Tensor,
    images: int,
    sampling: SamplingTensors,
    noise: Noise,
    canvas: Tensor,
    fixed_codes: Tensor,
    final_counts: Tensor,
    count: int,
    window: int,
) -> None:
    """Draw at the places behind the final codes, and advance ``canvas`` and ``final_counts`` in place.

    Args:
        logits: (R, T, codebook_size) at the T places behind the final codes; T is 1 or W + 1.
        images: B.
        sampling: how a code is drawn.
        noise: of the images.
        canvas: (B, N + 2 W + 1) final codes, then drafts.
        fixed_codes: (B, N + 2 W + 1) codes to keep, or -1.
        final_counts: (B,) number of final codes of each image.
        count: N.
        window: W.
    """
    places = final_counts[:, None] + torch.arange(logits.shape[1], device=canvas.device)
    drawn = with_fixed_codes(draw(logits, images, sampling, noise, places), fixed_codes, places)
    final_counts.copy_((final_counts + accepted(drawn, canvas.gather(1, places))).clamp(max=count))
    canvas.scatter_(1, places, drawn)
    if window:  # places that no pass has drawn yet get the last drawn code as their draft
        behind = places[:, -1:] + torch.arange(1, window + 1, device=canvas.device)
        canvas.scatter_(1, behind, with_fixed_codes(drawn[:, -1:], fixed_codes, behind))


def with_fixed_codes(codes: Tensor, fixed_codes: Tensor, places: Tensor) -> Tensor:
    """Codes (B, T or 1) for places (B, T), replaced by the fixed ones (B, N)."""
    fixed = fixed_codes.gather(1, places)
    return torch.where(fixed < 0, codes, fixed)


def accepted(drawn: Tensor, drafts: Tensor) -> Tensor:
    """How many drawn codes are final, (B,), 1 or more: those whose context was final.

    Args:
        drawn: (B, W + 1) codes.
        drafts: (B, W + 1) what stood in their places; the last one does not matter.
    """
    return 1 + (drawn == drafts)[:, :-1].long().cumprod(dim=1).sum(dim=1)
