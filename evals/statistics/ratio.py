"""Rates per key, per tag, per field: sum of one count over all replies divided by the sum of another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evals.statistics.quantiles import t_quantile, wilson_interval
from evals.stats import EXACT_UP_TO, FLIPS, Comparison, Estimate, cluster_means, standard_error, summarise

Array = NDArray[np.float64]


def _counts(part: ArrayLike, whole: ArrayLike) -> tuple[Array, Array]:
    a, b = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape or len(a) < 2:
        raise ValueError(
            f"ratio: expected two (questions, replies) tables, 2 questions or more, got {a.shape}, {b.shape}"
        )
    if not ((a >= 0) & (a <= b)).all():
        raise ValueError("ratio: every numerator must lie between 0 and its denominator")
    if b.sum() == 0:
        raise ValueError("ratio: all denominators are 0, so that there is nothing to divide by")
    return a, b


def _per_unit(part: Array, whole: Array, groups: Sequence[str] | None) -> tuple[Array, Array]:
    """Counts per unit: means over the replies of a question, and with `groups` their sums over a cluster."""
    a, b = part.mean(1), whole.mean(1)
    if groups is None:
        return a, b
    cluster_means(a, groups)  # checks the groups
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(index, weights=a).astype(np.float64), np.bincount(index, weights=b).astype(np.float64)


def estimate_ratio(part: ArrayLike, whole: ArrayLike, groups: Sequence[str] | None = None) -> Estimate:
    """R = sum(a) / sum(b) over (N, K) counts 0 <= a <= b, with a t interval clipped to [0, 1].

    Linearised: SE(R) = SD(e) / sqrt(U), e_u = (a_u - R b_u) / mean(b), units u = questions or, with `groups`, clusters.
    When no unit departs from R (all right, all wrong) that SE is 0; then Wilson's interval for U trials.
    """
    counts, total = _counts(part, whole)
    a, b = _per_unit(counts, total, groups)
    ratio = float(counts.sum() / total.sum())
    error = standard_error((a - ratio * b) / b.mean())
    quantile = t_quantile(len(a) - 1)
    low, high = max(0.0, ratio - quantile * error), min(1.0, ratio + quantile * error)
    if error < 1e-12:  # 0, but for rounding
        low, high = wilson_interval(ratio, len(a), quantile)
    return Estimate(ratio, low, high, *counts.shape)


def compare_ratio(
    before: tuple[ArrayLike, ArrayLike],
    after: tuple[ArrayLike, ArrayLike],
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Comparison:
    """Paired difference of two pooled ratios, each given as (numerators, denominators) of shape (N, K).

    Interval: t on the difference of the linearised units, e_after - e_before, around R_after - R_before. p: `swap_p`.
    Wins and losses: questions whose own ratio rose or fell; a tie where either has nothing to divide by.
    """
    first, second = _counts(*before), _counts(*after)
    if len(first[0]) != len(second[0]):
        raise ValueError(f"compare_ratio: {len(first[0])} questions before and {len(second[0])} after")
    (a, b), (c, d) = _per_unit(*first, groups), _per_unit(*second, groups)
    old, new = a.sum() / b.sum(), c.sum() / d.sum()
    units = (c - new * d) / d.mean() - (a - old * b) / b.mean() + (new - old)
    return summarise(units, _signs(first, second), swap_p(a, b, c, d, seed))


def _signs(first: tuple[Array, Array], second: tuple[Array, Array]) -> Array:
    (a, b), (c, d) = ((part.mean(1), whole.mean(1)) for part, whole in (first, second))
    return np.where((b > 0) & (d > 0), np.sign(np.round(c * b - a * d, 12)), 0.0)


def swap_p(a: Array, b: Array, c: Array, d: Array, seed: int = 0) -> float:
    """Two-sided p value of sum(c)/sum(d) - sum(a)/sum(b): how often swapping the two sides of random units takes the
    ratios at least as far apart. With equal denominators it is the sign-flip test, and as exact: all patterns up to
    `EXACT_UP_TO` units that differ, else `FLIPS` seeded ones. A side left without denominator takes the pooled ratio.
    """
    differ = (a != c) | (b != d)
    everything = np.array([a.sum(), b.sum(), c.sum(), d.sum()])
    moves = np.stack([c - a, d - b, a - c, b - d], axis=1)[differ]  # what a swap adds to each of the four sums

    def far(sums: Array) -> Array:
        middle = (everything[0] + everything[2]) / (everything[1] + everything[3])
        positive = sums[:, 1] > 1e-12, sums[:, 3] > 1e-12
        old = np.where(positive[0], sums[:, 0] / np.where(positive[0], sums[:, 1], 1), middle)
        new = np.where(positive[1], sums[:, 2] / np.where(positive[1], sums[:, 3], 1), middle)
        return np.abs(new - old)

    bound = far(everything[None])[0] - 1e-9
    if len(moves) <= EXACT_UP_TO:
        sums = everything[None]
        for move in moves:
            sums = np.concatenate([sums, sums + move])
        return float((far(sums) >= bound).mean())
    rng = np.random.default_rng(seed)
    hits = sum(
        int((far(everything + rng.integers(0, 2, size=(100, len(moves))) @ moves) >= bound).sum())
        for _ in range(math.ceil(FLIPS / 100))
    )
    return (1 + hits) / (1 + FLIPS)
