"""Speculative Jacobi decoding draws what a plain loop draws, and has the enumerated distribution.

The second is a chi-square test over all pictures of a tiny codebook and grid, with seeds that do not change, so it
passes or fails for good; engines with a mistake in them fail both.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch

from generation.models import ARCHITECTURE, language_model
from generation.test_cached import GRID, NEGATIVES, PROMPTS, SEEDS, SETTINGS, plainly
from simplear.generation import JacobiEngine, SamplingSettings, guide, jacobi
from simplear.generation import sampling as sampling_module
from simplear.generation.fused import DecodeState
from simplear.generation.sampling import probabilities
from simplear.language_model import LanguageModel, LanguageModelConfig
from simplear.sequence import TokenLayout


@pytest.mark.parametrize("rope", ["1d", "2d"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("window", [0, 1, 2, 3, 12, 16])
def test_codes_are_those_of_a_plain_loop(rope, settings, window):
    model = language_model(rope)
    codes, stats = JacobiEngine(model, window).generate(PROMPTS, NEGATIVES, GRID, settings, SEEDS)
    assert torch.equal(codes, plainly(model, settings))
    assert stats.steps <= 12


def test_no_window_is_code_by_code_and_a_sure_model_needs_few_passes():
    """With a model that says the same code everywhere, each pass makes all its drafts final."""
    model = language_model()
    model.decoder.lm_head.weight.data.zero_()
    steps = [
        JacobiEngine(model, window)
        .generate(PROMPTS, NEGATIVES, GRID, SamplingSettings(do_sample=False), SEEDS)[1]
        .steps
        for window in (0, 1, 3, 11)
    ]
    assert steps == [12, 7, 4, 2]


def test_each_pass_says_how_many_codes_are_final():
    """Drafts that are right make several final at once, which a place drawn on its own never does."""
    for window, steps in ((0, 1), (3, None)):
        seen = []
        engine = JacobiEngine(language_model(), window, on_pass=seen.append)
        _, stats = engine.generate(PROMPTS, NEGATIVES, GRID, SamplingSettings(), SEEDS)
        assert len(seen) == stats.steps and seen[-1] == [12] * len(PROMPTS)
        gains = [later - earlier for image in zip(*seen, strict=True) for earlier, later in itertools.pairwise(image)]
        assert set(gains) == {steps} if steps else 1 < max(gains) <= 4 and min(gains) >= 0


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_image_does_not_depend_on_its_companions(settings):
    engine = JacobiEngine(language_model(), 3)
    together, _ = engine.generate(PROMPTS, NEGATIVES, GRID, settings, SEEDS)
    for row, (prompt, negative, seed) in enumerate(zip(PROMPTS, NEGATIVES, SEEDS, strict=True)):
        alone, _ = engine.generate([prompt], [negative], GRID, settings, [seed])
        assert torch.equal(alone[0], together[row])


def test_rows_are_shown_when_all_images_have_them():
    seen = []
    codes, stats = JacobiEngine(language_model(), 5).generate(
        PROMPTS, NEGATIVES, GRID, SETTINGS[-1], SEEDS, on_row=lambda row, so_far: seen.append((row, so_far.clone()))
    )
    assert (stats.engine, stats.images, stats.tokens) == ("jacobi", 4, 48)
    assert [row for row, _ in seen] == [1, 2, 3]
    assert all(torch.equal(so_far, codes.flatten(1)[:, : row * GRID[1]]) for row, so_far in seen)


def test_a_negative_window_is_refused():
    with pytest.raises(ValueError, match="window -1 must be 0 or more"):
        JacobiEngine(language_model(), -1)


CODES, PLACES = 3, 4
PICTURES = list(itertools.product(range(CODES), repeat=PLACES))
TINY_PROMPT, TINY_NEGATIVE = torch.tensor([1, 3, 4, 2]), torch.tensor([1, 2])
SAMPLED = [
    SamplingSettings(),
    SamplingSettings(guidance_scale=2.0, temperature=0.8),
    SamplingSettings(guidance_scale=2.0, top_k=2),
]


@cache
def tiny_model() -> LanguageModel:
    torch.manual_seed(0)
    layout = TokenLayout(text_to_image_id=1, start_of_image_id=2, image_token_offset=8, codebook_size=CODES)
    config = LanguageModelConfig("", CODES, architecture={**ARCHITECTURE, "hidden_size": 16, "initializer_range": 0.5})
    return LanguageModel(config.random_decoder(layout.vocab_size).eval(), layout)


@torch.no_grad()
def joint(settings: SamplingSettings) -> np.ndarray:
    """Probability of each picture: the product of its codes' guided probabilities, one after another."""
    model, found = tiny_model(), []
    for text in (TINY_PROMPT, TINY_NEGATIVE):
        ids = torch.tensor([[*text.tolist(), *(8 + code for code in picture)] for picture in PICTURES])
        logits = model.decoder(input_ids=ids).logits[:, len(text) - 1 : -1, 8:]
        found.append(logits.log_softmax(dim=-1))
    guided = guide(*found, settings.guidance_scale)
    each = probabilities(guided.flatten(0, 1), settings).view(len(PICTURES), PLACES, CODES)
    return each.gather(-1, torch.tensor(PICTURES)[..., None])[..., 0].prod(dim=1).numpy()


