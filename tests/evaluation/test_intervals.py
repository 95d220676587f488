"""Intervals against published values, their definition, and simulated coverage."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
import pytest

from simplear.evaluation.intervals import (
    Z_95,
    clustered_interval,
    clustered_proportion,
    stratified_interval,
    wilson_interval,
)


def of_counts(counts: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """The stratified interval of successes and trials."""
    return stratified_interval([(right / trials, *wilson_interval(right, trials)) for right, trials in counts])


def of_images(prompts: Sequence[Sequence[bool]]) -> tuple[float, float, float]:
    """The interval of images of prompts."""
    return clustered_proportion([(sum(right), len(right)) for right in prompts])


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998, table I, method 3 (the score interval).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_published_values(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_bounds_solve_the_score_equation() -> None:
    """A bound is the proportion whose own standard error puts the observation at the quantile."""
    for successes, trials in ((8, 10), (0, 7), (100, 100), (333, 600)):
        for bound in wilson_interval(successes, trials):
            if 0 < bound < 1:
                distance = abs(successes / trials - bound)
                assert distance == pytest.approx(Z_95 * sqrt(bound * (1 - bound) / trials), abs=1e-12)
    assert wilson_interval(8, 10) == pytest.approx((0.490, 0.943), abs=5e-4)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_what_is_no_proportion_is_refused(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="not a proportion"):
        wilson_interval(successes, trials)


def test_one_stratum_is_wilson() -> None:
    mean, low, high = of_counts([(8, 10)])
    assert mean == 0.8
    assert (low, high) == pytest.approx(wilson_interval(8, 10))


def test_the_mean_weighs_categories_not_images() -> None:
    assert of_counts([(10, 10), (0, 1000)])[0] == 0.5


def test_large_strata_give_the_sum_of_variances_over_k_squared() -> None:
    n, shares = 1_000_000, (0.1, 0.5, 0.8)
    mean, low, high = of_counts([(round(n * share), n) for share in shares])
    half = Z_95 * sqrt(sum(share * (1 - share) / n for share in shares)) / len(shares)
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=1e-3)


@pytest.mark.parametrize("strata", [[(0, 5)] * 6, [(5, 5)] * 6, [(0, 1), (1, 1)], [(100, 100)] * 5 + [(0, 100)]])
def test_bounds_stay_proportions_and_keep_width(strata: list[tuple[int, int]]) -> None:
    mean, low, high = of_counts(strata)
    assert 0 <= low <= mean <= high <= 1
    assert high > low


@pytest.mark.parametrize("shares", [(0.95, 0.6, 0.3, 0.9, 0.15, 0.4), (0.99, 1.0, 0.97, 0.995, 0.98, 0.9)])
def test_interval_covers_the_truth_95_times_in_100(shares: tuple[float, ...]) -> None:
    random = np.random.default_rng(0)
    counts = random.binomial(100, shares, size=(4000, 6))
    covered = 0
    for row in counts.tolist():
        _, low, high = of_counts([(successes, 100) for successes in row])
        covered += low <= sum(shares) / 6 <= high
    assert 0.94 < covered / len(counts) < 0.98
    # The plain normal interval, which has no width where all succeed, falls short near 1.
    means, variances = counts.mean(axis=1) / 100, (counts / 100 * (1 - counts / 100) / 100).sum(axis=1) / 36
    plain = np.abs(means - sum(shares) / 6) <= Z_95 * np.sqrt(variances)
    assert plain.mean() < covered / len(counts)


def test_clusters_of_one_image_are_a_large_binomial() -> None:
    verdicts = [[1.0] * 300 + [0.0] * 700, [1.0] * 800 + [0.0] * 200]
    assert clustered_interval(verdicts) == pytest.approx(of_counts([(300, 1000), (800, 1000)]), abs=2e-3)


def test_equal_images_of_a_prompt_tell_no_more_than_one() -> None:
    """Four images a prompt that always agree: the binomial interval is half as wide as it should be."""
    rng = np.random.default_rng(0)
    prompts = [(rng.random(400) < share).astype(float) for share in (0.3, 0.6)]
    _, low, high = clustered_interval([list(values) for values in prompts])
    _, naive_low, naive_high = of_counts([(int(values.sum()) * 4, 1600) for values in prompts])
    assert (high - low) / (naive_high - naive_low) == pytest.approx(2, rel=0.02)


def test_clustered_intervals_cover_a_paired_difference() -> None:
    """95 of 100 intervals hold the truth, though prompts differ far more than the models do."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        strata = []
        for _ in range(3):
            hardness = rng.uniform(0.1, 0.8, 60)
            before, after = (rng.binomial(4, hardness + gain) / 4 for gain in (0.0, 0.1))
            strata.append(list(after - before))
        _, low, high = clustered_interval(strata)
        covered += low <= 0.1 <= high
    assert 0.93 <= covered / 1000 <= 0.97


