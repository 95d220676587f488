"""The `compiled` engine: one step of fixed shape under `torch.compile`, and nothing that waits for the device.

The prompts are prefilled once, as they are; from then on each step feeds one code a row, attends to a cache of fixed
size through a mask, and draws on the device, so that a GPU replays one CUDA graph a code. The first request of a shape
(number of rows, and size of the cache) compiles, which takes seconds to a minute, and so does the first after a change
of the weights: for serving and many prompts, not for pictures during training.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from simplear.generation.decoder_step import PreparedStep
from simplear.generation.engine import GenerationStats, RowCallback, check_request, draw_in_order, kept_codes, leading
from simplear.generation.sampling import Noise, SamplingSettings, draw
from simplear.language_model import LanguageModel


class CompiledEngine:
    """Draws code by code with a compiled step.

    Args:
        model: on the device where it is to run, in evaluation mode.
        prompt_multiple: prompts are padded to a multiple of so many tokens. Then batches of as many images mostly have
            one shape, at which a picture is the same, bit for bit, whatever else is in the batch.
    """

    def __init__(self, model: LanguageModel, prompt_multiple: int = 1) -> None:
        self.model = model
        self._step = PreparedStep(model, compiled=True, prompt_multiple=prompt_multiple)
        self._draw = self._step.prepare(draw)

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
        model, (height, width) = self.model, grid
        check_request(model, prompt_ids, negative_ids, grid, seeds, given)
        begin = time.perf_counter()
        images, count, first = len(prompt_ids), height * width, leading(given)
        negatives = list(negative_ids) if sampling.guidance_scale != 1.0 else []
        device = next(model.parameters()).device
        codes = kept_codes(given, images, count, device)
        rows = self._step.prefill(prompt_ids, negatives, codes[:, :first], grid, count)
        noise = Noise(seeds, model.layout.codebook_size, device)
        places = torch.arange(count, device=device).expand(images, -1)

        def next_codes(place: int) -> Tensor:
            here = places[:, place : place + 1]
            logits = rows.logits(codes, here[:, 0], 0) if place > first else rows.first_logits[:, None]
            return self._draw(logits, images, sampling, noise, here)[:, 0]

        draw_in_order(codes, first, width, next_codes, on_row)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # once, for the seconds
        stats = GenerationStats(
            "compiled", images, images * (count - first), count - first, time.perf_counter() - begin
        )
        return codes.view(images, height, width), stats
