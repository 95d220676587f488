"""95 % intervals for accuracies: of one category, and of the mean over categories.

`wilson_interval` and `stratified_interval` take a count of right images as binomial, so several images of one prompt
count as several trials. `clustered_proportion` counts them as what they tell, and `clustered_interval` takes the prompt
as the unit, however many images it has; that one is for differences and scores, which are no shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, variance

Z_95 = 1.959963984540054
"""Quantile of the normal distribution that leaves 2.5 % on either side."""


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """95 % interval of a proportion, within [0, 1]; it has width even where all or none succeed.

    Source: Wilson 1927, the score interval without continuity correction. The numbers need not be whole ones, see
    `clustered_proportion`.

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
    return mean_proportion([(successes / trials, *wilson_interval(successes, trials)) for successes, trials in strata])


def mean_proportion(strata: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean of proportions, and its 95 % interval from theirs; see `stratified_interval`, whose second half it is.

    Args:
        strata: proportion, low and high of each stratum, which are independent.

    Returns:
        mean, low, high.
    """
    mean = fmean(share for share, _, _ in strata)
    below = sqrt(sum((share - low) ** 2 for share, low, _ in strata)) / len(strata)
    above = sqrt(sum((high - share) ** 2 for share, _, high in strata)) / len(strata)
    return mean, max(0.0, mean - below), min(1.0, mean + above)


def clustered_proportion(clusters: Sequence[Sequence[bool]]) -> tuple[float, float, float]:
    """Share of right images among all, and its 95 % interval, where images come in clusters, those of one prompt.

    Images of one prompt are alike, so they count as fewer than they are: as the number of independent images whose
    share would vary as much as the means of the prompts do, which gives the Wilson interval of that number. It is taken
    to be no more than the images and no fewer than the prompts, for few prompts tell little about their spread.

    Source: Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data", for the effective number; Wilson's interval in place of the exact one, as in Dean and
    Pagano 2015.

    Args:
        clusters: for each prompt, whether each of its images is right; all have as many images.

    Returns:
        share, low, high.

    Raises:
        ValueError: no cluster, or clusters of different sizes.
    """
    if len({len(right) for right in clusters}) != 1 or not clusters[0]:
        raise ValueError("clusters must have one size, of 1 or more.")
    return ratio_proportion([(sum(right), len(right)) for right in clusters])


def clustered_interval(strata: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean of the strata's means, each with the same weight whatever its size, and its 95 % interval by the clusters.

    A cluster is a prompt, and its value the mean over its images, or the difference of two models on it, which pairs
    them. Images of one prompt are alike, so they narrow the interval no more than they tell. The K strata's variances
    of the mean, s² / n, add up to K² times that of the result; the interval is normal.

    Source: Cochran 1977, "Sampling Techniques", chapters 5 (strata) and 9 (clusters).

    Args:
        strata: of each stratum, the values of its clusters, two or more.

    Returns:
        mean, low, high.

    Raises:
        ValueError: a stratum of fewer than two clusters.
    """
    if small := [number for number, values in enumerate(strata) if len(values) < 2]:
        raise ValueError(f"stratum {small[0]} has fewer than 2 clusters: their spread is unknown.")
    mean = fmean(map(fmean, strata))
    spread = Z_95 * sqrt(sum(variance(values) / len(values) for values in strata)) / len(strata)
    return mean, mean - spread, mean + spread


def ratio_proportion(clusters: Sequence[tuple[float, int]]) -> tuple[float, float, float]:
    """As `clustered_proportion`, for clusters of unequal size, such as the answers of one category about a prompt.

    Args:
        clusters: of each, how many of its members are right, which may be a sum of shares, and how many there are.

    Returns:
        share, low, high.

    Raises:
        ValueError: no cluster, or one without members.
    """
    share, spread = _ratio(clusters)
    return share, *effective_interval(share, spread, len(clusters), sum(size for _, size in clusters))


def ratio_interval(clusters: Sequence[tuple[float, int]]) -> tuple[float, float, float]:
    """Mean over the members of clusters of unequal size, and its 95 % interval by the clusters, which is normal.

    With clusters of one size, as `clustered_interval` of one stratum.

    Args:
        clusters: of each, the sum over its members and how many there are; two clusters or more.

    Returns:
        mean, low, high.

    Raises:
        ValueError: fewer than two clusters, or one without members.
    """
    if len(clusters) < 2:
        raise ValueError("there are fewer than 2 clusters: their spread is unknown.")
    mean, spread = _ratio(clusters)
    return mean, mean - Z_95 * sqrt(spread), mean + Z_95 * sqrt(spread)


def _ratio(clusters: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Mean over the members of clusters, and the variance of that.

    With C clusters of totals t and sizes n, the mean is p = Σt / Σn, its variance C / (C − 1) · Σ (t − p n)² / (Σn)².

    Source: Cochran 1977, "Sampling Techniques", chapter 6 (ratio estimates), for the variance.
    """
    if not clusters or min(size for _, size in clusters) < 1:
        raise ValueError("there must be a cluster, and none without members.")
    members, count = sum(size for _, size in clusters), len(clusters)
    mean = sum(total for total, _ in clusters) / members
    squares = sum((total - mean * size) ** 2 for total, size in clusters)
    return mean, count / (count - 1) * squares / members**2 if count > 1 else 0.0


def effective_interval(share: float, spread: float, fewest: int, most: int) -> tuple[float, float]:
    """Wilson interval of the number of independent trials whose share would vary so much.

    Args:
        share: in [0, 1].
        spread: variance of the share; 0 where it shows none.
        fewest: trials it is taken to be at least.
        most: trials it is taken to be at most.
    """
    effective = min(most, max(fewest, share * (1 - share) / spread if spread else 0.0))
    return wilson_interval(share * effective, effective)