def test_a_stratum_of_one_cluster_is_refused() -> None:
    with pytest.raises(ValueError, match="stratum 1 has fewer than 2 clusters"):
        clustered_interval([[0.1, 0.2], [0.3]])


def test_a_proportion_of_clusters_counts_images_as_what_they_tell() -> None:
    """Equal images of a prompt are one, one image a prompt is itself, and unlike images are at most what they are."""
    prompts = [[True]] * 8 + [[False]] * 2
    assert of_images(prompts) == (0.8, *wilson_interval(8, 10))
    assert of_images([right * 4 for right in prompts]) == (0.8, *wilson_interval(8, 10))
    assert of_images([[True, False]] * 10) == (0.5, *wilson_interval(5, 10)), "no spread tells nothing"
    unlike = [[True, True, False, False], [True, False, False, False], [True, True, True, False]] * 9
    assert of_images(unlike) == pytest.approx((0.5, *wilson_interval(54, 108)))
    _, low, high = of_images([[True] * 4] * 50)
    assert (low, high) == wilson_interval(50, 50) and low < 0.95 and high == 1


@pytest.mark.parametrize("mean", [0.15, 0.6, 0.95])
def test_a_proportion_of_clusters_covers_the_truth_95_times_in_100(mean: float) -> None:
    """Eighty prompts of very different difficulty, four images each; images taken for independent do not cover it."""
    random = np.random.default_rng(0)
    covered = naive = 0
    trials = 1500
    for _ in range(trials):
        chances = random.beta(mean, 1 - mean, size=80)
        clusters = (random.random((80, 4)) < chances[:, None]).tolist()
        _, low, high = of_images(clusters)
        covered += low <= mean <= high
        low, high = wilson_interval(sum(map(sum, clusters)), 320)
        naive += low <= mean <= high
    assert 0.93 < covered / trials < 0.975
    assert naive / trials < 0.85


def test_clusters_of_unequal_size() -> None:
    random = np.random.default_rng(3)
    equal = [list(random.random(4) < 0.7) for _ in range(30)]
    assert clustered_proportion([(sum(right), 4) for right in equal]) == pytest.approx(of_images(equal))
    # A cluster weighs as many as its members are; alike ones tell no more than one.
    assert clustered_proportion([(1, 1), (0, 3)])[0] == 0.25
    alike = [(float(size * right), size) for size, right in zip([1, 9] * 20, [1, 1, 0, 0, 1, 0, 0, 1] * 5, strict=True)]
    share, low, high = clustered_proportion(alike)
    assert (low, high) != pytest.approx(wilson_interval(share * 200, 200), abs=0.05) and high - low > 0.25
    assert clustered_proportion([(5.0, 5)] * 8)[1:] == pytest.approx(wilson_interval(8, 8))
    for broken in ([], [(0.0, 0)]):
        with pytest.raises(ValueError, match="cluster"):
            clustered_proportion(broken)


def test_a_proportion_of_unequal_clusters_covers_the_truth_95_times_in_100() -> None:
    random = np.random.default_rng(4)
    runs, covered = 2000, 0
    for _ in range(runs):
        sizes = random.integers(1, 9, 120)
        right = random.binomial(sizes, random.beta(3.2, 0.8, 120))  # prompts differ, in the mean 0.8
        _, low, high = clustered_proportion(list(zip(right.tolist(), sizes.tolist(), strict=True)))
        covered += low <= 0.8 <= high
    assert covered / runs == pytest.approx(0.95, abs=0.015)
