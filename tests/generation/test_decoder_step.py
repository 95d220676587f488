"""The fast engines' forward pass against transformers', row by row, at lengths that differ."""

from __future__ import annotations

import pytest
import torch

from generation.models import ARCHITECTURE, CODEBOOK, LAYOUT, language_model, prompts
from simplear.generation.decoder_step import DecoderStep, Rows
from simplear.language_model import LanguageModel, LanguageModelConfig

GRID = (3, 4)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Of the difference, relative to the logits. Norms compute in float32, so float64 does not agree to more."""


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
    asked, codes, done = prompts(2, 9, 0), torch.randint(CODEBOOK, (3, 12)), torch.tensor([5, 0, 7])
    rows = Rows(model, DecoderStep(model), asked, GRID, 12)
    rows.drafted(codes, torch.zeros_like(done), 7)
    found = rows.drafted(codes, done, 4)
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
    rows = Rows(model, DecoderStep(model), prompts(4, 1), GRID, 12)
    for nothing, behind in ((torch.zeros_like(done), 3), (done, 8)):
        rows.drafted(first, nothing, behind)
    again = rows.drafted(second, done, 6)
    fresh = Rows(model, DecoderStep(model), prompts(4, 1), GRID, 12)
    fresh.drafted(second, torch.zeros_like(done), 3)
    torch.testing.assert_close(again, fresh.drafted(second, done, 6))
