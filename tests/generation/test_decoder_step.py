"""The fast engines' forward pass against transformers', row by row, at lengths that differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from generation.models import ARCHITECTURE, CODEBOOK, LAYOUT, language_model, prompts
from simplear.generation.decoder_step import DecoderStep, PreparedStep, Rows
from simplear.language_model import LanguageModel, LanguageModelConfig

GRID = (3, 4)
NO_CODES = torch.zeros(3, 0, dtype=torch.long)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Of the difference, relative to the logits. Norms compute in float32, so float64 does not agree to more."""


def prefilled(model: LanguageModel, asked: list[Tensor]) -> Rows:
    return PreparedStep(model, compiled=False).prefill(asked, [], NO_CODES[: len(asked)], GRID, 20)


@torch.no_grad()
@pytest.mark.parametrize("rope", ["1d", "2d"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("key_heads", [1, 2])
def test_logits_are_those_of_transformers(rope: str, dtype: torch.dtype, key_heads: int) -> None:
    torch.manual_seed(0)
    architecture = {**ARCHITECTURE, "num_key_value_heads": key_heads}
    config = LanguageModelConfig("", CODEBOOK, architecture=architecture, rope=rope)  # type: ignore[arg-type]
    decoder = config.random_decoder(LAYOUT.vocab_size).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # norms and biases too, which begin at 1 and 0
    model = LanguageModel(decoder.to(dtype), LAYOUT)
    asked, codes, done = prompts(2, 9, 0), torch.randint(CODEBOOK, (3, 12)), torch.tensor([5, 1, 7])
    rows = prefilled(model, asked)
    rows.logits(codes, torch.ones_like(done), 7)
    found = rows.logits(codes, done, 4)
    for row, prompt in enumerate(asked):
        ids = torch.cat([prompt, codes[row, : done[row] + 4] + LAYOUT.image_token_offset])[None]
        position = model.positions_at(torch.arange(ids.shape[1])[None], torch.tensor([len(prompt)]), GRID)
        expected = model.image_logits(model.hidden_states(ids, position, None))[0, -5:]
        assert (found[row] - expected).norm() < TOLERANCE[dtype] * expected.norm()


@torch.no_grad()
def test_rejected_tokens_leave_no_trace() -> None:
    """Drafts are read behind the final codes; read again with others, the first leave nothing behind."""
    model, done = language_model(), torch.tensor([3, 1])
    first, second = torch.randint(CODEBOOK, (2, 2, 12))
    second[0, :3], second[1, :1] = first[0, :3], first[1, :1]
    rows = prefilled(model, prompts(4, 1))
    for before, behind in ((torch.ones_like(done), 3), (done, 8)):
        rows.logits(first, before, behind)
    again = rows.logits(second, done, 6)
    fresh = prefilled(model, prompts(4, 1))
    fresh.logits(second, torch.ones_like(done), 3)
    torch.testing.assert_close(again, fresh.logits(second, done, 6))


@torch.no_grad()
@pytest.mark.parametrize("rope", ["1d", "2d"])
def test_an_unconditional_prompt_of_all_images_is_read_once(rope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = language_model(rope), prompts(2, 9, 0)
    hidden, read = DecoderStep.hidden, []

    def counted(self, ids, *rest):
        read.append(tuple(ids.shape))
        return hidden(self, ids, *rest)

    monkeypatch.setattr(DecoderStep, "hidden", counted)
    same, others = prompts(4, seed=2) * 3, prompts(4, seed=2) * 2 + prompts(4, seed=3)
    rows = [PreparedStep(model, False).prefill(asked, negatives, NO_CODES, GRID, 12) for negatives in (same, others)]
    assert read == [(4, 11), (6, 11)]
    codes, done = torch.randint(CODEBOOK, (3, 12)), torch.tensor([1, 5, 3])
    for row in rows:
        row.logits(codes, torch.ones_like(done), 5)
    torch.testing.assert_close(rows[0].first_logits[:-1], rows[1].first_logits[:-1])
    torch.testing.assert_close(rows[0].logits(codes, done, 3)[:-1], rows[1].logits(codes, done, 3)[:-1])


@torch.no_grad()
@pytest.mark.parametrize("rope", ["1d", "2d"])
def test_codes_read_with_the_prompts_are_as_if_fed_one_by_one(rope: str) -> None:
    model, asked, codes = language_model(rope), prompts(2, 9), torch.randint(CODEBOOK, (2, 12))
    rows = prefilled(model, asked)
    rows.logits(codes, torch.ones(2, dtype=torch.long), 3)
    at_once = PreparedStep(model, False).prefill(asked, [], codes[:, :5], GRID, 12)
    torch.testing.assert_close(rows.logits(codes, torch.full((2,), 5), 0)[:, 0], at_once.first_logits)


@torch.no_grad()
def test_weights_that_were_trained_are_taken_anew() -> None:
    model, asked = language_model(), prompts(3)
    step = PreparedStep(model, False)
    before = step.prefill(asked, [], NO_CODES[:1], GRID, 12)
    assert step.prefill(asked, [], NO_CODES[:1], GRID, 12).forward is before.forward
    model.decoder.model.layers[0].mlp.up_proj.weight.mul_(2)
    after = step.prefill(asked, [], NO_CODES[:1], GRID, 12)
    assert not torch.allclose(after.first_logits, before.first_logits)
    torch.testing.assert_close(after.first_logits, prefilled(model, asked).first_logits)
