"""Tiny language models whose greedy codes are not all the same, and a plain way to draw from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simplear.generation import SamplingSettings
from simplear.language_model import LanguageModel, LanguageModelConfig
from simplear.sequence import TokenLayout, prompt_sequence

CODEBOOK = 50
LAYOUT = TokenLayout(text_to_image_id=1, start_of_image_id=2, image_token_offset=40, codebook_size=CODEBOOK)
MAX_POSITIONS = 48
ARCHITECTURE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
    # Far above the usual 0.02: every code then depends visibly on the prompt and on the codes before it.
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
}


def language_model(rope: str = "1d", dtype: torch.dtype = torch.float64) -> LanguageModel:
    """The same random weights at each call."""
    torch.manual_seed(0)
    config = LanguageModelConfig("", CODEBOOK, architecture=ARCHITECTURE, rope=rope)  # type: ignore[arg-type]
    return LanguageModel(config.random_decoder(LAYOUT.vocab_size).eval().to(dtype), LAYOUT)


def prompts(*lengths: int, seed: int = 1) -> list[Tensor]:
    """Captions of random text ids of these lengths, as prompts."""
    generator = torch.Generator().manual_seed(seed)
    return [
        prompt_sequence(torch.randint(3, LAYOUT.image_token_offset, (length,), generator=generator).tolist(), LAYOUT)
        for length in lengths
    ]


@torch.no_grad()
def draw_plainly(
    model: LanguageModel, prompt: Tensor, negative: Tensor, grid: tuple[int, int], settings: SamplingSettings, seed: int
) -> Tensor:
    """Codes (h, w) by running the whole sequence again for every code: no cache, batch, padding or image head."""
    codes: list[int] = []
    for place in range(grid[0] * grid[1]):
        log_weights = []
        for text in (prompt, negative):
            sequence = [*text.tolist(), *(model.layout.image_token_offset + code for code in codes)]
            rows = [*range(len(text)), *(len(text) + index // grid[1] for index in range(len(codes)))]
            columns = [*range(len(text)), *(len(text) + index % grid[1] for index in range(len(codes)))]
            flat = torch.arange(len(sequence))[None]
            positions = torch.tensor([[rows], [columns]]) if model.rope == "2d" else flat
            logits = model.decoder(input_ids=torch.tensor([sequence]), position_ids=positions).logits[0, -1]
            log_weights.append(logits[model.layout.image_token_offset :].log_softmax(dim=-1))
        guided = (1 - settings.guidance_scale) * log_weights[1] + settings.guidance_scale * log_weights[0]
        if not settings.do_sample:
            codes.append(int(guided.argmax()))
            continue
        weights = distribution(guided.tolist(), settings)
        codes.append(max(range(len(weights)), key=lambda code: weights[code] / exponential(seed, place, code)))
    return torch.tensor(codes).view(grid)


def exponential(seed: int, place: int, code: int) -> float:
    """The number of one code in the race, in Python's unbounded integers."""
    state = mix(mix(seed % 2**64) ^ place)
    return -math.log(((mix((state + code * 0x9E3779B97F4A7C15) % 2**64) >> 12) + 0.5) / 2**52)


def mix(word: int) -> int:
    """SplitMix64's increment and finaliser."""
    word = (word + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def distribution(log_weights: list[float], settings: SamplingSettings) -> list[float]:
    """Probabilities after temperature, top-k and top-p, with Python's own numbers and no ties in mind."""
    weights = torch.tensor(log_weights, dtype=torch.float64).div(settings.temperature).exp().tolist()
    ranked = sorted(range(len(weights)), key=lambda code: -weights[code])[: settings.top_k]
    total, reached, kept = sum(weights[code] for code in ranked), 0.0, []
    for code in ranked:
        if reached >= (settings.top_p or 1.0):
            break
        kept.append(code)
        reached += weights[code] / total
    total = sum(weights[code] for code in kept)
    return [weights[code] / total if code in kept else 0.0 for code in range(len(weights))]
