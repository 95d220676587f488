"""Generation against transformers' own generate and against a plain loop without cache, padding or shared passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from simplear.generation import CachedEngine, SamplingSettings, guide
from simplear.generation import cached as cached_module
from simplear.generation.sampling import invert_cumulative, probabilities, uniforms
from simplear.language_model import LanguageModel
from simplear.sequence import encode_captions, prompt_sequence
from toys import model_config

GRID = (3, 4)
CODES = GRID[0] * GRID[1]
PROMPTS = ["a photo of a red circle", "two blue squares", "a green cross left of a red triangle"]
SEEDS = [11, 12, 13]


def sharp_model(text_tokenizer: str, rope: str = "1d") -> tuple[LanguageModel, Any]:
    """Random weights in float64 with a head large enough that codes are far from equally likely."""
    torch.manual_seed(3)
    model, tokenizer = model_config(text_tokenizer, rope=rope).build()
    model = model.double().eval()
    with torch.no_grad():
        model.decoder.lm_head.weight.mul_(30)
        model.decoder.model.embed_tokens.weight.mul_(30)
    return model, tokenizer


def prompts_of(model: LanguageModel, tokenizer: Any, texts: list[str]) -> list[Tensor]:
    return [prompt_sequence(ids, model.layout) for ids in encode_captions(tokenizer, texts)]


class ImageIdsOnly(LogitsProcessor):
    """Comes after guidance, as the image head does."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, : self.offset] = -float("inf")
        return scores


def transformers_greedy(model: LanguageModel, prompt: Tensor, negative: Tensor, scale: float) -> Tensor:
    """transformers guides in log-probabilities over all ids. Those differ from ours by one constant a row, which no
    comparison among image ids sees, so the greedy codes are the same."""
    guidance = {} if scale == 1 else {"guidance_scale": scale, "negative_prompt_ids": negative[None]}
    ids = model.decoder.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        do_sample=False,
        max_new_tokens=CODES,
        logits_processor=LogitsProcessorList([ImageIdsOnly(model.layout.image_token_offset)]),
        eos_token_id=None,
        pad_token_id=0,
        **guidance,
    )
    return model.layout.codes_of_ids(ids[0, len(prompt) :]).view(GRID)


@torch.no_grad()
def plain_loop(model: LanguageModel, prompt: Tensor, negative: Tensor, sampling: SamplingSettings, seed: int) -> Tensor:
    """One image, two passes a code, the whole sequence and the whole vocabulary each time."""
    codes: list[int] = []
    for position in range(CODES):
        rows = []
        for start in (prompt, negative):
            drawn = torch.tensor(codes, dtype=torch.long) + model.layout.image_token_offset
            ids = torch.cat([start, drawn])[None]
            hidden = model.hidden_states(ids, model.training_positions(ids, GRID), torch.ones_like(ids))
            logits = hidden[0, -1] @ model.decoder.lm_head.weight.T
            rows.append(logits[model.layout.image_token_offset :].log_softmax(-1))
        weights = guide(rows[0], rows[1], sampling.guidance_scale)[None]
        if sampling.do_sample:
            number = uniforms([seed], [position])[0]
            codes.append(int(invert_cumulative(probabilities(weights, sampling), number)))
        else:
            codes.append(int(weights.argmax()))
    return torch.tensor(codes).view(GRID)


@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("negative", ["", "two blue squares"])
def test_greedy_equals_transformers(tiny_text_tokenizer: str, scale: float, negative: str) -> None:
    model, tokenizer = sharp_model(tiny_text_tokenizer)
    prompts, negatives = prompts_of(model, tokenizer, PROMPTS), prompts_of(model, tokenizer, [negative] * 3)
    sampling = SamplingSettings(guidance_scale=scale, do_sample=False)
    ragged, _ = CachedEngine(model).generate(prompts, negatives, GRID, sampling, SEEDS)
    assert len({len(prompt) for prompt in prompts}) > 1
    for row in range(3):
        expected = transformers_greedy(model, prompts[row], negatives[row], scale)
        single, _ = CachedEngine(model).generate([prompts[row]], [negatives[row]], GRID, sampling, [0])
        assert torch.equal(single[0], expected)
        assert torch.equal(ragged[row], expected)
    assert len(ragged.unique()) > 5


