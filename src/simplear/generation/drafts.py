"""Drafts of speculative Jacobi decoding: how they are proposed, and how a pass verifies them. Functions over tensors.

Behind the codes of an image that are final, W more stand on its canvas as drafts. One pass of the decoder gives the
distribution at each of these places and at the one after them, and each place draws its code with its own random
numbers, the same in every pass (`sampling.Noise`). From left to right, a draft that equals what was drawn had the right
context behind it, so the place after it has the right distribution: codes are final up to and with the first that
differs, and what was drawn behind it are the next drafts. So each pass makes 1 to W + 1 codes final, and they are those
that drawing one by one gives. With W = 0 this is drawing one by one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from simplear.generation.sampling import Noise, SamplingTensors, draw

Proposal = Literal["left", "upper"]


def verify_drafts(
    logits: Tensor,
    images: int,
    sampling: SamplingTensors,
    noise: Noise,
    canvas: Tensor,
    kept: Tensor,
    done: Tensor,
    drafted: Tensor,
    count: int,
) -> None:
    """Draw at the places behind ``done``, and advance canvas, ``done`` and ``drafted`` in place.

    Args:
        logits: (R, W + 1, codebook_size) at these places.
        images: B.
        sampling: how a code is drawn.
        noise: of the images.
        canvas: (B, at least N + W) codes that are final and drafts.
        kept: (B, the same) codes that are given, or -1.
        done: (B,) codes that are final.
        drafted: (B,) where places begin that no pass has drawn at yet.
        count: N.
    """
    places = done[:, None] + torch.arange(logits.shape[1], device=done.device)
    given = kept.gather(1, places)
    drawn = torch.where(given < 0, draw(logits, images, sampling, noise, places), given)
    drafted.copy_(torch.maximum(drafted, places[:, -1] + 1))
    done.copy_((done + accepted(drawn, canvas.gather(1, places))).clamp(max=count))
    canvas.scatter_(1, places, drawn)


def propose_drafts(
    canvas: Tensor, kept: Tensor, done: Tensor, drafted: Tensor, window: int, width: int, proposal: Proposal
) -> None:
    """Fill in place the drafts that no pass has drawn yet with a neighbour's code; given codes stay.

    Arguments as for `verify_drafts`.

    Args:
        window: W.
        width: codes in a row of the picture.
        proposal: the neighbour to the left, or above.
    """
    places = done[:, None] + torch.arange(window, device=done.device)
    last = drafted[:, None] - 1
    source = last.expand_as(places)
    if proposal == "upper":
        # As many rows up as lead to a place that was drawn; in the first row there is none.
        above = places - (places - last + width - 1).div(width, rounding_mode="floor") * width
        source = torch.where(above < 0, source, above)
    fresh = (places > last) & (kept.gather(1, places) < 0)
    canvas.scatter_(1, places, torch.where(fresh, canvas.gather(1, source), canvas.gather(1, places)))


def accepted(drawn: Tensor, drafts: Tensor) -> Tensor:
    """How many codes from the left are final, (B,): those drawn from a context that is, 1 or more.

    Args:
        drawn: (B, W + 1) codes.
        drafts: (B, W + 1) what stood in their places; the last is not read.
    """
    return 1 + (drawn == drafts)[:, :-1].long().cumprod(dim=1).sum(dim=1)
