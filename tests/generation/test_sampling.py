"""Draws follow the enumerated distribution, and the numbers behind them belong to an image alone."""

from __future__ import annotations

import math

import pytest
import torch

from generation.models import distribution
from simplear.generation import SamplingSettings
from simplear.generation.sampling import choose, invert_cumulative, probabilities, uniforms

LOG_WEIGHTS = torch.tensor([0.3, -2.0, 1.1, 0.9, -0.4, 2.0, -6.0, 1.5, 0.0, -1.2, 0.7, -3.0], dtype=torch.float64)
DRAWS = 40_000
SETTINGS = [
    SamplingSettings(),
    SamplingSettings(temperature=0.6),
    SamplingSettings(temperature=2.5),
    SamplingSettings(top_k=5),
    SamplingSettings(top_p=0.8),
    SamplingSettings(temperature=1.7, top_k=7, top_p=0.85),
]
ALMOST_ONE = 1 - 2.0**-53
FAR_OUT = 4.75
"""Standard deviations beyond which one in a million statistics falls."""


def chi_square_excess(codes: torch.Tensor, expected: list[float]) -> float:
    """Pearson's statistic as a standard normal (Wilson and Hilferty's cube root); infinite for an impossible code."""
    counts = torch.bincount(codes, minlength=len(expected)).tolist()
    if len(counts) > len(expected) or any(count for count, p in zip(counts, expected, strict=True) if p == 0):
        return math.inf
    possible = [(count, len(codes) * p) for count, p in zip(counts, expected, strict=True) if p > 0]
    statistic = sum((count - mean) ** 2 / mean for count, mean in possible)
    freedom = len(possible) - 1
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def draws(settings: SamplingSettings, draw=choose) -> torch.Tensor:
    return draw(LOG_WEIGHTS.expand(DRAWS, -1), settings, uniforms(range(DRAWS), [3])[:, 0])


@pytest.mark.parametrize("settings", SETTINGS)
def test_draws_follow_the_enumerated_distribution(settings):
    assert abs(chi_square_excess(draws(settings), distribution(LOG_WEIGHTS.tolist(), settings))) < FAR_OUT


def tempered_last(log_weights, settings, uniform):
    """Wrong: top-p sees the distribution before the temperature."""
    plain = SamplingSettings(top_k=settings.top_k, top_p=settings.top_p)
    kept = probabilities(log_weights, plain)
    return invert_cumulative((kept.log() / settings.temperature).softmax(dim=-1), uniform)


def not_normalised(log_weights, settings, uniform):
    """Wrong: what top-k and top-p leave is not scaled to 1."""
    kept = probabilities(log_weights, settings) > 0
    full = probabilities(log_weights, SamplingSettings(temperature=settings.temperature))
    cumulative = (full * kept).cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniform[:, None], right=True)[:, 0]


def multiplied(log_weights, settings, uniform):
    """Wrong: multiplies by the temperature."""
    return invert_cumulative(probabilities(log_weights * settings.temperature**2, settings), uniform)


@pytest.mark.parametrize("wrong", [tempered_last, not_normalised, multiplied])
def test_wrong_draws_are_noticed(wrong):
    settings = SETTINGS[-1]
    assert chi_square_excess(draws(settings, wrong), distribution(LOG_WEIGHTS.tolist(), settings)) > FAR_OUT


def test_greedy_takes_the_most_probable_code():
    assert choose(LOG_WEIGHTS[None], SamplingSettings(do_sample=False), None).tolist() == [5]


@pytest.mark.parametrize("settings", [SamplingSettings(top_k=1), SamplingSettings(top_p=1e-9)])
def test_truncation_to_one_code_is_greedy(settings):
    assert set(draws(settings).tolist()) == {5}


def test_top_k_beyond_the_codebook_keeps_all():
    everything = probabilities(LOG_WEIGHTS[None], SamplingSettings())
    assert torch.equal(probabilities(LOG_WEIGHTS[None], SamplingSettings(top_k=64_000)), everything)


def test_top_k_keeps_ties_with_the_last_code():
    kept = probabilities(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), SamplingSettings(top_k=2))
    assert (kept > 0).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize(
    ("probability", "uniform", "code"),
    [
        ([0.0, 0.0, 1.0, 0.0], 0.0, 2),
        ([0.0, 0.0, 1.0, 0.0], ALMOST_ONE, 2),
        ([0.5, 0.0, 0.5, 0.0], 0.5, 2),
        ([0.5, 0.0, 0.5, 0.0], 0.5 - 2.0**-54, 0),
        ([0.1] * 10 + [0.0], ALMOST_ONE, 9),
        ([0.3, 0.3, 0.3, 0.0], ALMOST_ONE, 2),
    ],
)
def test_a_code_of_probability_zero_is_never_drawn(probability, uniform, code):
    """At both ends, on a boundary, and where rounding lets the sum miss 1."""
    drawn = invert_cumulative(
        torch.tensor([probability], dtype=torch.float64), torch.tensor([uniform], dtype=torch.float64)
    )
    assert drawn.tolist() == [code]


