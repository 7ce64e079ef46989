"""Plans by hand, round trips through the detectable effect, and a pilot whose variances are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evals.statistics.planning import Variances, assumed_variances, detectable, plan_effect, variances_of_means

FACTOR = 2.8015852  # z_0.975 + z_0.8


def test_smallest_number_of_replies_by_hand():
    # 100 questions, effect 0.1: (0.1 / 2.8016)^2 = 0.00127411; K = 0.4 / (0.127411 - 0.05) = 5.17 -> 6.
    plan = plan_effect(0.1, 100, Variances(0.05, 0.4), tokens_per_reply=500)
    assert plan.samples == 6
    assert plan.detectable == pytest.approx(FACTOR * math.sqrt((0.05 + 0.4 / 6) / 100), rel=1e-6)
    assert plan.floor == pytest.approx(FACTOR * math.sqrt(0.05 / 100), rel=1e-6)
    assert plan.tokens == 6 * 100 * 2 * 500
    assert plan.questions_needed == (math.ceil(0.45 / 0.00127411), math.ceil(0.05 / 0.00127411))
    assert "6 replies" in plan.words and "600,000 tokens" in plan.words


@pytest.mark.parametrize("effect", [0.05, 0.08, 0.15, 0.4])
def test_one_reply_fewer_would_not_do(effect):
    variances = Variances(0.01, 0.35)
    plan = plan_effect(effect, 60, variances)
    assert plan.detectable <= effect
    assert plan.samples == 1 or detectable(variances, 60, plan.samples - 1) > effect


def test_what_no_number_of_replies_can_show():
    plan = plan_effect(0.05, 30, Variances(0.0169, 0.28), tokens_per_reply=100)
    assert (plan.samples, plan.tokens) == (None, None)
    assert plan.detectable == plan.floor == pytest.approx(FACTOR * 0.13 / math.sqrt(30), rel=1e-6)
    assert "even with ever more replies the smallest is 6.6 points" in plan.words
    assert plan_effect(0.05, plan.questions_needed[1] + 1, Variances(0.0169, 0.28)).samples is not None


def test_pilot_finds_the_variances_it_was_drawn_from():
    rng, n, k = np.random.default_rng(0), 4_000, 4
    p = rng.uniform(0.2, 0.6, (n, 1))
    q = p + rng.uniform(-0.1, 0.3, (n, 1))  # variance of the true difference 0.4^2 / 12
    before, after = ((rng.random((n, k)) < x).mean(1) for x in (p, q))
    found = variances_of_means(before, after, k)
    assert found.between == pytest.approx(0.16 / 12, abs=0.006)
    assert found.within == pytest.approx(float((p * (1 - p) + q * (1 - q)).mean()), abs=0.01)


def test_assumption_from_an_accuracy():
    found = assumed_variances(0.3)
    assert found.within == pytest.approx(2 * 0.21 * 2 / 3)
    assert found.between == pytest.approx(0.13**2)
    # The simulated pairs of the design: 30 questions, K = 1, 8, 32: widths of 41, 17 and 12 points.
    for k, width in ((1, 0.41), (8, 0.17), (32, 0.12)):
        assert 2 * 2.045 * math.sqrt(found.at(k) / 30) == pytest.approx(width, abs=0.006)


def test_bad_plans():
    with pytest.raises(ValueError, match="one reply to each question"):
        variances_of_means([1, 0], [1, 1], 1)
    with pytest.raises(ValueError, match="accuracy"):
        assumed_variances(1.0)
    with pytest.raises(ValueError, match="effect above 0"):
        plan_effect(0.0, 30, Variances(0.1, 0.1))
