"""Alpha spending: published bounds, the total level by simulation, and the cost of looking without it."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from evals.statistics.sequential import information_fraction, look_levels, spent


def bounds(fractions):
    return [NormalDist().inv_cdf(1 - level / 2) for level in look_levels(fractions)]


def test_published_bounds():
    # O'Brien-Fleming spending, two-sided 5 %, four equal looks (Lan and DeMets' tables).
    assert bounds([0.25, 0.5, 0.75, 1]) == pytest.approx([4.3326, 2.9631, 2.3590, 2.0141], abs=3e-4)
    assert bounds([0.2, 0.4, 0.6, 0.8, 1]) == pytest.approx([4.8769, 3.3569, 2.6803, 2.2898, 2.0310], abs=3e-4)


def test_one_look_is_the_plain_test():
    assert look_levels([1.0]) == pytest.approx((0.05,), abs=1e-9)
    assert spent(1.0) == pytest.approx(0.05)
    assert spent(0.25) == pytest.approx(4 * NormalDist().cdf(-2.2414027 / 0.5), rel=1e-6)


def test_type_one_error_over_all_looks():
    # B(t) gains independent increments; the same looks at p < 0.05 each err far more often.
    rng, fractions = np.random.default_rng(0), np.array([0.25, 0.5, 0.75, 1.0])
    z = rng.normal(0, 0.5, (100_000, 4)).cumsum(1) / np.sqrt(fractions)
    assert (np.abs(z) > bounds(fractions.tolist())).any(1).mean() == pytest.approx(0.05, abs=0.0021)  # 3 sigma
    assert (np.abs(z) > 1.96).any(1).mean() > 0.11


def test_type_one_error_with_samples_added_to_the_same_questions():
    # True differences vary over questions around zero; each look averages more replies to the same 60 questions.
    rng, between, within, ks = np.random.default_rng(1), 0.02, 0.3, [2, 4, 8, 16]
    levels = look_levels([information_fraction(between, within, k, 16) for k in ks])
    rejected, runs = 0, 4_000
    for _ in range(runs):
        replies = rng.normal(0, math.sqrt(between), (60, 1)) + rng.normal(0, math.sqrt(within), (60, 16))
        d = np.stack([replies[:, :k].mean(1) for k in ks])
        z = d.mean(1) / math.sqrt(1 / 60) / np.sqrt([between + within / k for k in ks])
        rejected += any(2 * NormalDist().cdf(-abs(v)) < level for v, level in zip(z, levels, strict=True))
    assert rejected / runs == pytest.approx(0.05, abs=0.0104)  # 3 sigma


def test_information_fraction_by_hand():
    assert information_fraction(0, 0.3, 4, 16) == pytest.approx(0.25)  # only noise: proportional to replies
    assert information_fraction(0.3, 0, 4, 16) == 1  # only questions: more replies tell nothing
    assert information_fraction(0.02, 0.32, 4, 16) == pytest.approx(0.04 / 0.10)


@pytest.mark.parametrize("fractions", [[], [0.5, 0.5], [1.0, 0.5], [0.5, 1.1], [0.0, 1.0]])
def test_bad_fractions(fractions):
    with pytest.raises(ValueError, match="fraction"):
        look_levels(fractions)


def test_bad_samples_and_variances():
    with pytest.raises(ValueError, match="between 1 and"):
        information_fraction(0.1, 0.1, 17, 16)
    with pytest.raises(ValueError, match="variances"):
        information_fraction(0, 0, 1, 16)
