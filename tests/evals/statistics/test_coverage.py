"""Coverage by simulation: the conclusions of the design's tables, with fixed seeds and fewer repetitions."""

from __future__ import annotations

import numpy as np
import pytest

from evals import stats
from evals.statistics.quantiles import wilson_interval


@pytest.mark.parametrize(("a", "b"), [(0.15, 3.0), (0.4, 2.0), (0.6, 0.9)])  # true accuracy 4.8, 16.7, 40 %
def test_wilson_on_effective_replies_covers_and_pooled_replies_do_not(a, b):
    rng, runs, effective, pooled, truth = np.random.default_rng(0), 1_000, 0, 0, a / (a + b)
    for _ in range(runs):
        table = rng.random((30, 32)) < rng.beta(a, b, 30)[:, None]
        found = stats.estimate(table)
        effective += found.low <= truth <= found.high
        low, high = wilson_interval(table.mean(), table.size, 1.96)
        pooled += low <= truth <= high
    assert effective / runs >= 0.90
    assert pooled / runs <= 0.55


def test_paired_t_covers_and_unpaired_bars_find_nothing():
    rng, runs, covered, found, unpaired = np.random.default_rng(1), 300, 0, 0, 0
    for _ in range(runs):
        p = rng.beta(0.45, 1.05, 30)
        gain = rng.uniform(-0.05, 0.2, 30)
        q = np.clip(p + gain, 0, 1)
        before, after = (rng.random((30, 32)) < ability[:, None] for ability in (p, q))
        c = stats.compare(before, after)
        truth = 0.0736  # E[clip(p + gain, 0, 1) - p] from 10^7 draws
        covered += c.low <= truth <= c.high
        found += c.verdict == "better"
        errors = [stats.standard_error(t.mean(1)) for t in (before, after)]
        unpaired += abs(c.difference) > 1.96 * np.hypot(*errors)
    assert 0.91 < covered / runs < 0.99
    assert found / runs > 0.9 > 0.1 > unpaired / runs


def test_no_change_is_seldom_called_one():
    rng, runs, called = np.random.default_rng(2), 300, 0
    for _ in range(runs):
        p = rng.beta(0.45, 1.05, 30)[:, None]
        called += stats.compare(rng.random((30, 8)) < p, rng.random((30, 8)) < p).verdict != "no evidence"
    assert called / runs < 0.09  # 5 %, plus 3 sigma


def test_fixed_interval_covers_the_difference_on_these_questions():
    rng, runs, covered = np.random.default_rng(3), 400, 0
    p, q = rng.beta(2, 3, 30), rng.beta(2, 3, 30)
    for _ in range(runs):
        before, after = (rng.random((30, 8)) < ability[:, None] for ability in (p, q))
        low, high = stats.fixed_interval(before, after)
        covered += low <= (q - p).mean() <= high
    assert 0.91 < covered / runs < 0.98


def test_templates_need_clusters():
    # 12 templates of 10 questions whose difference is the template's.
    rng, runs, plain, clustered = np.random.default_rng(4), 200, 0, 0
    groups = [str(i // 10) for i in range(120)]
    for _ in range(runs):
        shift = rng.normal(0, 0.15, 12).repeat(10)[:, None]
        before = rng.random((120, 4)) < 0.5
        after = rng.random((120, 4)) < np.clip(0.5 + shift, 0, 1)
        one, many = stats.compare(before, after), stats.compare(before, after, groups=groups)
        plain += one.low <= 0 <= one.high
        clustered += many.low <= 0 <= many.high
    assert clustered / runs > 0.90
    assert plain / runs < 0.80
