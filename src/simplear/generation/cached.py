"""The `cached` engine: a KV cache, conditional and unconditional rows in one forward pass, logits over codes alone.

Ragged prompts stand left-padded in one batch, prefilled once, and an unconditional prompt that all images share is read
for one of them; every further step feeds one code a row. Without guidance the unconditional rows are left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from simplear.generation.engine import GenerationStats, RowCallback, all_equal, check_request, kept_codes, leading
from simplear.generation.sampling import Noise, SamplingSettings, draw
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
        negatives = list(negative_ids) if sampling.guidance_scale != 1.0 else []
        device = next(model.parameters()).device
        codes = kept_codes(given, images, count, device)
        first = leading(given)
        shared = all_equal(negatives) and first == 0
        ids, mask = (
            part.to(device) for part in left_pad([*prompt_ids, *(negatives[:1] if shared else negatives)], model.layout)
        )
        lengths = mask.sum(dim=1)
        if first:
            kept = codes[:, :first].repeat(len(ids) // images, 1) + model.layout.image_token_offset
            ids, mask = torch.cat([ids, kept], dim=1), torch.cat([mask, mask.new_ones(kept.shape)], dim=1)
        position = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.decoder.config)
        hidden = model.hidden_states(ids, model.positions_at(position, lengths, grid), mask, cache)[:, -1]
        if shared:
            rows = torch.tensor([*range(images), *[images] * images], device=device)
            cache.batch_select_indices(rows)
            hidden, mask, lengths = hidden[rows], mask[rows], lengths[rows]
        noise = Noise(seeds, model.layout.codebook_size, device)
        places = torch.arange(count, device=device).expand(images, -1)
        for row in range(1, first // width + 1):
            if on_row is not None:
                on_row(row, codes[:, : row * width])
        for step in range(first, count):
            if step > first:
                ids = (codes[:, step - 1, None] + model.layout.image_token_offset).repeat(len(lengths) // images, 1)
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                position = model.positions_at((lengths + step - 1)[:, None], lengths, grid)
                hidden = model.hidden_states(ids, position, mask, cache)[:, -1]
            logits = model.image_logits(hidden)[:, None]
            drawn = draw(logits, images, sampling, noise, places[:, step : step + 1])[:, 0]
            codes[:, step] = torch.where(codes[:, step] < 0, drawn, codes[:, step])
            if on_row is not None and (step + 1) % width == 0:
                on_row((step + 1) // width, codes[:, : step + 1])
        stats = GenerationStats("cached", images, images * (count - first), count - first, time.perf_counter() - begin)
        return codes.view(images, height, width), stats
