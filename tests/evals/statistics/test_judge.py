"""The judge's report on pools whose judge is known to be good, useless or biased."""

from __future__ import annotations

import numpy as np
import pytest

from evals.statistics.curves import pass_at_k
from evals.statistics.judge import judge_curves
from evals.statistics.selection import subset_accuracy


def pools(prompts=80, replies=16, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.random((prompts, replies)) < rng.uniform(0.1, 0.7, (prompts, 1))).astype(float), rng


def test_perfect_judge():
    c, _ = pools()
    found = judge_curves(c, c)
    assert found.k == (1, 2, 4, 8, 16)
    assert found.accuracy[0] == pytest.approx(found.pass_at)
    assert found.pass_at[2] == pytest.approx(np.mean([pass_at_k(int(n), 16, 4) for n in c.sum(1)]))
    assert (found.auc, found.auc_within) == (1, 1)
    assert found.best_k[0] in (8, 16) and not any(found.over_optimised)
    assert found.vote is None
    assert "over-optimised" not in found.words


def test_biased_judge_is_flagged_and_a_high_temperature_hides_it():
    # The judge likes right replies, but likes one rare wrong trait much more.
    c, rng = pools(prompts=150)
    trait = (rng.random(c.shape) < 0.2) & (c == 0)
    found = judge_curves(2 * c + 8 * trait, c, temperatures=(0.0, 1.0, 50.0))
    assert found.over_optimised == (True, True, False)
    assert found.best_k[0] in (2, 4)
    assert found.accuracy[0][found.k.index(found.best_k[0])] > found.accuracy[0][0] > found.accuracy[0][-1]
    assert found.best_t[-1] > 0  # at k = 16 a softer choice is better
    assert found.words.endswith("the judge is over-optimised, choose among fewer")


def test_useless_judge():
    c, rng = pools(seed=3)
    found = judge_curves(rng.normal(size=c.shape), c)
    assert found.auc_within == pytest.approx(0.5, abs=0.06)
    assert found.accuracy[0] == pytest.approx([c.mean()] * 5, abs=0.15)
    assert [row[0] for row in found.accuracy] == pytest.approx([c.mean()] * len(found.temperatures))  # k = 1: any T


def test_a_drop_within_the_noise_is_not_flagged():
    c, rng = pools(prompts=6, seed=1)
    dropped = 0
    for _ in range(20):
        found = judge_curves(rng.normal(size=c.shape), c, temperatures=(0.0,))
        fell = found.accuracy[0][-1] < found.accuracy[0][found.k.index(found.best_k[0])]
        dropped += fell and not found.over_optimised[0]
    assert dropped >= 3


def test_relative_temperature_ignores_the_scale_of_the_scores():
    c, rng = pools(prompts=20)
    scores = c + rng.normal(size=c.shape)
    scale = rng.uniform(0.1, 50, (20, 1))
    found = [judge_curves(s, c, (1, 4), (0.5, 2.0), relative=True) for s in (scores, scores * scale)]
    assert found[0].accuracy[0] == pytest.approx(found[1].accuracy[0])
    expected = np.mean([subset_accuracy(r, row, 4, 0.5 * r.std()) for r, row in zip(scores, c, strict=True)])
    assert found[0].accuracy[0][1] == pytest.approx(expected)


def test_intervals_hold_the_mean_and_repeat():
    c, rng = pools()
    scores = c + rng.normal(size=c.shape)
    found = judge_curves(scores, c, seed=4)
    for low, mean, high in zip(found.low, found.accuracy, found.high, strict=True):
        assert all(a < b < d for a, b, d in zip(low, mean, high, strict=True))
    assert found == judge_curves(scores, c, seed=4)
    error = c.mean(1).std() / np.sqrt(len(c))  # k = 1: means of prompts
    assert found.high[0][0] - found.low[0][0] == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_majority_beside_the_judge():
    c = np.array([[1, 1, 0, 0.0], [0, 0, 0, 1.0]])
    answers = [["r", "r", "w", "v"], ["w", "w", "w", "r"]]
    found = judge_curves(c, c, (1, 4), answers=answers)
    assert found.vote is not None
    assert found.vote[1] == 0.5  # the first prompt's majority is right
    assert found.vote[0] == pytest.approx(c.mean(), abs=0.12)


def test_bad_input():
    with pytest.raises(ValueError, match=r"two \(prompts, replies\) tables"):
        judge_curves([[1, 2]], [[1, 0]])
    with pytest.raises(ValueError, match="must increase"):
        judge_curves([[1, 2]] * 2, [[1, 0]] * 2, (2, 1))
