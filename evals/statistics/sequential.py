"""Looking before the end: samples are added to a finished evaluation, and each look spends part of the error.

Of the usual rules this is O'Brien and Fleming's shape as a spending function (Lan and DeMets 1983): almost nothing is
spent early, so that the last look, the one that most people reach, keeps nearly the full level. It needs no plan of
when to look, only the information so far as a fraction of the planned total.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from evals.statistics.quantiles import ALPHA

GRID = 0.01
"""Step of the grid on which the statistic's density is carried from look to look, in its own units (SD 1 at the end)."""

_phi = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))


def spent(fraction: float, alpha: float = ALPHA) -> float:
    """Two-sided error spent at an information fraction t in (0, 1]: 4 - 4 Phi(z_{1 - alpha/4} / sqrt(t)); alpha at 1.

    Half of it for each direction, as in the published tables.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"information fraction {fraction} must lie in (0, 1]")
    normal = NormalDist()
    return 4 * normal.cdf(-normal.inv_cdf(1 - alpha / 4) / math.sqrt(fraction))


def information_fraction(between: float, within: float, samples: int, planned: int) -> float:
    """Information after `samples` of `planned` replies to each question, for a difference whose true value varies over
    questions by `between` and within a question by `within` / K: (between + within/planned) / (between + within/samples).
    """
    if not 1 <= samples <= planned:
        raise ValueError(f"samples {samples} must lie between 1 and the planned {planned}")
    if min(between, within) < 0 or between + within == 0:
        raise ValueError("variances must not be negative, nor both 0")
    return (between + within / planned) / (between + within / samples)


def look_levels(fractions: Sequence[float], alpha: float = ALPHA) -> tuple[float, ...]:
    """The two-sided p below which each look counts as significant, so that all looks together err with `alpha` at most.

    `fractions`: information at each look so far, increasing, the last at most 1. The score B(t) = Z sqrt(t) gains
    independent normal increments of variance t_i - t_{i-1} (more replies to the same questions give this: the covariance
    of two looks is the later one's variance). Its density among runs not yet stopped is carried on a grid, and bound c_i
    solves P(stop at look i) = spent(t_i) - spent(t_{i-1}) (Armitage, McPherson and Rowe 1969).
    """
    if not fractions or list(fractions) != sorted(set(fractions)):
        raise ValueError(f"look_levels: fractions {list(fractions)} must increase")
    bounds: list[float] = []
    points, mass = np.zeros(1), np.ones(1)  # B(0) = 0
    done = before = 0.0
    for t in fractions:
        total = spent(t, alpha)
        points, mass, bound = _advance(points, mass, math.sqrt(t - before), total - done)
        bounds.append(bound / math.sqrt(t))
        done, before = total, t
    return tuple(2 * NormalDist().cdf(-z) for z in bounds)


def _advance(
    points: NDArray[np.float64], mass: NDArray[np.float64], step: float, error: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """One look: the bound that stops a share `error` of all runs, and the mass of the others on a grid within it."""

    def stopped(bound: float) -> float:
        return float(mass @ (_phi((-bound - points) / step) + _phi((points - bound) / step)))

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if stopped(middle) > error else (low, middle)
    edges = np.linspace(-high, high, 2 * math.ceil(high / GRID) + 1)
    cells = np.zeros(len(edges) - 1)
    for point, weight in zip(points, mass, strict=True):
        cells += weight * np.diff(_phi((edges - point) / step))
    return (edges[1:] + edges[:-1]) / 2, cells, high
