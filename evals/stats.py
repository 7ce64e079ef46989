"""Before and after, with honest error bars. The question is the unit: replies to one question are not independent.

Scores have the shape (N, K): N questions, K replies to each, every score in [0, 1]; (N,) stands for K = 1. A question's
score is the mean over its K replies, so the overall mean is avg@K.

Which interval and which test: in simulations of nominal 95 % intervals with K > 1, Wilson with an effective sample size
and the t quantile covered 91 to 96 %, replies pooled as if independent 40 to 75 %, and the paired t interval 94 to 96 %.
None of this covers the noise of training seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evals.statistics.quantiles import ALPHA, t_quantile, wilson_interval

POWER = 0.8
"""Chance of seeing an effect of the size that is called detectable."""
EXACT_UP_TO = 20
"""Differences that are not zero: up to this many, all 2^n sign patterns are counted."""
FLIPS = 10_000
"""Random sign patterns beyond that."""

Scores = ArrayLike | Sequence[Sequence[float]]


@dataclass(frozen=True)
class Estimate:
    """A mean score with its 95 % interval; `n` questions, `samples` replies to each."""

    mean: float
    low: float
    high: float
    n: int
    samples: int


@dataclass(frozen=True)
class Comparison:
    """after - before on the same questions, in score units (1 = 100 points).

    `low`, `high`: 95 % paired t interval, for questions like these. `p`: two-sided sign-flip test. `detectable`: the
    smallest true difference that would have been seen in 80 % of such comparisons. `wins`, `losses`, `ties`: questions.
    """

    difference: float
    low: float
    high: float
    standard_error: float
    p: float
    detectable: float
    n: int
    wins: int
    losses: int
    ties: int

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "no evidence". Test and interval must agree: either alone is weak on few questions."""
        if self.p >= ALPHA or self.low <= 0 <= self.high:
            return "no evidence"
        return "better" if self.difference > 0 else "worse"


def question_scores(scores: Scores) -> NDArray[np.float64]:
    """(N, K) or (N,) -> (N, K) float64.

    Raises ValueError when there is nothing, fewer than two questions (no spread, so no interval), replies in unequal
    numbers, or a score outside [0, 1].
    """
    try:
        values = np.asarray(scores, dtype=np.float64)
    except ValueError:
        raise ValueError("scores: every question needs the same number of replies") from None
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"scores: expected (questions, replies), got shape {np.shape(scores)}")
    if len(values) < 2:
        raise ValueError("scores: an interval needs at least 2 questions")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("scores: every score must lie in [0, 1]")
    return values