def test_greedy_equals_transformers_on_one_batch_of_equal_lengths(tiny_text_tokenizer: str) -> None:
    model, tokenizer = sharp_model(tiny_text_tokenizer)
    prompts = prompts_of(model, tokenizer, ["two blue squares", "two red squares"])
    assert len(prompts[0]) == len(prompts[1])
    codes, _ = CachedEngine(model).generate(prompts, prompts, GRID, SamplingSettings(do_sample=False), [0, 1])
    ids = model.decoder.generate(
        torch.stack(prompts),
        do_sample=False,
        max_new_tokens=CODES,
        logits_processor=LogitsProcessorList([ImageIdsOnly(model.layout.image_token_offset)]),
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(model.layout.codes_of_ids(ids[:, -CODES:]).view(2, *GRID), codes)


@pytest.mark.parametrize("rope", ["1d", "2d"])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(do_sample=False, guidance_scale=6.0),
        SamplingSettings(guidance_scale=1.0),
        SamplingSettings(guidance_scale=2.5, temperature=0.7, top_k=5),
        SamplingSettings(guidance_scale=0.0, top_p=0.8),
    ],
)
def test_codes_equal_a_plain_loop(tiny_text_tokenizer: str, rope: str, sampling: SamplingSettings) -> None:
    model, tokenizer = sharp_model(tiny_text_tokenizer, rope)
    prompts, negatives = prompts_of(model, tokenizer, PROMPTS), prompts_of(model, tokenizer, ["", "one star", ""])
    codes, stats = CachedEngine(model).generate(prompts, negatives, GRID, sampling, SEEDS)
    for row in range(3):
        assert torch.equal(codes[row], plain_loop(model, prompts[row], negatives[row], sampling, SEEDS[row]))
    assert (stats.images, stats.tokens, stats.steps) == (3, 3 * CODES, CODES)


def test_image_does_not_depend_on_its_companions(tiny_text_tokenizer: str) -> None:
    """Bit for bit in float32, at one padded shape: same width, same number of rows, other prompts."""
    model, tokenizer = sharp_model(tiny_text_tokenizer)
    model = model.float()
    first, second, third = prompts_of(model, tokenizer, ["a red circle", "two blue squares", "one star"])
    longest = prompts_of(model, tokenizer, ["a green cross left of a red triangle"])[0]
    negative = prompts_of(model, tokenizer, [""])[0]
    sampling = SamplingSettings(guidance_scale=2.0)
    engine = CachedEngine(model)
    one, _ = engine.generate([first, longest, second], [negative] * 3, GRID, sampling, [5, 6, 7])
    other, _ = engine.generate([first, longest, third], [negative] * 3, GRID, sampling, [5, 8, 9])
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


def test_parity_rejects_guidance_turned_round(tiny_text_tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = sharp_model(tiny_text_tokenizer)
    prompts, negatives = prompts_of(model, tokenizer, PROMPTS), prompts_of(model, tokenizer, [""] * 3)
    sampling = SamplingSettings(guidance_scale=6.0, do_sample=False)
    monkeypatch.setattr(cached_module, "guide", lambda c, u, scale: guide(u, c, scale))
    codes, _ = CachedEngine(model).generate(prompts, negatives, GRID, sampling, SEEDS)
    assert any(
        not torch.equal(codes[row], transformers_greedy(model, prompts[row], negatives[row], 6.0)) for row in range(3)
    )


def test_parity_rejects_positions_that_count_padding(tiny_text_tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions are relative, so only the step from prompt to image shows a shift; attention to padding does too."""
    model, tokenizer = sharp_model(tiny_text_tokenizer)
    prompts, negatives = prompts_of(model, tokenizer, PROMPTS), prompts_of(model, tokenizer, [""] * 3)
    sampling = SamplingSettings(do_sample=False)
    original = cached_module.left_pad

    def unmasked(*args: Any) -> tuple[Tensor, Tensor]:
        ids, mask = original(*args)
        return ids, torch.ones_like(mask)

    monkeypatch.setattr(cached_module, "left_pad", unmasked)
    codes, _ = CachedEngine(model).generate(prompts, negatives, GRID, sampling, SEEDS)
    assert any(
        not torch.equal(codes[row], transformers_greedy(model, prompts[row], negatives[row], 1.0)) for row in range(3)
    )
