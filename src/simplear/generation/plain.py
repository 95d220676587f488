"""The two engines that everyone writes first: oracles of the others, and what their speed is compared with.

They draw image by image and row by row: the conditional sequence goes through the model, then the unconditional one,
and the head gives logits for the whole vocabulary, of which only the codes' are used. `BaselineEngine` runs the whole
sequence again for each code; `KVCacheEngine` keeps keys and values, as the code released with the paper does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from simplear.generation.engine import DrawRequest, Engine
from simplear.generation.guidance import guide, log_probabilities
from simplear.generation.sampling import Noise, choose
from simplear.language_model import LanguageModel


class BaselineEngine(Engine):
    """Draws without a cache; row 1 of the paper's Table 5."""

    name = "baseline"
    has_cache = False

    @torch.inference_mode()
    def _draw(self, request: DrawRequest) -> tuple[Tensor, int]:
        device = next(self.model.parameters()).device
        codes = request.initial_codes(device)
        rows = [request.prompt_ids, request.negative_ids] if request.negative_ids else [request.prompt_ids]
        sequences = [
            [_Sequence(self.model, ids, request.grid, self.has_cache) for ids in of_image]
            for of_image in zip(*rows, strict=True)
        ]
        noises = [Noise([seed], self.model.layout.codebook_size, device) for seed in request.seeds]
        for step in range(request.count):
            place = torch.full((1, 1), step, device=device)
            for image, (conditional, *unconditional) in enumerate(sequences):
                log_weights = conditional.log_probabilities()
                for other in unconditional:
                    log_weights = guide(log_weights, other.log_probabilities(), request.sampling.guidance_scale)
                drawn = choose(log_weights[None], request.sampling, noises[image], place)[0, 0]
                codes[image, step] = torch.where(codes[image, step] < 0, drawn, codes[image, step])
                for sequence in (conditional, *unconditional):
                    sequence.append(codes[image, step : step + 1])
            request.show(codes, step + 1)
        return codes, request.images * request.count * len(rows)


class KVCacheEngine(BaselineEngine):
    """The same with a cache; row 2 of the paper's Table 5."""

    name = "kv-cache"
    has_cache = True


class _Sequence:
    """One growing sequence of one image."""

    def __init__(self, model: LanguageModel, prompt: Tensor, grid: tuple[int, int], has_cache: bool) -> None:
        self.model, self.grid = model, grid
        self.ids = prompt.to(next(model.parameters()).device)[None]
        self.prompt_length = torch.tensor([len(prompt)], device=self.ids.device)
        self.cache = DynamicCache(config=model.decoder.config) if has_cache else None
        self.cached_tokens = 0

    def log_probabilities(self) -> Tensor:
        """Of the next code, (1, codebook_size), in float32 or wider."""
        ids = self.ids[:, self.cached_tokens :]
        position = torch.arange(self.cached_tokens, self.ids.shape[1], device=ids.device)[None]
        position = self.model.positions_at(position, self.prompt_length, self.grid)
        hidden = self.model.hidden_states(ids, position, None, self.cache)
        self.cached_tokens = 0 if self.cache is None else self.ids.shape[1]
        layout = self.model.layout
        logits = self.model.decoder.lm_head(hidden[:, -1])[:, layout.image_token_offset : layout.vocab_size]
        return log_probabilities(logits)

    def append(self, code: Tensor) -> None:
        """Add one code, shape (1,)."""
        self.ids = torch.cat([self.ids, code[None] + self.model.layout.image_token_offset], dim=1)
