"""Speculative Jacobi decoding: greedy it is exact code by code, and sampled it has the enumerated distribution.

The second is a chi-square test over all pictures of a tiny codebook and grid, with seeds that do not change, so it
passes or fails for good; engines with a mistake in them fail it.
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
from simplear.generation.decoder_step import Rows
from simplear.generation.sampling import probabilities
from simplear.language_model import LanguageModel, LanguageModelConfig
from simplear.sequence import TokenLayout

GREEDY = [settings for settings in SETTINGS if not settings.do_sample]
PROPOSALS = ["left", "upper", "uniform"]


@pytest.mark.parametrize("rope", ["1d", "2d"])
@pytest.mark.parametrize("settings", GREEDY)
@pytest.mark.parametrize("window", [1, 2, 3, 12, 16])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_greedy_codes_are_those_of_a_plain_loop(rope, settings, window, proposal):
    model = language_model(rope)
    codes, stats = JacobiEngine(model, window, proposal).generate(PROMPTS, NEGATIVES, GRID, settings, SEEDS)
    assert torch.equal(codes, plainly(model, settings))
    assert stats.steps <= 1 + 12


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


def test_a_window_of_none_is_refused():
    with pytest.raises(ValueError, match="window 0 must be 1 or more"):
        JacobiEngine(language_model(), 0)


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


def p_value(settings: SamplingSettings, window: int, proposal: str, images: int) -> float:
    """Of the chi-square test of drawn pictures against their probabilities; 0 where an impossible one was drawn."""
    expected = joint(settings) * images
    counts = np.zeros(len(PICTURES))
    weights = torch.tensor([CODES**place for place in reversed(range(PLACES))])
    batch = 5000
    for first in range(0, images, batch):
        codes, _ = JacobiEngine(tiny_model(), window, proposal).generate(
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
@pytest.mark.parametrize(("window", "proposal"), [(1, "left"), (4, "left"), (3, "upper"), (4, "uniform")])
def test_pictures_have_the_enumerated_distribution(settings, window, proposal):
    assert p_value(settings, window, proposal, 20_000) > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("settings", SAMPLED)
@pytest.mark.parametrize(("window", "proposal"), [(1, "left"), (2, "upper"), (4, "left"), (4, "uniform")])
def test_many_pictures_have_the_enumerated_distribution(settings, window, proposal):
    assert p_value(settings, window, proposal, 200_000) > 1e-3


def acceptance_inverted(monkeypatch):
    accept = jacobi.accept
    monkeypatch.setattr(jacobi, "accept", lambda p, q, *rest: accept(q, p.clamp(min=1e-300), *rest))


def no_residual(monkeypatch):
    monkeypatch.setattr(jacobi, "residual", lambda p, q: p)


def one_number_to_draft_and_to_accept(monkeypatch):
    monkeypatch.setattr(jacobi, "ACCEPT", jacobi.DRAFT)


def one_number_to_accept_and_to_replace(monkeypatch):
    monkeypatch.setattr(jacobi, "RESIDUAL", jacobi.ACCEPT)


def always_two_accepted(monkeypatch):
    """A minimum of accepted codes, as in the paper's code."""
    accept = jacobi.accept
    monkeypatch.setattr(jacobi, "accept", lambda *args: accept(*args).clamp(min=2))


def first_code_by_argmax(monkeypatch):
    distribution = jacobi._distribution
    begun = []

    def first_greedy(log_weights, sampling):
        p = distribution(log_weights, sampling)
        if len(begun) % 100 == 0:
            p[:, 0] = torch.nn.functional.one_hot(p[:, 0].argmax(dim=-1), CODES)
        begun.append(1)
        return p

    monkeypatch.setattr(jacobi, "_distribution", first_greedy)


def unconditional_rows_a_code_behind(monkeypatch):
    """Caches that are cropped unequally."""
    feed = Rows.feed

    def shortened(self, ids):
        self.cache.lengths[len(self.lengths) // 2 :] -= self.cache.lengths[len(self.lengths) // 2 :].clamp(max=1)
        return feed(self, ids)

    monkeypatch.setattr(Rows, "feed", shortened)


@pytest.mark.parametrize(
    "mutate",
    [
        acceptance_inverted,
        no_residual,
        one_number_to_draft_and_to_accept,
        one_number_to_accept_and_to_replace,
        always_two_accepted,
        first_code_by_argmax,
        unconditional_rows_a_code_behind,
    ],
)
def test_wrong_engines_have_another_distribution(mutate, monkeypatch):
    mutate(monkeypatch)
    assert min(p_value(SAMPLED[1], 3, proposal, 20_000) for proposal in ("left", "uniform")) < 1e-6
