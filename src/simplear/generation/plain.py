"""The two engines that everyone writes first, kept as oracles and as what the others are measured against.

Image by image and row by row: the conditional sequence goes through the model, then the unconditional one, and the head
gives logits for the whole vocabulary, of which all but the codes' are dropped. `BaselineEngine` runs the whole sequence
again for each code; `KVCacheEngine` keeps keys and values, as the code released with the paper does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from simplear.generation.engine import GenerationStats, RowCallback, check_request, kept_codes
from simplear.generation.guidance import guide, log_probabilities
from simplear.generation.sampling import Noise, SamplingSettings, choose
from simplear.language_model import LanguageModel


class _Sequence:
    """One growing sequence of one image."""

    def __init__(self, model: LanguageModel, prompt: Tensor, grid: tuple[int, int], cached: bool) -> None:
        device = next(model.parameters()).device
        self.model, self.grid = model, grid
        self.ids = prompt.to(device)[None]
        self.length = torch.tensor([len(prompt)], device=device)
        self.cache = DynamicCache(config=model.decoder.config) if cached else None
        self.seen = 0

    def log_probabilities(self) -> Tensor:
        """Of the next code, (1, codebook_size), in float32 or wider."""
        ids = self.ids[:, self.seen :]
        position = torch.arange(self.seen, self.ids.shape[1], device=ids.device)[None]
        position = self.model.positions_at(position, self.length, self.grid)
        hidden = self.model.hidden_states(ids, position, None, self.cache)
        self.seen = 0 if self.cache is None else self.ids.shape[1]
        layout = self.model.layout
        logits = self.model.decoder.lm_head(hidden[:, -1])[:, layout.image_token_offset : layout.vocab_size]
        return log_probabilities(logits)

    def append(self, code: Tensor) -> None:
        """One code, shape (1,)."""
        self.ids = torch.cat([self.ids, code[None] + self.model.layout.image_token_offset], dim=1)


class BaselineEngine:
    """Draws without a cache; row 1 of the paper's Table 5.

    Args:
        model: on the device where it is to run, in evaluation mode.
    """

    name = "baseline"
    cached = False

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
        check_request(self.model, prompt_ids, negative_ids, grid, seeds, given)
        begin = time.perf_counter()
        images, (height, width) = len(prompt_ids), grid
        guided = sampling.guidance_scale != 1.0
        device = next(self.model.parameters()).device
        rows = [[_Sequence(self.model, ids, grid, self.cached) for ids in prompt_ids]]
        rows += [[_Sequence(self.model, ids, grid, self.cached) for ids in negative_ids]] if guided else []
        noises = [Noise([seed], self.model.layout.codebook_size, device) for seed in seeds]
        codes = kept_codes(given, images, height * width, device)
        for step in range(height * width):
            place = torch.full((1, 1), step, device=device)
            for image, sequences in enumerate(zip(*rows, strict=True)):
                log_weights = sequences[0].log_probabilities()
                if guided:
                    log_weights = guide(log_weights, sequences[1].log_probabilities(), sampling.guidance_scale)
                drawn = choose(log_weights[None], sampling, noises[image], place)[0, 0]
                codes[image, step] = torch.where(codes[image, step] < 0, drawn, codes[image, step])
                for sequence in sequences:
                    sequence.append(codes[image, step : step + 1])
            if on_row is not None and (step + 1) % width == 0:
                on_row((step + 1) // width, codes[:, : step + 1])
        passes = images * height * width * len(rows)
        stats = GenerationStats(self.name, images, images * height * width, passes, time.perf_counter() - begin)
        return codes.view(images, height, width), stats


class KVCacheEngine(BaselineEngine):
    """The same with a cache; row 2 of the paper's Table 5."""

    name = "kv-cache"
    cached = True
