"""The `cached` engine: a KV cache, conditional and unconditional rows in one forward pass, logits over codes alone.

Ragged prompts stand left-padded in one batch, prefilled once; every further step feeds one code a row. Without
guidance the unconditional rows are left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from simplear.generation.engine import GenerationStats, RowCallback, check_request, kept_codes, leading
from simplear.generation.guidance import guide, log_probabilities
from simplear.generation.sampling import SamplingSettings, choose, uniforms
from simplear.language_model import LanguageModel
from simplear.sequence import left_pad


class CachedEngine:
    """Draws code by code with a cache.

    Args:
        model: on the device where it is to run, in evaluation mode.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

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
        images, count = len(prompt_ids), height * width
        guided = sampling.guidance_scale != 1.0
        device = next(model.parameters()).device
        ids, mask = left_pad([*prompt_ids, *(negative_ids if guided else [])], model.layout)
        ids, mask = ids.to(device), mask.to(device)
        lengths = mask.sum(dim=1)
        position = (mask.cumsum(dim=1) - 1).clamp(min=0)
        uniform = uniforms(seeds, range(count)).to(device) if sampling.do_sample else None
        cache = DynamicCache(config=model.decoder.config)
        codes = kept_codes(given, images, count, device)
        if first := leading(given):
            kept = codes[:, :first].repeat(len(ids) // images, 1) + model.layout.image_token_offset
            ids, mask = torch.cat([ids, kept], dim=1), torch.cat([mask, mask.new_ones(kept.shape)], dim=1)
            position = (mask.cumsum(dim=1) - 1).clamp(min=0)
            for row in range(1, first // width + 1):
                if on_row is not None:
                    on_row(row, codes[:, : row * width])
        for step in range(first, count):
            hidden = model.hidden_states(ids, model.positions_at(position, lengths, grid), mask, cache)
            log_weights = log_probabilities(model.image_logits(hidden[:, -1]))
            if guided:
                log_weights = guide(log_weights[:images], log_weights[images:], sampling.guidance_scale)
            drawn = choose(log_weights, sampling, None if uniform is None else uniform[:, step])
            codes[:, step] = torch.where(codes[:, step] < 0, drawn, codes[:, step])
            ids = (codes[:, step, None] + model.layout.image_token_offset).repeat(len(ids) // images, 1)
            position = (lengths + step)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            if on_row is not None and (step + 1) % width == 0:
                on_row((step + 1) // width, codes[:, : step + 1])
        stats = GenerationStats("cached", images, images * (count - first), count - first, time.perf_counter() - begin)
        return codes.view(images, height, width), stats
