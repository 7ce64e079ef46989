"""Pooled ratios against worked numbers, and against the plain mean where all denominators are equal."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from evals import stats
from evals.statistics.ratio import compare_ratio, estimate_ratio


def test_linearised_estimate_by_hand():
    # a = 1, 2, 3 of b = 2, 2, 4: R = 6/8; residuals a - R b = -0.5, 0.5, 0; mean b = 8/3.
    found = estimate_ratio([[1], [2], [3]], [[2], [2], [4]])
    error = math.sqrt((0.25 + 0.25) / 2) / math.sqrt(3) / (8 / 3)
    assert found.mean == 0.75
    assert found.low == pytest.approx(0.75 - 4.302653 * error, abs=1e-6)
    assert found.high == 1.0  # 0.75 + 0.4658 is clipped
    assert (found.n, found.samples) == (3, 1)


def test_equal_denominators_are_a_mean():
    before = [[1, 0], [1, 1], [0, 0], [1, 0], [0, 1], [0, 0]]
    after = [[1, 1], [1, 1], [0, 1], [1, 0], [1, 1], [1, 0]]
    ones = np.ones((6, 2))
    mean, ratio = stats.compare(before, after), compare_ratio((before, ones), (after, ones))
    assert (ratio.difference, ratio.low, ratio.high) == pytest.approx((mean.difference, mean.low, mean.high))
    assert ratio.p == mean.p
    assert (ratio.wins, ratio.losses, ratio.ties) == (mean.wins, mean.losses, mean.ties)


def test_swap_test_counts_every_pattern():
    a, b = np.array([1, 2, 0, 3]), np.array([2, 5, 1, 4])
    c, d = np.array([2, 3, 1, 3]), np.array([2, 4, 2, 6])
    seen = abs(c.sum() / d.sum() - a.sum() / b.sum())
    far = []
    for flip in itertools.product([False, True], repeat=4):
        swap = np.array(flip)
        old = np.where(swap, c, a).sum() / np.where(swap, d, b).sum()
        new = np.where(swap, a, c).sum() / np.where(swap, b, d).sum()
        far.append(abs(new - old) >= seen - 1e-12)
    column = [values[:, None] for values in (a, b, c, d)]
    assert compare_ratio((column[0], column[1]), (column[2], column[3])).p == np.mean(far)


def test_no_change_and_all_right():
    part, whole = [[3], [2], [5]], [[3], [2], [5]]
    same = compare_ratio((part, whole), (part, whole))
    assert (same.difference, same.low, same.high, same.p, same.verdict) == (0, 0, 0, 1, "no evidence")
    full = estimate_ratio(part, whole)
    assert full.mean == full.high == 1
    assert full.low < 0.5  # three questions, none wrong: far from certain


def test_clusters_keep_the_ratio_and_widen_the_interval():
    rng = np.random.default_rng(1)
    whole = rng.integers(1, 6, size=(10, 1)).repeat(4, axis=0).astype(float)
    part = np.floor(whole * rng.random((10, 1)).repeat(4, axis=0))
    groups = [str(i // 4) for i in range(40)]
    plain, grouped = estimate_ratio(part, whole), estimate_ratio(part, whole, groups)
    assert grouped.mean == plain.mean
    assert grouped.high - grouped.low > 1.8 * (plain.high - plain.low)  # four copies: twice the SE


def test_comparison_of_clusters_ignores_copies():
    rng = np.random.default_rng(5)
    whole = rng.integers(1, 6, size=(9, 1)).astype(float)
    before, after = np.floor(whole * 0.5), np.floor(whole * rng.random((9, 1)))
    once = compare_ratio((before, whole), (after, whole))
    copies = [table.repeat(3, axis=0) for table in (before, after, whole)]
    groups = [str(i // 3) for i in range(27)]
    found = compare_ratio((copies[0], copies[2]), (copies[1], copies[2]), groups=groups)
    assert (found.difference, found.low, found.high, found.p) == pytest.approx(
        (once.difference, once.low, once.high, once.p)
    )
    assert (found.wins, found.losses) == (3 * once.wins, 3 * once.losses)


def test_many_questions_use_seeded_swaps():
    rng = np.random.default_rng(2)
    whole = rng.integers(1, 6, size=(60, 1))
    before, after = rng.binomial(whole, 0.5), rng.binomial(whole, 0.9)
    found = compare_ratio((before, whole), (after, whole))
    assert found.p < 0.01
    assert found.verdict == "better"


@pytest.mark.parametrize(
    ("part", "whole", "message"),
    [
        ([[1], [2]], [[0], [2]], "between 0"),
        ([[0], [0]], [[0], [0]], "nothing to divide"),
        ([[1], [1]], [[1, 1], [1, 1]], "tables"),
        ([[1]], [[1]], "2 questions"),
    ],
)
def test_bad_counts(part, whole, message):
    with pytest.raises(ValueError, match=message):
        estimate_ratio(part, whole)
