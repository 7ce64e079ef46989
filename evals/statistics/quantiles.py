"""Student's t and Wilson's score interval, in closed form: the package needs no scipy."""

from __future__ import annotations

import math

import numpy as np

ALPHA = 0.05
"""Two-sided level of every interval and test here."""


def t_central(t: float, df: int) -> float:
    """P(|T| <= t) for Student's t with `df` degrees of freedom, t >= 0; closed forms 26.7.3 and 26.7.4 of Abramowitz
    and Stegun. With theta = atan(t / sqrt(df)):

        odd   2/pi (theta + sin cos (1 + 2/3 cos^2 + 2*4/(3*5) cos^4 + ...))   (df - 1)/2 terms
        even  sin (1 + 1/2 cos^2 + 1*3/(2*4) cos^4 + ...)                      df/2 terms
    """
    theta = math.atan(t / math.sqrt(df))
    sin, cos = math.sin(theta), math.cos(theta)
    odd = df % 2
    count = (df - 1) // 2 if odd else df // 2
    i = np.arange(1, count)
    ratios = cos**2 * ((2 * i) / (2 * i + 1) if odd else (2 * i - 1) / (2 * i))
    series = float(np.concatenate([[1.0], np.cumprod(ratios)]).sum()) if count else 0.0
    return 2 / math.pi * (theta + sin * cos * series) if odd else sin * series


def t_quantile(df: int, alpha: float = ALPHA) -> float:
    """The t with P(|T| > t) = alpha, by bisection. Raises ValueError unless df >= 1 and 0 < alpha < 1."""
    if df < 1 or not 0 < alpha < 1:
        raise ValueError(f"t_quantile: df {df} must be at least 1 and alpha {alpha} in (0, 1)")
    low, high = 0.0, 1.0
    while t_central(high, df) < 1 - alpha:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_central(middle, df) < 1 - alpha else (low, middle)
    return (low + high) / 2


def wilson_interval(mean: float, n: float, quantile: float) -> tuple[float, float]:
    """Wilson's score interval: (m + q^2/2n -+ q sqrt(m(1-m)/n + q^2/4n^2)) / (1 + q^2/n), within [0, 1].

    Raises ValueError unless 0 <= mean <= 1 and n > 0.
    """
    if not 0 <= mean <= 1 or n <= 0:
        raise ValueError(f"wilson_interval: mean {mean} must lie in [0, 1] and n {n} above 0")
    square = quantile**2 / n
    half = quantile * math.sqrt(mean * (1 - mean) / n + square / (4 * n))
    centre, scale = mean + square / 2, 1 + square
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