def p_value(settings: SamplingSettings, window: int, images: int) -> float:
    """Of the chi-square test of drawn pictures against their probabilities; 0 where an impossible one was drawn."""
    expected = joint(settings) * images
    counts = np.zeros(len(PICTURES))
    weights = torch.tensor([CODES**place for place in reversed(range(PLACES))])
    batch = 5000
    for first in range(0, images, batch):
        codes, _ = JacobiEngine(tiny_model(), window).generate(
            [TINY_PROMPT] * batch, [TINY_NEGATIVE] * batch, (2, 2), settings, list(range(first, first + batch))
        )
        counts += np.bincount((codes.flatten(1) * weights).sum(dim=1).numpy(), minlength=len(PICTURES))
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 10
    cells = [*zip(counts[~rare], expected[~rare], strict=True), (counts[rare].sum(), expected[rare].sum())]
    cells = [(count, mean) for count, mean in cells if mean > 0]
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2)))


def test_the_p_value_is_right():
    """95 % quantile of chi-square with 10 degrees of freedom (any table): 18.307."""
    value = torch.special.gammaincc(torch.tensor(5.0, dtype=torch.float64), torch.tensor(18.307 / 2))
    assert math.isclose(float(value), 0.05, rel_tol=1e-3)


@pytest.mark.parametrize("settings", SAMPLED)
@pytest.mark.parametrize("window", [0, 1, 4])
def test_pictures_have_the_enumerated_distribution(settings, window):
    assert p_value(settings, window, 20_000) > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("settings", SAMPLED)
@pytest.mark.parametrize("window", [0, 1, 4])
def test_many_pictures_have_the_enumerated_distribution(settings, window):
    assert p_value(settings, window, 200_000) > 1e-3


def acceptance_inverted(monkeypatch):
    accept = jacobi.accepted
    monkeypatch.setattr(
        jacobi, "accepted", lambda drawn, drafted: accept((drawn == drafted).long(), torch.zeros_like(drafted))
    )


def all_accepted(monkeypatch):
    monkeypatch.setattr(jacobi, "accepted", lambda drawn, drafted: torch.full_like(drawn[:, 0], drawn.shape[1]))


def always_two_accepted(monkeypatch):
    """A minimum of accepted codes, as in the paper's code."""
    accept = jacobi.accepted
    monkeypatch.setattr(
        jacobi, "accepted", lambda drawn, drafted: accept(drawn, drafted).clamp(min=min(2, drawn.shape[1]))
    )


def drafts_one_place_off(monkeypatch):
    accept = jacobi.accepted
    monkeypatch.setattr(jacobi, "accepted", lambda drawn, drafted: accept(drawn, drafted.roll(1, dims=1)))


def first_code_by_argmax(monkeypatch):
    choose = sampling_module.choose

    def first_greedy(log_weights, settings, noise, places):
        codes = choose(log_weights, settings, noise, places)
        return torch.where(places == 0, log_weights.argmax(dim=-1), codes)

    monkeypatch.setattr(sampling_module, "choose", first_greedy)


def numbers_that_change_with_the_pass(monkeypatch):
    """Right in distribution, since any draft will do, but what a seed draws then depends on the window."""
    choose, passes = sampling_module.choose, []

    def drawn_anew(log_weights, settings, noise, places):
        passes.append(1)
        return choose(log_weights, settings, noise, places + 1000 * len(passes))

    monkeypatch.setattr(sampling_module, "choose", drawn_anew)


def unconditional_rows_a_code_behind(monkeypatch):
    """Caches that are cropped unequally."""
    advance = DecodeState.advance

    def shortened(self):
        half, lengths = len(self.prompt_lengths) // 2, self.prompt_lengths
        self.prompt_lengths = torch.cat([lengths[:half], lengths[half:] - 1])
        advance(self)
        self.prompt_lengths = lengths

    monkeypatch.setattr(DecodeState, "advance", shortened)


WRONG = [
    acceptance_inverted,
    all_accepted,
    always_two_accepted,
    drafts_one_place_off,
    first_code_by_argmax,
    unconditional_rows_a_code_behind,
]


DIFFERENT = [wrong for wrong in WRONG if wrong is not drafts_one_place_off]
"""With 50 codes drafts one place off are never accepted, which costs passes and no code."""


@pytest.mark.parametrize("mutate", WRONG)
def test_wrong_engines_have_another_distribution(mutate, monkeypatch):
    mutate(monkeypatch)
    assert p_value(SAMPLED[1], 3, 20_000) < 1e-6


@pytest.mark.parametrize("mutate", [*DIFFERENT, numbers_that_change_with_the_pass])
def test_wrong_engines_draw_other_codes(mutate, monkeypatch):
    model = language_model()
    mutate(monkeypatch)
    codes, _ = JacobiEngine(model, 3).generate(PROMPTS, NEGATIVES, GRID, SETTINGS[-1], SEEDS)
    assert not torch.equal(codes, plainly(model, SETTINGS[-1]))
