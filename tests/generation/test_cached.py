"""The cached engine draws what a loop without cache, batch and padding draws, and companions do not matter."""

from __future__ import annotations

import pytest
import torch

from generation.models import CODEBOOK, LAYOUT, MAX_POSITIONS, draw_plainly, language_model, prompts
from simplear.generation import CachedEngine, SamplingSettings, cached, guidance, guide
from simplear.generation.sampling import Noise
from simplear.language_model import LanguageModel

GRID = (3, 4)
PROMPTS = prompts(2, 9, 0, 5)
NEGATIVES = prompts(6, 1, 0, 3, seed=2)
SEEDS = [11, 3, 5_000_000_000, 3]
SETTINGS = [
    SamplingSettings(do_sample=False),
    SamplingSettings(do_sample=False, guidance_scale=6.0),
    SamplingSettings(),
    SamplingSettings(guidance_scale=6.0, temperature=1.5, top_k=20, top_p=0.95),
]
GUIDED = SETTINGS[-1]


def draw(model: LanguageModel, settings: SamplingSettings) -> torch.Tensor:
    return CachedEngine(model).generate(PROMPTS, NEGATIVES, GRID, settings, SEEDS)[0]


def plainly(model: LanguageModel, settings: SamplingSettings) -> torch.Tensor:
    asked = zip(PROMPTS, NEGATIVES, SEEDS, strict=True)
    return torch.stack(
        [draw_plainly(model, prompt, negative, GRID, settings, seed) for prompt, negative, seed in asked]
    )


@pytest.mark.parametrize("rope", ["1d", "2d"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_codes_equal_those_of_a_plain_loop(rope, settings):
    model = language_model(rope)
    codes = draw(model, settings)
    assert torch.equal(codes, plainly(model, settings))
    assert len(codes.unique()) > 8  # a degenerate model would show nothing


@pytest.mark.parametrize("rope", ["1d", "2d"])
def test_batch_of_one_equals_ragged_batch_in_float64(rope):
    model = language_model(rope)
    together = draw(model, GUIDED)
    for row, (prompt, negative, seed) in enumerate(zip(PROMPTS, NEGATIVES, SEEDS, strict=True)):
        alone, _ = CachedEngine(model).generate([prompt], [negative], GRID, GUIDED, [seed])
        assert torch.equal(alone[0], together[row])


def without_padding_mask(monkeypatch):
    pad = cached.left_pad
    monkeypatch.setattr(cached, "left_pad", lambda *args: (pad(*args)[0], torch.ones_like(pad(*args)[1])))


def guidance_reversed(monkeypatch):
    monkeypatch.setattr(guidance, "guide", lambda conditional, negative, scale: guide(negative, conditional, scale))


def numbers_of_the_next_place(monkeypatch):
    at = Noise.at
    monkeypatch.setattr(Noise, "at", lambda self, places: at(self, places + 1))


def rows_and_columns_swapped(monkeypatch):
    positions_at = LanguageModel.positions_at
    monkeypatch.setattr(LanguageModel, "positions_at", lambda *args: positions_at(*args).flip(0))


def one_position_late(monkeypatch):
    positions_at = LanguageModel.positions_at
    monkeypatch.setattr(
        LanguageModel,
        "positions_at",
        lambda self, position, *rest: positions_at(self, position + (position.shape[1] == 1), *rest),
    )


@pytest.mark.parametrize(
    "mutate",
    [without_padding_mask, guidance_reversed, numbers_of_the_next_place, rows_and_columns_swapped, one_position_late],
)
def test_wrong_engines_are_noticed(mutate, monkeypatch):
    model = language_model("2d")
    expected = plainly(model, GUIDED)
    mutate(monkeypatch)
    assert not torch.equal(draw(model, GUIDED), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_bit_equal_whatever_else_is_in_a_batch_of_one_shape(dtype):
    model = language_model(dtype=dtype)
    mine, mine_negative = prompts(4, 7, seed=3)
    others = [prompts(9, 6, 2, seed=seed) for seed in (4, 5)]
    drawn = []
    for place, (longest, middle, short) in enumerate(others):
        asked, negatives, seeds = [longest, middle], [short, longest], [place, 100 * place]
        asked.insert(2 * place, mine)
        negatives.insert(2 * place, mine_negative)
        seeds.insert(2 * place, 77)
        codes, _ = CachedEngine(model).generate(asked, negatives, GRID, GUIDED, seeds)
        drawn.append(codes[2 * place])
    assert torch.equal(drawn[0], drawn[1])


def test_unconditional_rows_are_fed_only_with_guidance(monkeypatch):
    model = language_model()
    rows = []
    hidden_states = LanguageModel.hidden_states

    def counted(self, ids, *rest):
        rows.append(tuple(ids.shape))
        return hidden_states(self, ids, *rest)

    monkeypatch.setattr(LanguageModel, "hidden_states", counted)
    draw(model, SamplingSettings())
    steps = GRID[0] * GRID[1]
    assert rows == [(4, 11)] + [(4, 1)] * (steps - 1)
    rows.clear()
    draw(model, GUIDED)
    assert rows == [(8, 11)] + [(8, 1)] * (steps - 1)


def test_statistics_and_rows_as_they_are_finished():
    seen = []
    codes, stats = CachedEngine(language_model()).generate(
        PROMPTS, NEGATIVES, GRID, GUIDED, SEEDS, on_row=lambda row, so_far: seen.append((row, so_far.clone()))
    )
    assert (stats.engine, stats.images, stats.tokens, stats.steps) == ("cached", 4, 48, 12)
    assert stats.seconds > 0
    assert [row for row, _ in seen] == [1, 2, 3]
    assert all(torch.equal(so_far, codes.flatten(1)[:, : row * GRID[1]]) for row, so_far in seen)


def test_a_sequence_may_fill_the_positions_and_no_more():
    model, settings = language_model(), SamplingSettings(do_sample=False)
    room = MAX_POSITIONS - GRID[0] * GRID[1] - 2
    codes, _ = CachedEngine(model).generate(prompts(room), prompts(0), GRID, settings, [0])
    assert codes.shape == (1, *GRID) and codes.min() >= 0 and codes.max() < CODEBOOK
    for asked, negative in [(prompts(room + 1), prompts(0)), (prompts(0), prompts(room + 1))]:
        with pytest.raises(ValueError, match=rf"37 tokens and a grid of 3 × 4 codes take 49 .* has {MAX_POSITIONS}"):
            CachedEngine(model).generate(asked, negative, GRID, settings, [0])


@pytest.mark.parametrize(
    ("count", "negatives", "seeds", "words"),
    [
        (2, 1, 2, "2 prompts, 1 negative prompts and 2 seeds"),
        (2, 2, 3, "2 prompts, 2 negative prompts and 3 seeds"),
    ],
)
def test_requests_that_cannot_be_are_named(count, negatives, seeds, words):
    with pytest.raises(ValueError, match=words):
        CachedEngine(language_model()).generate(PROMPTS[:count], NEGATIVES[:negatives], GRID, GUIDED, SEEDS[:seeds])


def test_prompts_are_not_changed():
    before = [prompt.clone() for prompt in PROMPTS]
    draw(language_model(), GUIDED)
    assert all(torch.equal(a, b) for a, b in zip(before, PROMPTS, strict=True))
    assert all(prompt[-1] == LAYOUT.start_of_image_id for prompt in PROMPTS)
