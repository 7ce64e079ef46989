"""Live pass rates: the moving average, weighted draws that all processes agree on, and tables that come back."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch

from trl_ext.rollouts import pass_rates
from trl_ext.rollouts.pass_rates import PassRates, table_in


def frontier(rates):
    return np.exp(-((rates - 0.5) ** 2) / (2 * 0.35**2))


def made(n=20, **kwargs):
    return PassRates(n, weight=frontier, **kwargs)


def played(table, steps, seed=0, first=0):
    """Draws and updates in turn with outcomes that depend on the rows; -> what was drawn."""
    drawn = []
    for number in range(first, first + steps):
        rows = table.draw(6, seed, number)
        table.update(rows, (rows % 3) / 2)
        drawn.append(rows.tolist())
    return drawn


def test_examples_in_the_documentation():
    assert doctest.testmod(pass_rates).failed == 0


def test_only_visited_rows_move():
    table = PassRates(4, factor=0.75, initial=0.2, weight=frontier)
    table.update(torch.tensor([3, 1]), torch.tensor([1.0, 0.0]))
    table.update(torch.tensor([3]), torch.tensor([0.5]))
    assert table.rates.tolist() == pytest.approx([0.2, 0.15, 0.2, 0.75 * 0.4 + 0.125], abs=1e-12)
    assert table.visits.tolist() == [0, 1, 0, 2] and table.visited == 2
    assert table.weights.tolist() == frontier(table.rates.numpy()).tolist()


def test_a_row_that_occurs_twice_counts_with_its_mean():
    table = PassRates(3, factor=0.5, weight=frontier)
    table.update(torch.tensor([1, 0, 1]), torch.tensor([1.0, 1.0, 0.2]))
    assert table.rates.tolist() == pytest.approx([0.75, 0.25 + 0.3, 0.5]) and table.visits.tolist() == [1, 2, 0]
    assert table.weights.tolist() == frontier(table.rates.numpy()).tolist() and table.visited == 2
    assert table.histogram == pytest.approx([0, 0, 2 / 3, 1 / 3, 0])


def test_probabilities_effective_number_and_histogram_follow_the_table():
    table = made(50)
    played(table, 30)
    weights = frontier(table.rates.numpy())
    expected = weights / weights.sum()
    assert table.probabilities.tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    assert table.effective == pytest.approx(1 / (expected**2).sum(), rel=1e-12)
    counts = np.histogram(table.rates.numpy(), bins=pass_rates.BINS, range=(0, 1))[0]
    assert table.histogram == pytest.approx((counts / 50).tolist())


def test_histogram_counts_both_ends():
    table = PassRates(3, factor=0.0, weight=frontier)
    table.update(torch.tensor([0, 1]), torch.tensor([0.0, 1.0]))
    assert table.histogram == pytest.approx([1 / 3, 0, 1 / 3, 0, 1 / 3])


def test_draws_differ_within_a_rollout_and_are_a_function_of_seed_and_number():
    table = made()
    rows = table.draw(20, seed=7, number=3)
    assert sorted(rows.tolist()) == list(range(20)) and rows.dtype == torch.int64
    assert made().draw(20, 7, 3).tolist() == rows.tolist()
    assert made().draw(20, 7, 4).tolist() != rows.tolist() != made().draw(20, 8, 3).tolist()


def test_draws_follow_the_probabilities():
    """4000 first rows of a table of three: within 5 standard errors."""
    table, n = PassRates(3, factor=0.0, weight=lambda p: p), 4000
    table.update(torch.arange(3), torch.tensor([0.1, 0.3, 0.6]))
    shares = np.bincount([int(table.draw(1, 0, i)) for i in range(n)], minlength=3) / n
    expected = np.array([0.1, 0.3, 0.6])
    assert (abs(shares - expected) < 5 * (expected * (1 - expected) / n) ** 0.5).all()


def test_too_few_rows_with_a_weight():
    table = PassRates(3, factor=0.0, weight=lambda p: p * (1 - p))
    table.update(torch.tensor([0]), torch.tensor([1.0]))
    assert table.positive == 2
    with pytest.raises(ValueError, match="only 2 have a positive weight"):
        table.draw(3, 0, 0)
    table = PassRates(3, factor=0.5, weight=lambda p: p * (1 - p))
    table.update(torch.tensor([0, 1, 1]), torch.tensor([1.0, 0.0, 0.0]))  # halfway from 0.5: none at an end
    assert table.positive == 3


def test_all_weights_zero_have_no_effective_number():
    assert np.isnan(PassRates(3, weight=np.zeros_like).effective)


def test_a_loaded_table_goes_on_as_if_it_had_not_stopped():
    whole = made()
    drawn = played(whole, 12)
    stopped = made()
    played(stopped, 5)
    saved = {key: value.clone() for key, value in stopped.state_dict().items()}
    resumed = made()
    resumed.load(saved)
    assert played(resumed, 7, first=5) == drawn[5:]
    assert torch.equal(resumed.rates, whole.rates) and torch.equal(resumed.visits, whole.visits)
    assert (resumed.visited, resumed.histogram, resumed.effective) == (whole.visited, whole.histogram, whole.effective)
    assert resumed.positive == whole.positive == int((whole.weights > 0).sum())


def test_a_table_of_another_training_set_is_refused():
    with pytest.raises(ValueError, match="has 20 rows, the training set has 21: resume with the same training set"):
        made(21).load(made(20).state_dict())


def test_a_methods_state_holds_the_table():
    """One object as long as the tensors in the state are its own; a new one when a resume brings others."""
    state, cache = {"other": 1}, {}
    table = table_in(state, cache, made)
    table.update(torch.tensor([2]), torch.tensor([1.0]))
    assert state["rates"][2] == 0.55 and state["visits"][2] == 1
    assert table_in(state, cache, made) is table
    saved = {key: value.clone() if key != "other" else value for key, value in state.items()}
    table.update(torch.tensor([2]), torch.tensor([1.0]))
    state.clear()
    state.update(saved)
    again = table_in(state, cache, made)
    assert again is not table and again.rates is state["rates"] and again.rates[2] == 0.55
    assert again.weights[2] == frontier(np.array([0.55]))[0]
