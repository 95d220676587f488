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

from simplear.generation.engine import (
    GenerationStats,
    RowCallback,
    check_request,
    draw_in_order,
    kept_codes,
    leading,
    prompt_width,
    read_once,
    require_multiple,
)
from simplear.generation.sampling import Noise, SamplingSettings, draw
from simplear.language_model import LanguageModel
from simplear.sequence import left_pad


class CachedEngine:
    """Draws code by code with a cache.

    Args:
        model: on the device where it is to run, in evaluation mode.
        prompt_multiple: prompts are padded to a multiple of so many tokens. Then batches of as many images mostly have
            one shape, at which a picture is the same, bit for bit, whatever else is in the batch.
    """

    def __init__(self, model: LanguageModel, prompt_multiple: int = 1) -> None:
        self.model, self.prompt_multiple = model, require_multiple(prompt_multiple)

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
        asked, order = read_once(prompt_ids, negatives, first)
        width_read = prompt_width(asked, self.prompt_multiple)
        ids, mask = (part.to(device) for part in left_pad(asked, model.layout, width_read))
        lengths = mask.sum(dim=1)
        if first:
            kept = codes[:, :first].repeat(len(ids) // images, 1) + model.layout.image_token_offset
            ids, mask = torch.cat([ids, kept], dim=1), torch.cat([mask, mask.new_ones(kept.shape)], dim=1)
        position = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.decoder.config)
        hidden = model.hidden_states(ids, model.positions_at(position, lengths, grid), mask, cache)[:, -1]
        if len(order) > len(asked):
            rows = torch.tensor(order, device=device)
            cache.batch_select_indices(rows)
            hidden, mask, lengths = hidden[rows], mask[rows], lengths[rows]
        noise = Noise(seeds, model.layout.codebook_size, device)
        places = torch.arange(count, device=device).expand(images, -1)

        def next_codes(place: int) -> Tensor:
            nonlocal hidden, mask
            if place > first:
                ids = (codes[:, place - 1, None] + model.layout.image_token_offset).repeat(len(lengths) // images, 1)
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                position = model.positions_at((lengths + place - 1)[:, None], lengths, grid)
                hidden = model.hidden_states(ids, position, mask, cache)[:, -1]
            logits = model.image_logits(hidden)[:, None]
            return draw(logits, images, sampling, noise, places[:, place : place + 1])[:, 0]

        draw_in_order(codes, first, width, next_codes, on_row)
        stats = GenerationStats("cached", images, images * (count - first), count - first, time.perf_counter() - begin)
        return codes.view(images, height, width), stats