def standard_error(values: NDArray[np.float64]) -> float:
    """SD (n - 1 in the denominator) / sqrt(n) of (n,) values."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def cluster_means(values: NDArray[np.float64], groups: Sequence[str] | None) -> NDArray[np.float64]:
    """(N,) values of questions -> (G,) means of their clusters, in the order of their names; None: every question is one.

    Questions from one template are correlated, so that the template is the unit. Raises ValueError for another number of
    groups than questions, and for fewer than 2 clusters.
    """
    if groups is None:
        return values
    if len(groups) != len(values):
        raise ValueError(f"groups: {len(groups)} groups for {len(values)} questions")
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        raise ValueError("groups: an interval needs at least 2 clusters")
    return np.asarray(np.bincount(index, weights=values) / np.bincount(index))


def effective_n(units: NDArray[np.float64], replies: int) -> float:
    """How many independent replies (U,) unit means are worth: min(replies, m (1 - m) / SE^2), SE over units; U if SE = 0."""
    mean, error = float(units.mean()), standard_error(units)
    return len(units) if error == 0 else min(replies, mean * (1 - mean) / error**2)


def mean_interval(units: NDArray[np.float64], replies: int) -> tuple[float, float, float]:
    """(mean, low, high) of (U,) unit means in [0, 1]: Wilson with the t quantile of U - 1 degrees on `effective_n`."""
    mean = min(1.0, float(units.mean()))  # a sum of ones may round above
    return mean, *wilson_interval(mean, effective_n(units, replies), t_quantile(len(units) - 1))


def estimate(scores: Scores, groups: Sequence[str] | None = None) -> Estimate:
    """avg@K with Wilson's interval on the effective number of replies and the t quantile with N - 1 degrees.

    With `groups` (one per question) the mean is over clusters of their means, and clusters take the questions' place.
    """
    values = question_scores(scores)
    return Estimate(*mean_interval(cluster_means(values.mean(1), groups), values.size), *values.shape)


def sign_flip_p(differences: ArrayLike, seed: int = 0) -> float:
    """Two-sided p value of (N,) paired differences: how often random signs give a sum at least as far from zero.

    Exact over all sign patterns for at most `EXACT_UP_TO` differences that are not zero, and then equal to McNemar's
    exact test when all are +-1; else (1 + hits) / (1 + FLIPS) with seeded flips. 1 when all are zero.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or d.size == 0 or not np.isfinite(d).all():
        raise ValueError("sign_flip_p: expected (N,) finite differences, N >= 1")
    d = d[d != 0]
    bound = abs(d.sum()) - 1e-9 * np.abs(d).sum()  # ties count, also after rounding
    if len(d) <= EXACT_UP_TO:
        sums = np.zeros(1)
        for value in d:
            sums = np.concatenate([sums + value, sums - value])
        return float((np.abs(sums) >= bound).mean())
    rng, hits = np.random.default_rng(seed), 0
    for _ in range(FLIPS // 100):
        signs = rng.integers(0, 2, size=(100, len(d))) * 2 - 1
        hits += int((np.abs(signs @ d) >= bound).sum())
    return (1 + hits) / (1 + FLIPS)


def minimum_detectable_effect(error: float) -> float:
    """The true difference seen with probability `POWER` at level `ALPHA`: (z_{1-alpha/2} + z_power) SE = 2.80 SE."""
    normal = NormalDist()
    return (normal.inv_cdf(1 - ALPHA / 2) + normal.inv_cdf(POWER)) * error


def compare(before: Scores, after: Scores, seed: int = 0, groups: Sequence[str] | None = None) -> Comparison:
    """Paired comparison of two (N, K) score tables of the same questions in the same order; K may differ.

    With `groups` (one per question) interval, test and detectable effect use the mean difference of each cluster; wins,
    losses and ties still count questions. Raises ValueError for bad scores or another number of questions.
    """
    first, second = _pair(before, after)
    d = second.mean(1) - first.mean(1)
    return summarise(cluster_means(d, groups), d, sign_flip_p(cluster_means(d, groups), seed))


def summarise(units: NDArray[np.float64], questions: NDArray[np.float64], p: float) -> Comparison:
    """The Comparison of (U,) differences of units, of which (N,) questions won or lost, with a given p value."""
    mean, error = float(units.mean()), standard_error(units)
    half = t_quantile(len(units) - 1) * error
    return Comparison(
        difference=mean,
        low=max(-1.0, mean - half),
        high=min(1.0, mean + half),
        standard_error=error,
        p=p,
        detectable=minimum_detectable_effect(error),
        n=len(questions),
        wins=int((questions > 0).sum()),
        losses=int((questions < 0).sum()),
        ties=int((questions == 0).sum()),
    )


def fixed_interval(before: Scores, after: Scores, groups: Sequence[str] | None = None) -> tuple[float, float] | None:
    """95 % interval of the difference on these very questions: replies would be drawn anew, the questions would not.

    SE = sqrt(sum_i w_i^2 (p_i (1 - p_i) / (K - 1) + q_i (1 - q_i) / (K - 1))), normal quantile; w_i = 1 / N, or
    1 / (clusters * questions in the cluster) with `groups`. p (1 - p) / (K - 1) is the variance of a mean of K zeros and
    ones; other scores use theirs. None below 4 replies: too few to know the noise of a question.
    """
    first, second = _pair(before, after)
    if min(first.shape[1], second.shape[1]) < 4:
        return None
    noise = sum(values.var(1, ddof=1) / values.shape[1] for values in (first, second))
    weights = np.full(len(first), 1 / len(first))
    if groups is not None:
        _, index, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
        weights = 1 / (len(sizes) * sizes[index])
    mean = float(weights @ (second.mean(1) - first.mean(1)))
    half = NormalDist().inv_cdf(1 - ALPHA / 2) * math.sqrt(float(weights**2 @ noise))
    return max(-1.0, mean - half), min(1.0, mean + half)


def _pair(before: Scores, after: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = question_scores(before), question_scores(after)
    if len(first) != len(second):
        raise ValueError(f"compare: {len(first)} questions before and {len(second)} after; they must be the same")
    return first, second
