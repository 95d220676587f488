"""The `jacobi` engine: speculative Jacobi decoding with a KV cache that draws, seed by seed, what `cached` draws.

Behind the codes that are final, W more stand as drafts. One forward pass gives the model's distribution at all of them
and at the place after them, and each place draws its code with its own random numbers, the same in every pass
(`sampling.Noise`). From left to right, a draft that equals what was drawn had the right context behind it, so the place
after it has the right distribution: codes are final up to and with the first that differs, and what was drawn behind
it are the next drafts. So each pass makes 1 to W + 1 codes final, and they are those that drawing one by one gives.

Fixing the randomness makes drawing a fixed-point problem, which Jacobi's iteration solves (Song et al. 2021, arXiv
2002.03629; for sampling, Wiggers and Hoogeboom 2020, arXiv 2002.09928). Speculative Jacobi decoding (Teng et al. 2024,
arXiv 2410.01699) accepts a draft at random and replaces a rejected one by a draw from a residual: as often accepted,
but what a seed draws then depends on W.

Places that were in no pass yet copy a neighbour. Images advance at their own pace, in a cache whose rows have lengths
of their own.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from simplear.errors import UserError
from simplear.generation.decoder_step import PreparedStep
from simplear.generation.engine import GenerationStats, RowCallback, check_request, kept_codes, leading
from simplear.generation.sampling import Noise, SamplingSettings, draw
from simplear.generation.window import WINDOWS, WindowChoice
from simplear.language_model import LanguageModel

Proposal = Literal["left", "upper"]


class JacobiEngine:
    """Draws several codes a pass where the model is sure of them.

    Args:
        model: on the device where it is to run, in evaluation mode.
        window: W, drafts in each pass; 0 draws code by code. None chooses one before each pass, by what passes took and
            how many drafts were right so far in this engine; it changes no code, but by rounding.
        proposal: of places that were in no pass yet: their left or upper neighbour's code.
        compiled: run the step under `torch.compile`, as the compiled engine does, once for each window.
        on_pass: called after each pass with how many codes of each image are final, to see where drafts were right: of
            those that a pass makes final, all but the last were drafts.
    """

    def __init__(
        self,
        model: LanguageModel,
        window: int | None = None,
        proposal: Proposal = "left",
        compiled: bool = False,
        on_pass: Callable[[list[int]], None] | None = None,
    ) -> None:
        if window is not None and window < 0:
            raise UserError(f"window {window} must be 0 or more; None chooses one.")
        self.model, self.window, self.proposal, self.on_pass = model, window, proposal, on_pass
        self._choices: defaultdict[int, WindowChoice] = defaultdict(WindowChoice)  # by number of rows
        self._step = PreparedStep(model, compiled)
        self._settle, self._propose = self._step.prepare(settle), self._step.prepare(propose)

    @property
    def tokens_a_pass(self) -> int:
        """Of a row, at most."""
        return 1 + (max(WINDOWS) if self.window is None else self.window)

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
        count, first = height * width, leading(given)
        widest = self.tokens_a_pass - 1
        negatives = list(negative_ids) if sampling.guidance_scale != 1.0 else []
        device = next(self.model.parameters()).device
        kept = pad(kept_codes(given, images, count, device), (0, widest + 1), value=-1)
        rows = self._step.prefill(prompt_ids, negatives, kept[:, :first], grid, kept.shape[1])
        choice = self._choices[len(rows.lengths)]
        noise = Noise(seeds, self.model.layout.codebook_size, device)
        done = torch.full((images,), first, device=device)  # codes that are final
        canvas = kept.clamp(min=0)  # these, and the drafts behind
        seen = done  # where places begin that were in no pass
        logits, window, passes, progress = rows.first_logits[:, None], 0, 0, [0] * images
        pass_began = begin
        while True:
            done, seen = self._settle(logits, images, sampling, noise, canvas, kept, done, seen, count)
            before, progress, passes = progress, done.tolist(), passes + 1
            if self.on_pass is not None:
                self.on_pass(progress)
            if passes > 1 and self.window is None:
                seconds = time.perf_counter() - pass_began
                choice.observe(window, seconds, min(progress) - min(before))
            for row in range(min(before) // width + 1, min(progress) // width + 1):
                if on_row is not None:
                    on_row(row, canvas[:, : row * width])
            if min(progress) == count:
                break
            pass_began = time.perf_counter()
            window = choice.best() if self.window is None else self.window
            if window:
                self._propose(canvas, kept, done, seen, window, width, self.proposal)
            logits = rows.logits(canvas, done, window)
        stats = GenerationStats("jacobi", images, images * (count - first), passes, time.perf_counter() - begin)
        return canvas[:, :count].view(images, height, width), stats


def settle(
    logits: Tensor,
    images: int,
    sampling: SamplingSettings,
    noise: Noise,
    canvas: Tensor,
    kept: Tensor,
    done: Tensor,
    seen: Tensor,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Draw at the places behind ``done``, onto the canvas; the new ``done`` and ``seen``, both (B,).

    Args:
        logits: (R, W + 1, codebook_size) at these places.
        images: B.
        sampling: how a code is drawn.
        noise: of the images.
        canvas: (B, at least N + W) codes that are final and drafts.
        kept: (B, the same) codes that are given, or -1.
        done: (B,) codes that are final.
        seen: (B,) where places begin that were in no pass.
        count: N.
    """
    places = done[:, None] + torch.arange(logits.shape[1], device=done.device)
    given = kept.gather(1, places)
    drawn = torch.where(given < 0, draw(logits, images, sampling, noise, places), given)
    done = (done + accept(drawn, canvas.gather(1, places))).clamp(max=count)
    canvas.scatter_(1, places, drawn)
    return done, torch.maximum(seen, places[:, -1] + 1)


def propose(
    canvas: Tensor, kept: Tensor, done: Tensor, seen: Tensor, window: int, width: int, proposal: Proposal
) -> None:
    """Fill in place the drafts behind ``done`` of which the model has said nothing yet, and none that is kept.

    Arguments as for `settle`; a row of the picture has ``width`` codes.
    """
    places = done[:, None] + torch.arange(window, device=done.device)
    last = seen[:, None] - 1
    source = last.expand_as(places)
    if proposal == "upper":
        # As many rows up as lead to a place that was in a pass; in the first row there is none.
        above = places - (places - last + width - 1).div(width, rounding_mode="floor") * width
        source = torch.where(above < 0, source, above)
    fresh = (places > last) & (kept.gather(1, places) < 0)
    canvas.scatter_(1, places, torch.where(fresh, canvas.gather(1, source), canvas.gather(1, places)))


def accept(drawn: Tensor, drafts: Tensor) -> Tensor:
    """How many codes from the left are final, (B,): those drawn from a context that is, 1 or more.

    Args:
        drawn: (B, W + 1) codes.
        drafts: (B, W + 1) what stood in their places; the last is not read.
    """
    return 1 + (drawn == drafts)[:, :-1].long().cumprod(dim=1).sum(dim=1)
