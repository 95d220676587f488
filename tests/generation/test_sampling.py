"""Draws follow the enumerated distribution, and the numbers behind them belong to an image alone."""

from __future__ import annotations

import math

import pytest
import torch

from generation.models import distribution, exponential, mix
from simplear.generation import SamplingSettings
from simplear.generation.sampling import Noise, choose, probabilities

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
    noise, place = Noise(range(DRAWS), len(LOG_WEIGHTS), "cpu"), torch.full((DRAWS, 1), 3)
    return draw(LOG_WEIGHTS.expand(DRAWS, 1, -1), settings, noise, place)[:, 0]


@pytest.mark.parametrize("settings", SETTINGS)
def test_draws_follow_the_enumerated_distribution(settings):
    assert abs(chi_square_excess(draws(settings), distribution(LOG_WEIGHTS.tolist(), settings))) < FAR_OUT


def tempered_last(log_weights, settings, noise, places):
    """Wrong: top-p sees the distribution before the temperature."""
    plain = SamplingSettings(top_k=settings.top_k, top_p=settings.top_p)
    kept = probabilities(log_weights, plain)
    return ((kept.log() / settings.temperature).softmax(dim=-1) / noise.at(places)).argmax(dim=-1)


def uniform_noise(log_weights, settings, noise, places):
    """Wrong: races with uniform numbers in place of exponential ones."""
    return (probabilities(log_weights, settings) / (-noise.at(places)).exp()).argmax(dim=-1)


def one_number_for_a_place(log_weights, settings, noise, places):
    """Wrong: all codes of a place run with the same number."""
    return (probabilities(log_weights, settings) / noise.at(places)[..., :1]).argmax(dim=-1)


def multiplied(log_weights, settings, noise, places):
    """Wrong: multiplies by the temperature."""
    return choose(log_weights * settings.temperature**2, settings, noise, places)


@pytest.mark.parametrize("wrong", [tempered_last, uniform_noise, one_number_for_a_place, multiplied])
def test_wrong_draws_are_noticed(wrong):
    settings = SETTINGS[-1]
    assert chi_square_excess(draws(settings, wrong), distribution(LOG_WEIGHTS.tolist(), settings)) > FAR_OUT


def test_greedy_takes_the_most_probable_code():
    noise, place = Noise([0], len(LOG_WEIGHTS), "cpu"), torch.zeros(1, 1, dtype=torch.long)
    assert choose(LOG_WEIGHTS[None, None], SamplingSettings(do_sample=False), noise, place).tolist() == [[5]]


@pytest.mark.parametrize("settings", [SamplingSettings(top_k=1), SamplingSettings(top_p=1e-9)])
def test_truncation_to_one_code_is_greedy(settings):
    assert set(draws(settings).tolist()) == {5}


def test_top_k_beyond_the_codebook_keeps_all():
    everything = probabilities(LOG_WEIGHTS[None], SamplingSettings())
    assert torch.equal(probabilities(LOG_WEIGHTS[None], SamplingSettings(top_k=64_000)), everything)


def test_top_k_keeps_ties_with_the_last_code():
    kept = probabilities(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), SamplingSettings(top_k=2))
    assert (kept > 0).tolist() == [[True, True, True, False]]


def test_a_code_of_probability_zero_is_never_drawn():
    """Not even where the others are as unlikely as a number can be."""
    weights = torch.full((DRAWS, 1, 4), -math.inf, dtype=torch.float64)
    weights[..., 1], weights[..., 2] = 0.0, -700.0
    noise, place = Noise(range(DRAWS), 4, "cpu"), torch.zeros(DRAWS, 1, dtype=torch.long)
    assert set(choose(weights, SamplingSettings(), noise, place).flatten().tolist()) == {1}


def test_distributions_that_differ_little_draw_the_same_code():
    """At least as often as the bound says: (1 − d) / (1 + d) for a total variation distance of d."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2000, generator=generator, dtype=torch.float64)
    other = weights + 0.1 * torch.randn(2000, generator=generator, dtype=torch.float64)
    distance = float((weights.softmax(0) - other.softmax(0)).abs().sum()) / 2
    noise, place = Noise(range(4000), 2000, "cpu"), torch.zeros(4000, 1, dtype=torch.long)
    first, second = (
        choose(row.expand(4000, 1, -1), SamplingSettings(), noise, place).flatten() for row in (weights, other)
    )
    bound = (1 - distance) / (1 + distance)
    assert 0.03 < distance < 0.05
    assert float((first == second).double().mean()) > bound - FAR_OUT * math.sqrt(bound * (1 - bound) / 4000)
    assert len(first.unique()) > 1000


def numbers(seeds, places, codes) -> torch.Tensor:
    """As uniform ones, (B, T, C) in (0, 1)."""
    noise = Noise(seeds, codes, "cpu")
    return (-noise.at(torch.tensor([list(places)]).expand(len(seeds), -1))).exp()


def test_numbers_are_exponential():
    """Kolmogorov and Smirnov's distance of their uniform forms, at a level of 0.001: over codes, places and seeds."""
    for found in (numbers([5], [3], 40_000), numbers([5], range(200), 200), numbers(range(200), range(200), 1)):
        ordered = found.flatten().sort().values
        assert ordered[0] > 0 and ordered[-1] < 1
        steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
        distance = max((steps[1:] - ordered).max().item(), (ordered - steps[:-1]).max().item())
        assert distance < 1.95 / math.sqrt(len(ordered))


def test_numbers_of_neighbours_are_uncorrelated():
    """Neighbouring seeds, places and codes."""
    plain = numbers(range(100), range(100), 9)
    others = [numbers(range(1, 101), range(100), 9), numbers(range(100), range(1, 101), 9)]
    others += [numbers(range(100), range(100), 10)[..., 1:]]
    streams = torch.stack([found.flatten() for found in [plain, *others]])
    correlations = torch.corrcoef(streams) - torch.eye(len(streams))
    assert correlations.abs().max() < FAR_OUT / math.sqrt(plain.numel())


def test_numbers_belong_to_seed_place_and_code_alone():
    seeds, places = [7, 2**63, -1, 7], torch.tensor([[0, 3, 9]]).expand(4, -1)
    together = Noise(seeds, 5, "cpu").at(places)
    assert torch.equal(together[0], together[3])
    assert len(together[:3].unique()) == 45
    for row, seed in enumerate(seeds):
        alone = Noise([seed], 8, "cpu").at(torch.tensor([[9, 3]]))
        assert torch.equal(alone[0, 0, :5], together[row, 2]) and torch.equal(alone[0, 1, :5], together[row, 1])


def test_numbers_are_the_same_on_every_machine():
    """Against Python's unbounded integers, and those against SplitMix64's first output from a seed."""
    assert mix(1234567) == 6457827717110365317
    found = Noise([42, -3], 3, "cpu").at(torch.tensor([[17], [0]]))[:, 0]
    for row, (seed, place) in enumerate([(42, 17), (-3, 0)]):
        expected = [exponential(seed, place, code) for code in range(3)]
        assert found[row].tolist() == pytest.approx(expected, rel=1e-14)


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
