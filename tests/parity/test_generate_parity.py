"""Greedy codes equal those of transformers' own generate, restricted to image ids, token for token in float64.

transformers guides log-probabilities over the whole vocabulary, this project over image ids alone. The two differ by a
constant a row: log-softmax over a subset subtracts the log of the subset's mass, from the conditional and from the
unconditional row. So among image ids the most probable one is the same.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from generation.models import LAYOUT, language_model, prompts
from simplear.generation import CachedEngine, SamplingSettings
from simplear.sequence import left_pad

GRID = (4, 4)
PROMPTS = prompts(3, 10, 0, 6)
NEGATIVES = prompts(5, 1, 8, 0, seed=2)
IMAGE_IDS = list(range(LAYOUT.image_token_offset, LAYOUT.vocab_size))


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> PreTrainedModel:
    """The same weights, read from disk by transformers alone."""
    directory = tmp_path_factory.mktemp("decoder")
    language_model().decoder.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)


def transformers_codes(stock: PreTrainedModel, asked: list[Tensor], negatives: list[Tensor], scale: float) -> Tensor:
    ids, mask = left_pad(asked, LAYOUT)
    negative_ids, negative_mask = left_pad(negatives, LAYOUT)
    generated = stock.generate(
        ids,
        attention_mask=mask,
        guidance_scale=scale,
        negative_prompt_ids=negative_ids,
        negative_prompt_attention_mask=negative_mask,
        prefix_allowed_tokens_fn=lambda row, so_far: IMAGE_IDS,
        do_sample=False,
        max_new_tokens=GRID[0] * GRID[1],
        pad_token_id=LAYOUT.padding_id,
    )
    return LAYOUT.codes_of_ids(generated[:, ids.shape[1] :]).view(-1, *GRID)


def our_codes(asked: list[Tensor], negatives: list[Tensor], scale: float) -> Tensor:
    settings = SamplingSettings(do_sample=False, guidance_scale=scale)
    return CachedEngine(language_model()).generate(asked, negatives, GRID, settings, [0] * len(asked))[0]


@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("row", range(len(PROMPTS)))
def test_batch_of_one(stock, scale, row):
    asked, negatives = PROMPTS[row : row + 1], NEGATIVES[row : row + 1]
    assert torch.equal(our_codes(asked, negatives, scale), transformers_codes(stock, asked, negatives, scale))


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_ragged_batch(stock, scale):
    """Against transformers row by row, and against its own left-padded batch.

    In that batch transformers counts the positions of padded negative prompts from the padding on; rotary positions
    being relative, that changes float64 results by rounding alone.
    """
    ours = our_codes(PROMPTS, NEGATIVES, scale)
    alone = [transformers_codes(stock, [p], [n], scale)[0] for p, n in zip(PROMPTS, NEGATIVES, strict=True)]
    assert torch.equal(ours, torch.stack(alone))
    assert torch.equal(ours, transformers_codes(stock, PROMPTS, NEGATIVES, scale))


def test_guidance_changes_the_codes():
    """Or else the comparison at scale 6 would show nothing."""
    assert not torch.equal(our_codes(PROMPTS, NEGATIVES, 1.0), our_codes(PROMPTS, NEGATIVES, 6.0))
