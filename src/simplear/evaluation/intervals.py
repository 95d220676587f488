"""95 % intervals for accuracies: of one category, and of the mean over categories.

A count of right images is taken as binomial, so several images of one prompt count as several trials, as in GenEval.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

Z_95 = 1.959963984540054
"""Quantile of the normal distribution that leaves 2.5 % on either side."""


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion, within [0, 1]; it has width even where all or none succeed.

    Source: Wilson 1927, the score interval without continuity correction.

    Raises:
        ValueError: fewer trials than 1, or successes outside ``[0, trials]``.
    """
    if not (trials >= 1 and 0 <= successes <= trials):
        raise ValueError(f"{successes} successes in {trials} trials is no proportion.")
    share, spread = successes / trials, Z_95**2 / trials
    center = share + spread / 2
    margin = sqrt(spread * share * (1 - share) + spread**2 / 4)
    # The bounds lie in [0, 1] but for rounding.
    return max(0.0, (center - margin) / (1 + spread)), min(1.0, (center + margin) / (1 + spread))


def stratified_interval(strata: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """Mean of the strata's proportions, each with the same weight whatever its size, and its 95 % interval.

    The mean's variance is the sum of the K strata's variances over K². Each of them is read off the Wilson interval
    (l, u) of its proportion p, on either side by itself, so the interval needs no clamping and has width at 0 and 1:

        low = mean - sqrt(sum (p - l)²) / K        high = mean + sqrt(sum (u - p)²) / K

    Source: Zou, Huang and Zhang 2009, "A note on confidence interval estimation for a linear function of binomial
    proportions", with equal weights 1 / K.

    Args:
        strata: successes and trials of each stratum.

    Returns:
        mean, low, high.
    """
    shares = [successes / trials for successes, trials in strata]
    bounds = [wilson_interval(successes, trials) for successes, trials in strata]
    mean = sum(shares) / len(strata)
    below = sqrt(sum((share - low) ** 2 for share, (low, _) in zip(shares, bounds, strict=True))) / len(strata)
    above = sqrt(sum((high - share) ** 2 for share, (_, high) in zip(shares, bounds, strict=True))) / len(strata)
    return mean, max(0.0, mean - below), min(1.0, mean + above)
