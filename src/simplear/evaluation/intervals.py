"""95 % intervals of accuracies and scores, with the prompt as the unit: images of one prompt are not independent.

`clustered_proportion` is for shares of right images, `clustered_interval` for scores and differences, which are not
proportions, and `stratified_interval` for the mean of several independent categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, variance

Z_95 = 1.959963984540054
"""Quantile of the normal distribution that leaves 2.5 % on either side."""


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """95 % interval of a proportion, within [0, 1]; it has width even if all or none succeed.

    Source: Wilson 1927, the score interval without continuity correction. The numbers need not be integers, see
    `clustered_proportion`.

    Raises:
        ValueError: fewer trials than 1, or successes outside ``[0, trials]``.
    """
    if not (trials >= 1 and 0 <= successes <= trials):
        raise ValueError(f"{successes} successes in {trials} trials is not a proportion.")
    share, spread = successes / trials, Z_95**2 / trials
    center = share + spread / 2
    margin = sqrt(spread * share * (1 - share) + spread**2 / 4)
    # The bounds lie in [0, 1] except for rounding.
    return max(0.0, (center - margin) / (1 + spread)), min(1.0, (center + margin) / (1 + spread))


def stratified_interval(strata: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean of independent proportions, each with the same weight, and its 95 % interval.

    The mean's variance is the sum of the K strata's variances over K². Each of them is read off the interval (l, u) of
    its proportion p, separately for either side, so the result needs no clamping and has width at 0 and 1:

        low = mean - sqrt(sum (p - l)²) / K        high = mean + sqrt(sum (u - p)²) / K

    Source: Zou, Huang and Zhang 2009, "A note on confidence interval estimation for a linear function of binomial
    proportions", with equal weights 1 / K.

    Args:
        strata: proportion, low and high of each.

    Returns:
        mean, low, high.
    """
    mean = fmean(share for share, _, _ in strata)
    below = sqrt(sum((share - low) ** 2 for share, low, _ in strata)) / len(strata)
    above = sqrt(sum((high - share) ** 2 for share, _, high in strata)) / len(strata)
    return mean, max(0.0, mean - below), min(1.0, mean + above)


def clustered_proportion(clusters: Sequence[tuple[float, int]]) -> tuple[float, float, float]:
    """Share of right images among all, and its 95 % interval, where images come in clusters, those of one prompt.

    Images of one prompt are alike, so they count as the number of independent images whose share would vary as much,
    which gives the Wilson interval of that number; it is at most the number of images, and at least the number of
    prompts, since few prompts tell little about their spread. With C clusters of totals t and sizes n, the share is
    p = Σt / Σn and its variance C / (C − 1) · Σ (t − p n)² / (Σn)².

    Sources: Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data", for the effective number; Dean and Pagano 2015 for Wilson's interval in its place;
    Cochran 1977, "Sampling Techniques", chapter 6, for the variance.

    Args:
        clusters: for each prompt, how many of its images are right, which may be a sum of shares, and how many it has.

    Returns:
        share, low, high.

    Raises:
        ValueError: no cluster, or an empty one.
    """
    if not clusters or min(size for _, size in clusters) < 1:
        raise ValueError("there must be at least one cluster, and none of them empty.")
    count, members = len(clusters), sum(size for _, size in clusters)
    share = sum(total for total, _ in clusters) / members
    squares = sum((total - share * size) ** 2 for total, size in clusters)
    spread = count / (count - 1) * squares / members**2 if count > 1 else 0.0
    return share, *effective_interval(share, spread, count, members)


def effective_interval(share: float, spread: float, fewest: int, most: int) -> tuple[float, float]:
    """Wilson interval for the number of independent trials whose share would have this variance.

    Args:
        share: in [0, 1].
        spread: variance of the share; 0 if there is none to see.
        fewest: lower bound of the number of trials.
        most: upper bound of the number of trials.
    """
    effective = min(most, max(fewest, share * (1 - share) / spread if spread else 0.0))
    return wilson_interval(share * effective, effective)


def clustered_interval(strata: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean of the strata's means, each with the same weight, and its 95 % normal interval.

    A value is the mean over a prompt's images, or the difference of two models on a prompt, which pairs them. The K
    strata's variances of the mean, s² / n, add up to K² times that of the result.

    Source: Cochran 1977, "Sampling Techniques", chapters 5 (strata) and 9 (clusters).

    Args:
        strata: the values of each stratum's prompts, two or more.

    Returns:
        mean, low, high.

    Raises:
        ValueError: a stratum of fewer than two values.
    """
    if small := [number for number, values in enumerate(strata) if len(values) < 2]:
        raise ValueError(f"stratum {small[0]} has fewer than 2 clusters: their spread is unknown.")
    mean = fmean(map(fmean, strata))
    spread = Z_95 * sqrt(sum(variance(values) / len(values) for values in strata)) / len(strata)
    return mean, mean - spread, mean + spread
