"""The judge: worked numbers, subset averages by brute force, and the Gaussian model that the paper solves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from evals.statistics.curves import pass_at_k
from evals.statistics.selection import best_of, judge_auc, selected_accuracy, selection_weights, subset_accuracy

SCORES, CORRECT = [7, 9, 5, 9], [1, 0, 1, 1]


def test_weights_and_accuracy_of_the_worked_pool():
    assert selection_weights(SCORES, 1).round(6).tolist() == [0.06284, 0.464328, 0.008504, 0.464328]
    found = [round(selected_accuracy(SCORES, CORRECT, t), 6) for t in (1, 2, 10, 0, math.inf)]
    assert found == [0.535672, 0.600514, 0.713389, 0.5, 0.75]


def test_subset_averages_of_the_worked_pool():
    assert [round(subset_accuracy(SCORES, CORRECT, k, 2), 6) for k in (1, 2, 3, 4)] == [
        0.75,
        0.648024,
        0.611032,
        0.600514,
    ]
    assert [round(subset_accuracy(SCORES, CORRECT, k, 0), 6) for k in (1, 2, 3, 4)] == [0.75, 0.583333, 0.5, 0.5]


@pytest.mark.parametrize("scores", [[0.3, 2.0, -1.0, 5.5, 4.0, 1.0], [1, 1, 2, 2, 2, 0]])
@pytest.mark.parametrize("k", [1, 2, 4, 6])
@pytest.mark.parametrize("temperature", [0, 0.7, math.inf])
def test_subsets_by_brute_force(scores, k, temperature):
    correct = [1, 0, 0.5, 0, 1, 1]
    values = [
        selected_accuracy([scores[i] for i in s], [correct[i] for i in s], temperature)
        for s in itertools.combinations(range(6), k)
    ]
    assert subset_accuracy(scores, correct, k, temperature) == pytest.approx(np.mean(values), abs=1e-12)


def test_random_subsets_are_near_all_of_them():
    rng = np.random.default_rng(0)
    scores, correct = rng.normal(size=24), (rng.random(24) < 0.4).astype(float)  # C(24, 6) = 134,596 subsets
    sampled = subset_accuracy(scores, correct, 6, 1e-9)
    assert sampled == pytest.approx(best_of(scores, correct, 6), abs=4 * 0.5 / math.sqrt(200))
    assert sampled == subset_accuracy(scores, correct, 6, 1e-9)


def test_invariants():
    rng = np.random.default_rng(1)
    r, c = rng.normal(size=8), rng.random(8)
    for t in (0, 0.3, 2):
        value = selected_accuracy(r, c, t)
        assert selected_accuracy(r + 100, c, t) == pytest.approx(value)
        assert selected_accuracy(5 * r, c, 5 * t) == pytest.approx(value)
        assert c.min() <= value <= c.max()
        assert subset_accuracy(r, c, 1, t) == pytest.approx(c.mean())
    assert selected_accuracy(SCORES, CORRECT, 1e-6) == pytest.approx(selected_accuracy(SCORES, CORRECT, 0))
    assert selected_accuracy([1e4, -1e4], [1, 0], 1) == 1  # exp(1e4) would overflow


def test_perfect_judge_reaches_pass_at_k():
    c = [1.0] * 3 + [0.0] * 9
    values = [subset_accuracy(c, c, k, 0) for k in range(1, 13)]
    assert values == pytest.approx([pass_at_k(3, 12, k) for k in range(1, 13)])
    assert values == sorted(values)


def test_auc_by_counting_pairs():
    scores, correct = [[3, 1, 2], [9, 8, 9]], [[1, 0, 0], [1, 1, 0]]
    # All pairs: right {3, 9, 8} against wrong {1, 2, 9}: 2 + 2.5 + 2 of 9. Within: 3 beats 1, 2; 9 ties 9, 8 loses.
    assert judge_auc(scores, correct) == pytest.approx((6.5 / 9, 2.5 / 4))
    assert judge_auc([[1, 2]], [[1, 1]]) == (None, None)
    assert judge_auc([[1, 2], [3, 4]], [[1, 1], [0, 0]]) == (0, None)


def test_bad_input():
    with pytest.raises(ValueError, match="finite"):
        selection_weights([1, float("nan")], 1)
    with pytest.raises(ValueError, match="temperature -1"):
        selection_weights([1, 2], -1)
    with pytest.raises(ValueError, match="k = 5"):
        subset_accuracy(SCORES, CORRECT, 5, 1)
    with pytest.raises(ValueError, match="a score and a verdict"):
        subset_accuracy([1, 2], [1], 1, 0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        best_of([1, 2], [2, 0], 1)


# The Gaussian model: y ~ N(0, 1), judge reward r = -(y - m_R)^2, error (y - m_T)^2 of the selected y.


def gaussian_error(k, temperature, teacher, judge, mean=0.0):
    """Exact E[sum_i w_i (y_i - m_T)^2] by 1/S = integral_0^inf exp(-u S) du, u = exp(v):
    k * integral E[(y - m_T)^2 e^(r/T) exp(-u e^(r/T))] * E[exp(-u e^(r/T))]^(k-1) du.
    """
    if k == 1:
        return (mean - teacher) ** 2 + 1
    y = np.linspace(mean - 9, mean + 9, 4_001)
    density = np.exp(-((y - mean) ** 2) / 2) / math.sqrt(2 * math.pi) * (y[1] - y[0])
    log_s = -((y - judge) ** 2) / temperature
    total, v = 0.0, np.linspace(-40, 60, 1_001)
    for point in v:
        # (y - m_T)^2 u s exp(-u s) density and its partner, both bounded
        us = np.exp(np.minimum(point + log_s, 50))
        decay = np.exp(-us)
        total += (density * (y - teacher) ** 2 * us * decay).sum() * (density * decay).sum() ** (k - 1)
    return k * total * (v[1] - v[0])


def best_of_error(k, teacher, mean):
    """Perfect judge at T = 0: E[min_i (y_i - m_T)^2] = integral_0^inf P(|y - m_T| > d)^k 2 d dd."""
    d, erf = np.linspace(0, 8, 400_001), np.vectorize(math.erf)
    coarse = np.concatenate([np.linspace(0, 0.2, 8_001), np.linspace(0.2, 8, 8_001)[1:]])
    inside = (erf((teacher + coarse - mean) / math.sqrt(2)) - erf((teacher - coarse - mean) / math.sqrt(2))) / 2
    return float(np.trapezoid((1 - np.interp(d, coarse, inside)) ** k * 2 * d, d))


def simulated_error(k, temperature, teacher, judge, trials):
    y = np.random.default_rng(0).normal(size=(trials, k))
    weights = selection_weights(-((y - judge) ** 2), temperature)
    return float((weights * (y - teacher) ** 2).sum(1).mean())


def expansion(k, temperature, teacher, judge):
    """High temperature, to second order in 1/T, s = 1, m = 0."""
    a, b, x = -teacher, -judge, 2 / temperature
    first = (1 - 1 / k) * x * (1 + 2 * a * b)
    return a**2 + 1 - first + (1 - 1 / k) * (1 - 2 / k) * x**2 * (1 + b * (b + 2 * a))


def test_aligned_judge_error_falls_with_k():
    found = [round(gaussian_error(k, 2, 0.2, 0.2), 6) for k in (1, 2, 3, 4, 8, 16, 32)]
    assert found == [1.04, 0.667662, 0.597336, 0.570439, 0.537277, 0.523042, 0.516385]


def test_biased_judge_error_has_a_minimum_in_k():
    found = [round(gaussian_error(k, 2, 0.2, 2.2), 6) for k in (1, 2, 3, 4, 8, 16, 32)]
    assert found == [1.04, 0.778719, 0.834037, 0.907921, 1.088477, 1.201581, 1.257391]
    assert np.argmin(found) == 1


def test_biased_judge_error_has_a_minimum_in_temperature():
    found = [round(gaussian_error(8, t, 0.2, 2.2), 6) for t in (0.5, 1, 2, 5, 10, 50)]
    assert found == [1.619365, 1.392927, 1.088477, 0.854055, 0.857872, 0.981072]


def test_higher_temperature_moves_the_best_k_up():
    ks = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
    best = [ks[int(np.argmin([gaussian_error(k, t, 0.2, 2.2) for k in ks]))] for t in (0.5, 1, 2, 5, 10, 20)]
    assert best == [2, 2, 2, 3, 6, 64]


@pytest.mark.parametrize(("k", "judge"), [(2, 2.2), (8, 2.2), (8, 0.2)])
def test_selection_code_agrees_with_the_solved_model(k, judge):
    assert simulated_error(k, 2, 0.2, judge, 100_000) == pytest.approx(gaussian_error(k, 2, 0.2, judge), abs=0.01)


def test_high_temperature_expansion_and_its_best_temperature():
    assert round(expansion(8, 40, 0.2, -0.1), 6) == 0.999591
    assert gaussian_error(8, 40, 0.2, -0.1) == pytest.approx(0.998864, abs=1e-3)
    a, b = -0.2, 0.1
    best = 4 * (1 - 2 / 8) * (1 + b * (b + 2 * a)) / (1 + 2 * a * b)
    assert round(best, 6) == 3.03125
    grid = np.linspace(2, 5, 30_001)
    assert grid[np.argmin(expansion(8, grid, 0.2, -0.1))] == pytest.approx(best, abs=1e-3)


def test_perfect_judge_error_falls_like_one_over_k_squared():
    # a = m - m_T = -0.5
    exact = [best_of_error(k, 0.5, 0.0) for k in (16, 64, 256, 1024)]
    assert exact == pytest.approx([1.340250e-2, 9.415536e-4, 6.084287e-5, 3.835789e-6], rel=2e-4)
    theory = [math.pi * math.exp(0.25) / k**2 for k in (16, 64, 256, 1024)]
    assert theory == pytest.approx([1.575736e-2, 9.848352e-4, 6.155220e-5, 3.847012e-6], rel=1e-6)
    ratios = [e / t for e, t in zip(exact, theory, strict=True)]
    assert ratios == sorted(ratios) and ratios[-1] > 0.99


def test_biased_judge_leaves_its_own_bias():
    # k to infinity at T = 0: (m_R - m_T)^2; with m_R = 1, m_T = 0 the code's best-of-4096 picks y near 1.
    y = np.random.default_rng(0).normal(size=(200, 4_096))
    assert (selection_weights(-((y - 1) ** 2), 0) * y**2).sum(1).mean() == pytest.approx(1, abs=1e-3)
