"""Several comparisons at once: tasks of a report (Holm), training seeds (spread), checkpoints of a run (band)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evals.statistics.quantiles import ALPHA, t_quantile
from evals.stats import FLIPS, cluster_means


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's adjusted p values, in the order given: the i-th smallest of m is max over j <= i of (m - j + 1) p_(j), at
    most 1. All below `ALPHA` may be called significant, and the chance of any false call stays below `ALPHA`.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError("holm: every p value must lie in [0, 1]")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return tuple(adjusted)


def spread(gains: Sequence[float]) -> tuple[float, float, float, float]:
    """(mean, SD, low, high) of the gains of several training runs: 95 % t interval for the next run's expected gain.

    This is the noise of training, which no interval over questions covers. Raises ValueError below 2 runs.
    """
    if len(gains) < 2:
        raise ValueError("spread: two training runs or more are needed to see how they differ")
    values = np.asarray(gains, dtype=np.float64)
    mean, sd = float(values.mean()), float(values.std(ddof=1))
    half = t_quantile(len(values) - 1) * sd / math.sqrt(len(values))
    return mean, sd, mean - half, mean + half


def band(
    differences: ArrayLike, seed: int = 0, groups: Sequence[str] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds (low, high), each (C,), that hold for all C checkpoints at once in 95 % of reports.

    `differences` (C, N): checkpoint minus base for each question. Bounds: mean_c -+ q SE_c, where q is the 95 % quantile
    of max_c |t_c| under random signs, the same for all checkpoints, of the centred differences (max-t). Checkpoints of
    one run are alike, and this uses it: q lies between the t quantile at level ALPHA (all the same) and that at ALPHA / C
    (Bonferroni), and is kept within these two.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"band: expected finite (checkpoints, questions) differences, got shape {values.shape}")
    values = np.stack([cluster_means(row, groups) for row in values])
    checkpoints, n = values.shape
    if n < 2:
        raise ValueError("band: at least 2 questions")
    means, errors = values.mean(1), values.std(1, ddof=1) / math.sqrt(n)
    quantile = np.quantile(_max_t(values[errors > 0], seed), 1 - ALPHA) if (errors > 0).any() else 0.0
    quantile = min(max(quantile, t_quantile(n - 1)), t_quantile(n - 1, ALPHA / checkpoints))
    return np.maximum(-1.0, means - quantile * errors), np.minimum(1.0, means + quantile * errors)


def _max_t(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """(FLIPS,) largest |t| over the rows of (C, N) values, centred and with random signs per column."""
    centred = values - values.mean(1, keepdims=True)
    n = values.shape[1]
    square, rng, found = (centred**2).mean(1), np.random.default_rng(seed), []
    for _ in range(FLIPS // 100):
        means = (rng.integers(0, 2, size=(100, n)) * 2 - 1) @ centred.T / n
        errors = np.sqrt(np.maximum(square - means**2, 1e-300) / (n - 1))
        found.append((np.abs(means) / errors).max(1))
    return np.concatenate(found)
