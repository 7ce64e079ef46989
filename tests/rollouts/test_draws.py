"""Sum tree: sums, updates and draws without replacement against enumeration by hand."""

from __future__ import annotations

import collections
import doctest
import itertools

import numpy as np
import pytest

from trl_ext.rollouts import draws
from trl_ext.rollouts.draws import SumTree


def order_probability(weights, order):
    """Successive draws: product of w / (what is left)."""
    left, probability = sum(weights), 1.0
    for i in order:
        probability *= weights[i] / left
        left -= weights[i]
    return probability


def test_examples_in_the_documentation():
    assert doctest.testmod(draws).failed == 0


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
def test_total_and_weights_after_updates(n):
    rng = np.random.default_rng(0)
    weights = rng.random(n)
    tree = SumTree(weights)
    assert tree.total == pytest.approx(weights.sum(), abs=1e-12) and len(tree) == n
    for _ in range(5):
        rows = rng.permutation(n)[: max(1, n // 2)]
        weights[rows] = rng.random(len(rows))
        tree.set(rows, weights[rows])
        assert tree.total == pytest.approx(weights.sum(), abs=1e-12)
        assert tree.weights.tolist() == weights.tolist()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_order_comes_as_often_as_it_should(count):
    """20000 draws of 3 weights: each order's share is within 5 standard errors of its probability."""
    weights, rng, repeats = [1.0, 2.0, 5.0], np.random.default_rng(0), 20000
    tree = SumTree(weights)
    seen = collections.Counter(tuple(tree.draw(rng, count).tolist()) for _ in range(repeats))
    orders = list(itertools.permutations(range(3), count))
    assert sum(order_probability(weights, order) for order in orders) == pytest.approx(1)
    for order in orders:
        expected = order_probability(weights, order)
        assert abs(seen[order] / repeats - expected) < 5 * (expected * (1 - expected) / repeats) ** 0.5


def test_a_draw_leaves_the_weights_as_they_were():
    weights = np.random.default_rng(1).random(100)
    tree = SumTree(weights)
    total = tree.total
    rows = tree.draw(np.random.default_rng(2), 60)
    assert len(set(rows.tolist())) == 60 and rows.dtype == np.int64
    assert tree.weights.tolist() == weights.tolist() and tree.total == total


def test_weight_zero_is_never_drawn():
    weights = [0.0, 1.0, 0.0, 1e-12, 0.0, 1.0, 0.0]
    for seed in range(200):
        assert set(SumTree(weights).draw(np.random.default_rng(seed), 3).tolist()) == {1, 3, 5}


class AlmostOne:
    """A generator whose every number is the largest below 1."""

    def random(self, count):
        return np.full(count, np.nextafter(1.0, 0.0))


@pytest.mark.parametrize("weights", [[0.1, 0.2, 0.3, 0.0, 0.0], [0.1] * 7 + [0.0] * 9, [0.3, 0.0]])
def test_the_end_of_the_range_does_not_fall_off_the_positive_weights(weights):
    """Sums of decimals round; the last point still belongs to a row that has a weight."""
    last = max(i for i, w in enumerate(weights) if w > 0)
    assert SumTree(weights).draw(AlmostOne(), 1).tolist() == [last]


def test_too_few_positive_weights():
    tree = SumTree([0.0, 1.0, 2.0, 0.0])
    with pytest.raises(ValueError, match="3 different rows are asked for, but only 2 have a positive weight"):
        tree.draw(np.random.default_rng(0), 3)
    assert tree.weights.tolist() == [0, 1, 2, 0]  # also then


def test_same_weights_by_another_history_draw_the_same():
    """Increments would leave other last bits behind; sums of children do not."""
    rng = np.random.default_rng(3)
    updated = SumTree(np.full(50, 0.5))
    for _ in range(30):
        updated.set(rng.permutation(50)[:7], rng.random(7))
    rebuilt = SumTree(updated.weights)
    assert rebuilt.total == updated.total
    for seed in range(20):
        first, second = (tree.draw(np.random.default_rng(seed), 10) for tree in (updated, rebuilt))
        assert first.tolist() == second.tolist()


def test_a_draw_touches_few_nodes_of_a_large_tree(monkeypatch):
    """2^20 rows, 8 drawn: each level of the tree is looked at for these rows alone."""
    tree, sizes = SumTree(np.ones(1 << 20)), []
    original = SumTree._put
    monkeypatch.setattr(SumTree, "_put", lambda self, i, w: (sizes.append(len(i)), original(self, i, w))[1])
    tree.draw(np.random.default_rng(0), 8)
    tree.set(np.array([5]), np.array([2.0]))
    assert sum(sizes) == 8 + 8 + 1 and tree.total == (1 << 20) + 1


@pytest.mark.parametrize("weights", [[1.0, -0.1], [float("nan"), 1.0], [1.0, float("inf")], [], [[1.0]]])
def test_weights_that_are_none(weights):
    with pytest.raises(ValueError, match="weight"):
        SumTree(weights)
