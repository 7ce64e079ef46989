"""Holm by hand, the spread of runs by hand, and a band that holds for all checkpoints at once."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evals.statistics.multiple import band, holm, spread
from evals.statistics.quantiles import t_quantile


def test_holm_by_hand():
    # Sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04 -> running maximum .02 .03 .06 .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.2]) == (0.2,)
    assert holm([]) == ()
    assert holm([0.6, 0.7, 1.0]) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([0.5, 1.2])


def test_holm_lies_between_raw_and_bonferroni():
    p = np.random.default_rng(0).random(20) ** 3
    adjusted = np.array(holm(p.tolist()))
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(1, 20 * p) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


def test_spread_of_three_runs_by_hand():
    mean, sd, low, high = spread([0.02, 0.05, 0.08])
    half = 4.302653 * 0.03 / math.sqrt(3)
    assert (mean, sd, low, high) == pytest.approx((0.05, 0.03, 0.05 - half, 0.05 + half), abs=1e-7)
    with pytest.raises(ValueError, match="two training runs"):
        spread([0.1])


def test_band_of_equal_checkpoints_is_the_single_interval():
    d = np.random.default_rng(0).normal(0.1, 0.2, 50)
    low, high = band(np.stack([d, d, d]))
    half = t_quantile(49) * d.std(ddof=1) / math.sqrt(50)
    assert (high - low) / 2 == pytest.approx([half] * 3, rel=0.05)
    assert (low + high) / 2 == pytest.approx([d.mean()] * 3)


def test_band_of_unrelated_checkpoints_nears_bonferroni():
    d = np.random.default_rng(1).normal(0, 0.2, (6, 80))
    low, high = band(d)
    errors = d.std(1, ddof=1) / math.sqrt(80)
    quantile = ((high - low) / 2 / errors)[0]
    assert 1.15 * t_quantile(79) < quantile <= t_quantile(79, 0.05 / 6)


def test_band_covers_all_checkpoints_at_once():
    rng, runs, held, single = np.random.default_rng(3), 120, 0, 0
    truth = np.array([0.0, 0.05, 0.1, 0.1, 0.08])
    for run in range(runs):
        shared = rng.normal(0, 0.15, 40)  # checkpoints of one run are alike
        d = truth[:, None] + shared + rng.normal(0, 0.15, (5, 40))
        low, high = band(d, seed=run)
        held += bool(((low <= truth) & (truth <= high)).all())
        half = t_quantile(39) * d.std(1, ddof=1) / math.sqrt(40)
        single += bool((np.abs(d.mean(1) - truth) <= half).all())
    assert held / runs > 0.89  # 95 %, minus 3 sigma of 120 runs
    assert single < held  # single intervals do not hold together


def test_band_of_no_change_is_zero_and_bad_input():
    low, high = band(np.zeros((2, 10)))
    assert not low.any() and not high.any()
    with pytest.raises(ValueError, match="checkpoints, questions"):
        band([0.1, 0.2])
    with pytest.raises(ValueError, match="at least 2 questions"):
        band([[0.1], [0.2]])
