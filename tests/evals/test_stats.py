"""evals.stats against worked numbers, slow references and known tables."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from evals import stats
from evals.statistics.quantiles import t_central

# The worked example, K = 8 replies to each of 10 questions.
BASE = [0, 0, 0.125, 0.25, 0.5, 0.5, 0.75, 1, 1, 0]
ADAPTER = [0, 0.125, 0.25, 0.25, 0.75, 0.5, 1, 1, 0.875, 0.125]


def replies(means, k=8):
    return [[1.0] * round(m * k) + [0.0] * (k - round(m * k)) for m in means]


def test_paired_example_to_six_decimals():
    found = stats.compare(replies(BASE), replies(ADAPTER))
    assert found.difference == pytest.approx(0.075, abs=1e-12)
    assert round(found.standard_error, 6) == 0.038188
    assert (round(found.low, 6), round(found.high, 6)) == (-0.011388, 0.161388)
    assert found.p == 0.15625
    assert round(found.detectable, 6) == 0.106987
    assert (found.n, found.wins, found.losses, found.ties) == (10, 5, 1, 4)
    assert found.verdict == "no evidence"


def test_single_example_to_six_decimals():
    assert round(stats.effective_n(np.array(BASE), 80), 6) == 15.156352
    found = stats.estimate(replies(BASE))
    assert (found.mean, found.n, found.samples) == (0.4125, 10, 8)
    assert (round(found.low, 6), round(found.high, 6)) == (0.186275, 0.682898)


def test_mcnemar_is_the_sign_flip_test_of_single_replies():
    d = [1.0] * 12 + [-1.0] * 4 + [0.0] * 30
    tail = sum(math.comb(16, i) for i in range(12, 17)) / 2**16
    assert stats.sign_flip_p(d) == pytest.approx(2 * tail, abs=1e-15)
    assert round(stats.sign_flip_p(d), 6) == 0.076813


def test_sign_flip_equals_counting_every_pattern():
    d = np.array([0.3, -0.1, 0.25, 0.5, -0.45, 0.125, 0.2])
    sums = [abs(sum(s * v for s, v in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=7)]
    assert stats.sign_flip_p(d) == np.mean([s >= abs(d.sum()) - 1e-12 for s in sums])


def test_random_flips_agree_with_the_exact_binomial_tail_and_repeat():
    d = [1.0] * 18 + [-1.0] * 8  # 26 signs: too many to count, McNemar's tail is known
    exact = 2 * sum(math.comb(26, i) for i in range(18, 27)) / 2**26
    found = stats.sign_flip_p(d, seed=3)
    assert abs(found - exact) < 4 * math.sqrt(exact * (1 - exact) / stats.FLIPS)
    assert found == stats.sign_flip_p(d, seed=3) != stats.sign_flip_p(d, seed=4)
    assert stats.sign_flip_p([1.0] * 60) == 1 / (1 + stats.FLIPS)  # never zero


@pytest.mark.parametrize(
    ("df", "expected"), [(1, 12.706205), (2, 4.302653), (9, 2.262157), (30, 2.042272), (255, 1.969311)]
)
def test_t_quantile_against_the_tables(df, expected):
    assert stats.t_quantile(df) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 50])
def test_t_central_equals_the_integral_of_the_density(df):
    x = np.linspace(-1.7, 1.7, 200_001)
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    assert t_central(1.7, df) == pytest.approx(
        np.trapezoid(constant * (1 + x**2 / df) ** (-(df + 1) / 2), x), abs=1e-8
    )


def test_wilson_solves_its_quadratic():
    # The bounds are the p with |m - p| = q sqrt(p (1 - p) / n).
    for bound in stats.wilson_interval(0.3, 40, 1.96):
        assert abs(0.3 - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / 40), abs=1e-12)


def test_single_replies_use_one_reply_per_question():
    # K = 1: SE^2 = m (1 - m) / (N - 1), so n_eff = N - 1; never more than the number of replies.
    assert stats.effective_n(np.array([1.0, 0, 0, 1, 1]), 5) == pytest.approx(4)
    assert stats.effective_n(np.array([0.5, 0.5, 0.5, 0.6]), 8) == 8


@pytest.mark.parametrize(("score", "edge"), [(0.0, "low"), (1.0, "high")])
def test_all_wrong_or_all_right_still_has_a_width(score, edge):
    found = stats.estimate([[score] * 4] * 50)
    assert getattr(found, edge) == found.mean == score
    assert 0.05 < found.high - found.low < 0.1  # one-sided: q^2 / (n + q^2) = 0.0747 at n = 50


def test_no_change_is_no_evidence():
    found = stats.compare(replies(BASE), replies(BASE))
    assert (found.difference, found.low, found.high, found.p, found.detectable) == (0, 0, 0, 1, 0)
    assert (found.ties, found.verdict) == (10, "no evidence")


def test_verdict_needs_test_and_interval_to_agree():
    up = stats.compare([0.0] * 30 + [1.0] * 10, [1.0] * 25 + [0.0] * 5 + [1.0] * 10)
    assert (up.verdict, up.wins, up.losses) == ("better", 25, 0)
    down = stats.compare([1.0] * 25 + [0.0] * 5 + [1.0] * 10, [0.0] * 30 + [1.0] * 10)
    assert down.verdict == "worse"
    assert (down.low, down.high) == (-up.high, -up.low)
    few = stats.compare([0.0] * 4, [1.0] * 4)  # the t interval is a point, but 2 of 16 patterns are as extreme
    assert (few.low, few.high, few.p, few.verdict) == (1, 1, 0.125, "no evidence")


def test_coverage_of_the_intervals():
    # Abilities from Beta(2, 4), a gain that differs between questions: nominal 95 %, 3 sigma of 300 runs is 3.8 %.
    rng, runs, single, paired = np.random.default_rng(0), 300, 0, 0
    for _ in range(runs):
        ability = rng.beta(2, 4, 40)
        gain = np.clip(ability + rng.normal(0.1, 0.1, 40), 0, 1)
        before, after = (rng.random((40, 4)) < p[:, None] for p in (ability, gain))
        found = stats.estimate(before)
        single += found.low <= 1 / 3 <= found.high
        mean_gain = 0.1000  # E[clip(a + g, 0, 1) - a] from 10^7 draws
        difference = stats.compare(before, after)
        paired += difference.low <= mean_gain <= difference.high
    assert 0.912 < single / runs < 0.988
    assert 0.912 < paired / runs < 0.988


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "expected"),
        ([[], []], "expected"),
        ([[[1.0]]], "expected"),
        ([1.0], "at least 2"),
        ([[1, 0], [1]], "same number"),
        ([0.5, 1.5], r"\[0, 1\]"),
        ([0.5, float("nan")], r"\[0, 1\]"),
    ],
)
def test_bad_scores(bad, message):
    with pytest.raises(ValueError, match=message):
        stats.estimate(bad)


def test_other_bad_input():
    with pytest.raises(ValueError, match="3 questions before and 2 after"):
        stats.compare([0, 1, 1], [0, 1])
    for bad in ([], [[1.0]], [float("inf")]):
        with pytest.raises(ValueError, match="finite differences"):
            stats.sign_flip_p(bad)
    with pytest.raises(ValueError, match=r"mean 1\.2"):
        stats.wilson_interval(1.2, 10, 1.96)
    with pytest.raises(ValueError, match="df 0"):
        stats.t_quantile(0)


def test_fixed_questions_to_six_decimals():
    found = stats.fixed_interval(replies(BASE), replies(ADAPTER))
    half = 1.959964 * 0.055097
    assert found == pytest.approx((0.075 - half, 0.075 + half), abs=2e-6)
    noise = sum(p * (1 - p) / 7 + q * (1 - q) / 7 for p, q in zip(BASE, ADAPTER, strict=True))
    assert round(math.sqrt(noise) / 10, 6) == 0.055097


def test_fixed_questions_need_four_replies():
    table = [[0, 1, 1], [1, 1, 0], [0, 0, 1]]
    assert stats.fixed_interval(table, table) is None
    four = [[0, 1, 1, 0], [1, 1, 0, 0]]
    low, high = stats.fixed_interval(four, four)
    assert low == -high < 0  # no change, but other replies might have shown one


def test_clusters_replace_questions():
    # Two templates of two questions and one of one: cluster means 0.5, 0.25, 1.
    scores, groups = [[1, 1], [0, 0], [0, 1], [0, 0], [1, 1]], ["a", "a", "b", "b", "c"]
    found = stats.estimate(scores, groups)
    assert found.mean == pytest.approx((0.5 + 0.25 + 1) / 3)
    assert (found.n, found.samples) == (5, 2)
    units = np.array([0.5, 0.25, 1.0])
    effective = min(10, units.mean() * (1 - units.mean()) / (units.var(ddof=1) / 3))
    expected = stats.wilson_interval(units.mean(), effective, stats.t_quantile(2))
    assert (found.low, found.high) == pytest.approx(expected)


def test_clusters_of_one_question_change_nothing():
    names = [str(i) for i in range(10)]
    assert stats.estimate(replies(BASE), names) == stats.estimate(replies(BASE))
    assert stats.compare(replies(BASE), replies(ADAPTER), groups=names) == stats.compare(
        replies(BASE), replies(ADAPTER)
    )
    assert stats.fixed_interval(replies(BASE), replies(ADAPTER), names) == pytest.approx(
        stats.fixed_interval(replies(BASE), replies(ADAPTER))
    )


def test_fixed_questions_weigh_clusters_equally():
    before, after = [[0, 1, 1, 0], [1, 1, 0, 1], [0, 0, 0, 1]], [[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]]
    low, high = stats.fixed_interval(before, after, ["a", "a", "b"])
    # Weights 1/4, 1/4, 1/2; p (1 - p) / 3 of each side: 1/12 + 1/16, 1/16 + 0, 1/16 + 1/12.
    noise = (1 / 12 + 1 / 16) / 16 + (1 / 16) / 16 + (1 / 16 + 1 / 12) / 4
    assert (low + high) / 2 == pytest.approx(0.25)
    assert (high - low) / 2 == pytest.approx(1.959964 * math.sqrt(noise), rel=1e-6)


def test_copies_of_a_question_add_nothing_when_clustered():
    groups = [name for name in "abcdefghij" for _ in range(5)]
    before, after = ([m for m in means for _ in range(5)] for means in (BASE, ADAPTER))
    once, copies = stats.compare(BASE, ADAPTER), stats.compare(before, after, groups=groups)
    assert (copies.low, copies.high, copies.p) == pytest.approx((once.low, once.high, once.p))
    assert (copies.n, copies.wins, copies.losses, copies.ties) == (50, 25, 5, 20)  # questions
    assert stats.compare(before, after).high < once.high  # without clusters: falsely narrow


@pytest.mark.parametrize(("groups", "message"), [(["a"], "1 groups for 10"), (["a"] * 10, "at least 2 clusters")])
def test_bad_groups(groups, message):
    with pytest.raises(ValueError, match=message):
        stats.estimate(replies(BASE), groups)
