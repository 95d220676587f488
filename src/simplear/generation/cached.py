"""The `cached` engine: a KV cache, conditional and unconditional rows in one forward pass, logits over codes alone.

Prompts of different lengths are left-padded into one batch and prefilled once; each further step feeds one code a row.
Without guidance there are no unconditional rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from simplear.generation.engine import DrawRequest, Engine, round_up
from simplear.generation.sampling import Noise, draw
from simplear.language_model import LanguageModel
from simplear.sequence import left_pad


class CachedEngine(Engine):
    """Draws code by code with a cache.

    Args:
        model: on the device where it is to run, in evaluation mode.
        prompt_multiple: prompts are padded to a multiple of this many tokens. Batches of equally many images then
            mostly have one shape, at which a picture is the same, bit for bit, whatever else is in the batch.
    """

    name = "cached"

    def __init__(self, model: LanguageModel, prompt_multiple: int = 1) -> None:
        super().__init__(model)
        self.prompt_multiple = prompt_multiple

    @torch.inference_mode()
    def _draw(self, request: DrawRequest) -> tuple[Tensor, int]:
        model, images, offset = self.model, request.images, self.model.layout.image_token_offset
        device = next(model.parameters()).device
        prompts = [*request.prompt_ids, *request.negative_ids]
        width = round_up(max(map(len, prompts)), self.prompt_multiple)
        ids, mask = (part.to(device) for part in left_pad(prompts, model.layout, width))
        lengths = mask.sum(dim=1)
        position = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.decoder.config)
        noise = Noise(request.seeds, model.layout.codebook_size, device)
        codes = request.initial_codes(device)
        for place in range(request.count):
            positions = model.positions_at(position, lengths, request.grid)
            hidden = model.hidden_states(ids, positions, mask, cache)[:, -1]
            places = torch.full((images, 1), place, device=device)
            drawn = draw(model.image_logits(hidden)[:, None], images, request.sampling, noise, places)[:, 0]
            codes[:, place] = torch.where(codes[:, place] < 0, drawn, codes[:, place])
            request.show(codes, place + 1)
            ids = (codes[:, place, None] + offset).repeat(len(prompts) // images, 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position = (lengths + place)[:, None]
        return codes, request.count