def test_a_sum_that_is_not_monotone_draws_no_impossible_code(monkeypatch):
    """Parallel sums round each prefix on its own: a code of probability zero may seem to add a little."""
    rounded = torch.tensor([[0.25, 0.25 + 1e-16, 0.5 - 1e-16, 0.5, 1.0 - 1e-16, 1.0]], dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, dim: rounded.clone())
    probability = torch.tensor([[0.25, 0.0, 0.25, 0.0, 0.5, 0.0]], dtype=torch.float64)
    for uniform in (0.0, 0.25, 0.25 + 5e-17, 0.5 - 5e-17, 0.5, ALMOST_ONE):
        drawn = invert_cumulative(probability, torch.tensor([uniform], dtype=torch.float64))
        assert probability[0, drawn].item() > 0


def in_float32(log_weights, settings, uniform):
    """Wrong: sums a large codebook in the precision of the weights."""
    return invert_cumulative(probabilities(log_weights, settings).float(), uniform)


@pytest.mark.parametrize(("draw", "right"), [(choose, True), (in_float32, False)])
def test_a_large_codebook_is_inverted_exactly(draw, right):
    """With 64,000 equal codes, a number just below the end of code k's share draws k."""
    expected = torch.arange(37, 64_000, 6_400)
    log_weights = torch.zeros(1, 64_000).expand(len(expected), -1)
    drawn = draw(log_weights, SamplingSettings(), (expected.double() + 0.9999) / 64_000)
    assert torch.equal(drawn, expected) == right


def test_uniforms_are_uniform():
    """Kolmogorov and Smirnov's distance, at a level of 0.001."""
    for numbers in (uniforms(range(200), range(200)), uniforms([5], range(40_000)), uniforms(range(40_000), [5], 1, 2)):
        ordered = numbers.flatten().sort().values
        assert ordered[0] >= 0 and ordered[-1] < 1
        steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
        distance = max((steps[1:] - ordered).max().item(), (ordered - steps[:-1]).max().item())
        assert distance < 1.95 / math.sqrt(len(ordered))


def test_uniforms_of_neighbours_are_uncorrelated():
    """Neighbouring seeds and positions, and other purposes and iterations of the same draw."""
    plain = uniforms(range(200), range(200))
    others = [
        uniforms(range(1, 201), range(200)),
        uniforms(range(200), range(1, 201)),
        uniforms(range(200), range(200), 0),
    ]
    others += [uniforms(range(200), range(200), purpose, turn) for purpose in (0, 1) for turn in (0, 1)]
    streams = torch.stack([numbers.flatten() for numbers in [plain, *others]])
    correlations = torch.corrcoef(streams) - torch.eye(len(streams))
    assert correlations.abs().max() < FAR_OUT / math.sqrt(plain.numel())


def test_uniforms_belong_to_seed_and_position_alone():
    together = uniforms([7, 2**63, -1, 7], [0, 3, 9])
    assert torch.equal(together[0], together[3])
    assert len(together[:3].unique()) == 9
    for row, seed in enumerate([7, 2**63, -1, 7]):
        for column, position in enumerate([0, 3, 9]):
            assert uniforms([seed], [position]).item() == together[row, column].item()


def test_uniforms_are_the_same_on_every_machine():
    """SplitMix64's finaliser in Python's unbounded integers, chained over seed, position and keys."""

    def mix(word: int) -> int:
        word = (word + 0x9E3779B97F4A7C15) % 2**64
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        return word ^ word >> 31

    assert mix(1234567) == 6457827717110365317  # first output of SplitMix64 seeded so
    assert uniforms([42], [17]).item() == (mix(mix(mix(42) ^ 17)) >> 11) / 2**53
    assert uniforms([42], [17], 3, 0).item() == (mix(mix(mix(mix(mix(42) ^ 17) ^ 4) ^ 1)) >> 11) / 2**53


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"guidance_scale": -0.5}, "guidance_scale -0.5"),
        ({"guidance_scale": math.nan}, "guidance_scale nan"),
        ({"temperature": 0.0}, "do_sample"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
    ],
)
def test_settings_outside_their_range_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        SamplingSettings(**settings)
