"""pass@k, G-Pass@k and maj@K against worked numbers and against counting all subsets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from evals import stats
from evals.statistics.curves import g_pass_at_k, k_grid, majority, pass_at_k, pass_curve


def test_pass_at_k_to_six_decimals():
    four = [round(pass_at_k(4, 32, k), 6) for k in (1, 2, 4, 8, 16, 32)]
    assert four == [0.125, 0.237903, 0.430617, 0.704505, 0.949388, 1.0]
    one = [round(pass_at_k(1, 32, k), 6) for k in (1, 2, 4, 8, 16, 32)]
    assert one == [0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0]


def test_drawing_with_replacement_would_be_wrong():
    assert round(1 - (28 / 32) ** 8, 6) == 0.656391 != round(pass_at_k(4, 32, 8), 6)
    assert round(1 - (31 / 32) ** 32, 6) == 0.637945 != pass_at_k(1, 32, 32)


@pytest.mark.parametrize("right", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_and_g_pass_equal_counting_subsets(right, k):
    replies = [1] * right + [0] * (6 - right)
    counts = [sum(subset) for subset in itertools.combinations(replies, k)]
    assert pass_at_k(right, 6, k) == pytest.approx(np.mean([c >= 1 for c in counts]), abs=1e-12)
    assert g_pass_at_k(right, 6, k, 1e-6) == pytest.approx(pass_at_k(right, 6, k), abs=1e-12)
    for threshold in (0.25, 0.5, 1.0):
        expected = np.mean([c >= threshold * k for c in counts])
        assert g_pass_at_k(right, 6, k, threshold) == pytest.approx(expected, abs=1e-12)


def test_g_pass_to_six_decimals():
    assert round(g_pass_at_k(16, 32, 8, 0.5), 6) == 0.657459


def test_pass_at_k_is_stable_for_many_replies():
    exact = 1 - math.comb(9_000, 500) / math.comb(10_000, 500)
    assert pass_at_k(1_000, 10_000, 500) == pytest.approx(exact, rel=1e-12)


def test_k_grid():
    assert k_grid(1) == (1,)
    assert k_grid(8) == (1, 2, 4, 8)
    assert k_grid(12) == (1, 2, 4, 8, 12)


def test_pass_curve_starts_at_the_mean_and_rises():
    table = np.random.default_rng(0).random((30, 12)) < np.linspace(0, 0.6, 30)[:, None]
    curve, single = pass_curve(table), stats.estimate(table)
    assert curve.k == (1, 2, 4, 8, 12)
    assert (curve.mean[0], curve.low[0], curve.high[0]) == pytest.approx((single.mean, single.low, single.high))
    assert all(a <= b for a, b in itertools.pairwise(curve.mean))
    assert curve.mean[-1] == table.any(1).mean()
    assert all(low <= mean <= high for low, mean, high in zip(curve.low, curve.mean, curve.high, strict=True))
    with pytest.raises(ValueError, match="0 or 1"):
        pass_curve([[0.5, 1], [1, 1]])


def test_majority_of_all_replies():
    assert majority(["7", "9", "9", "7", "9"], [0, 1, 1, 0, 1]) == 1
    assert majority(["7", "9", "9", "7"], [0, 1, 1, 0]) == 0  # a tie goes to the first to appear
    assert majority([None, "9", "7", "7", "9"], [0, 1, 0, 0, 1]) == 1
    assert majority([None, None, None, "9"], [0, 0, 0, 1]) == 1  # no answer cannot win
    assert majority([None, None], [0, 0]) == 0
    assert majority(["x", "x", "y"], [1, 0, 0]) == 0.5  # one answer, judged differently


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_majority_of_two_answers_is_exact(k):
    answers, scores = ["a", "b", "a", "a", "b", None], [1, 0, 1, 1, 0, 0]
    found = []
    for subset in itertools.permutations(range(6), k):  # all orders: a tie is then shared
        votes = [answers[i] for i in subset if answers[i]]
        first = {v: votes.index(v) for v in votes}
        winner = max(first, key=lambda v: (votes.count(v), -first[v])) if votes else None
        found.append(float(winner == "a"))
    assert majority(answers, scores, k) == pytest.approx(np.mean(found), abs=1e-12)


def test_majority_of_three_answers_uses_seeded_subsets():
    answers, scores = ["a"] * 5 + ["b"] * 4 + ["c"] * 3, [1] * 5 + [0] * 7
    rng = np.random.default_rng(5)
    order = rng.permutation(12)
    answers, scores = [answers[i] for i in order], [scores[i] for i in order]
    exact = np.mean(
        [majority([answers[i] for i in s], [scores[i] for i in s]) for s in itertools.combinations(range(12), 5)]
    )
    found = majority(answers, scores, 5, seed=1)
    assert abs(found - exact) < 4 * math.sqrt(exact * (1 - exact) / 200)
    assert found == majority(answers, scores, 5, seed=1)


def test_bad_input():
    with pytest.raises(ValueError, match="k = 9"):
        pass_at_k(1, 8, 9)
    with pytest.raises(ValueError, match="9 right"):
        pass_at_k(9, 8, 1)
    with pytest.raises(ValueError, match="threshold"):
        g_pass_at_k(1, 8, 1, 0.0)
    with pytest.raises(ValueError, match="2 answers and 1 scores"):
        majority(["a", "b"], [1])
