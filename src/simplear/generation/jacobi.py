"""The `jacobi` engine: exact speculative Jacobi decoding with a KV cache, guidance, ragged batches and seeds.

After the codes that are final, W more stand as drafts. One forward pass gives the model's distribution at all of them
and at the place after them, and from left to right each draft d, drawn from q, is accepted with probability
min(1, p(d) / q(d)). The first that is not is replaced by a draw from the residual (p − q)⁺; if none fails, the place
after them is drawn from its p. So every pass makes 1 to W + 1 codes final, and they have the model's distribution
exactly (Leviathan et al. 2023, arXiv 2211.17192; for Jacobi drafts Teng et al. 2024, arXiv 2410.01699).

Drafts for the next pass come from the distributions that this one gave at the places not yet final, although they were
conditioned on drafts that were replaced since: a draft need only be distributed as its q. Places that were in no pass
yet take a proposal: uniform, or a copy of a neighbour, whose q is a point. Each place draws its drafts with one number
of its own throughout: no number of a place reaches any distribution before it or at it, so exactness holds, and drafts
change only where their distribution does, which later places thank with fewer rejections.

Images advance at their own pace, in a cache whose rows have lengths of their own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from simplear.generation.decoder_step import DecoderStep, Rows
from simplear.generation.engine import GenerationStats, RowCallback, check_request, kept_codes
from simplear.generation.guidance import guide, log_probabilities
from simplear.generation.sampling import SamplingSettings, invert_cumulative, probabilities, uniforms
from simplear.language_model import LanguageModel

Proposal = Literal["left", "upper", "uniform"]

DRAFT, ACCEPT, RESIDUAL = range(3)
"""What a further uniform number of (seed, position) is for."""


class JacobiEngine:
    """Draws several codes a pass where the model is sure of them.

    Args:
        model: on the device where it is to run, in evaluation mode.
        window: W, drafts in each pass, 1 or more.
        proposal: of places that were in no pass yet: their left or upper neighbour's code, or any.
    """

    def __init__(self, model: LanguageModel, window: int = 8, proposal: Proposal = "left") -> None:
        if window < 1:
            raise ValueError(f"window {window} must be 1 or more; the cached engine draws without drafts.")
        self.model, self.window, self.proposal = model, window, proposal

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[Tensor],
        negative_ids: Sequence[Tensor],
        grid: tuple[int, int],
        sampling: SamplingSettings,
        seeds: Sequence[int],
        on_row: RowCallback | None = None,
        given: Tensor | None = None,
    ) -> tuple[Tensor, GenerationStats]:
        """See `Engine.generate`."""
        check_request(self.model, prompt_ids, negative_ids, grid, seeds, given)
        begin = time.perf_counter()
        images, (height, width) = len(prompt_ids), grid
        count, window = height * width, min(self.window, height * width)
        guided = sampling.guidance_scale != 1.0
        prompts = [*prompt_ids, *(negative_ids if guided else [])]
        # Copied anew for each request: the weights may have been trained since.
        rows = Rows(self.model, DecoderStep(self.model), prompts, grid, count + window)
        device = rows.device
        places = range(count + window)
        number = uniforms(seeds, places).to(device)
        for_draft, for_acceptance, for_residual = (
            uniforms(seeds, places, purpose).to(device) for purpose in (DRAFT, ACCEPT, RESIDUAL)
        )
        image, offsets = torch.arange(images, device=device), torch.arange(window, device=device)
        done = torch.zeros(images, dtype=torch.long, device=device)  # codes that are final
        canvas = torch.zeros(images, count + window, dtype=torch.long, device=device)  # these, and the drafts behind
        kept = pad(kept_codes(given, images, count, device), (0, window), value=-1)
        q = torch.empty(images, window, self.model.layout.codebook_size, dtype=torch.float64, device=device)
        self._propose(canvas, q, done, torch.zeros_like(done), kept, for_draft, width)
        rows_done, passes = 0, 1
        while int(done.min()) < count:
            log_weights = log_probabilities(rows.drafted(canvas, done, window))
            if guided:
                log_weights = guide(log_weights[:images], log_weights[images:], sampling.guidance_scale)
            p = _keep(_distribution(log_weights, sampling), kept, done)
            passes += 1
            ahead = done[:, None] + offsets
            accepted = accept(p[:, :-1], q, canvas.gather(1, ahead), for_acceptance.gather(1, ahead))

            # The code after the accepted ones: from the residual or, where nothing was rejected, from p itself.
            place, after = (done + accepted).clamp(max=count + window - 1), p[image, accepted]
            rejected = accepted < window
            left = residual(after, q[image, accepted.clamp(max=window - 1)])
            drawn = invert_cumulative(
                torch.where(rejected[:, None], left, after),
                torch.where(rejected, for_residual[image, place], number[image, place]),
            )
            canvas[image, place] = torch.where(done < count, drawn, canvas[image, place])
            done = torch.where(done < count, place + 1, done).clamp(max=count)

            # The next drafts: from what this pass says about places that are not final, then proposals.
            q = p[image[:, None], (accepted[:, None] + 1 + offsets).clamp(max=window)]
            ahead = done[:, None] + offsets
            fresh = invert_cumulative(q.flatten(0, 1), for_draft.gather(1, ahead).flatten())
            canvas.scatter_(1, ahead, fresh.view(images, window))
            self._propose(canvas, q, done, window - accepted, kept, for_draft, width)
            while on_row is not None and int(done.min()) >= (rows_done + 1) * width:
                rows_done += 1
                on_row(rows_done, canvas[:, : rows_done * width])
        stats = GenerationStats("jacobi", images, images * count, passes, time.perf_counter() - begin)
        return canvas[:, :count].reshape(images, height, width).clone(), stats

    def _propose(
        self, canvas: Tensor, q: Tensor, done: Tensor, known: Tensor, kept: Tensor, numbers: Tensor, width: int
    ) -> None:
        """Fill drafts and their q in place, from draft number ``known`` (B,) on; kept codes stand as they are."""
        codebook = q.shape[-1]
        distance = width if self.proposal == "upper" else 1
        for draft in range(int(known.min()), q.shape[1]):
            place, missing = done + draft, draft >= known
            if self.proposal == "uniform":
                code = (numbers.gather(1, place[:, None])[:, 0] * codebook).long()
                proposed = torch.full_like(q[:, draft], 1 / codebook)
            else:
                # The first row has no upper neighbour and the first code none: any code is a valid proposal.
                back = torch.where(place >= distance, distance, 1)
                code = canvas.gather(1, (place - back).clamp(min=0)[:, None])[:, 0]
                proposed = one_hot(code, codebook).to(q.dtype)
            keep = kept.gather(1, place[:, None])[:, 0]
            code = torch.where(keep < 0, code, keep)
            proposed = torch.where(keep[:, None] < 0, proposed, one_hot(code, codebook).to(q.dtype))
            present = canvas.gather(1, place[:, None])[:, 0]
            canvas.scatter_(1, place[:, None], torch.where(missing, code, present)[:, None])
            q[:, draft] = torch.where(missing[:, None], proposed, q[:, draft])


def _keep(p: Tensor, kept: Tensor, done: Tensor) -> Tensor:
    """The distributions (B, T, C) behind ``done`` codes; a point where a code (B, N) is kept, -1 where none is."""
    places = done[:, None] + torch.arange(p.shape[1], device=p.device)
    keep = kept.gather(1, places.clamp(max=kept.shape[1] - 1))
    return torch.where(keep[..., None] < 0, p, one_hot(keep.clamp(min=0), p.shape[-1]).to(p.dtype))


def accept(p: Tensor, q: Tensor, drafts: Tensor, numbers: Tensor) -> Tensor:
    """How many drafts from the left are accepted, (B,) in [0, W].

    Args:
        p: (B, W, C) the model's distribution at each draft.
        q: (B, W, C) what the draft was drawn from; above 0 at the draft.
        drafts: (B, W) codes.
        numbers: (B, W) uniform in [0, 1).
    """
    ratio = p.gather(-1, drafts[..., None]) / q.gather(-1, drafts[..., None])
    return (numbers < ratio[..., 0]).long().cumprod(dim=1).sum(dim=1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """(p − q)⁺ for p and q (B, C), not normalised: what a rejected draft is replaced from.

    Where it is 0 throughout, p is q, no draft is rejected but by rounding, and p itself is returned.
    """
    left = (p - q).clamp(min=0)
    return torch.where(left.sum(dim=-1, keepdim=True) > 0, left, p)


def _distribution(log_weights: Tensor, sampling: SamplingSettings) -> Tensor:
    """What a code is drawn from, (B, T, C) float64; a point where the most probable is taken."""
    if not sampling.do_sample:
        return one_hot(log_weights.argmax(dim=-1), log_weights.shape[-1]).double()
    return probabilities(log_weights.flatten(0, 1), sampling).view_as(log_weights)
