"""Groups without signal, and how places are filled within a budget."""

from __future__ import annotations

import pytest
import torch

from trl_ext.rollouts.refill import Refill, has_signal, refill


def test_equal_rewards_are_no_signal():
    rewards = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 1, 0], [0.7, 0.7, 0.7], [0.7, 0.7, 0.7000001]])
    assert has_signal(rewards).tolist() == [False, False, True, False, True]
    third = torch.full((1, 8), 0.1) * 3  # the standard deviation of equal numbers is not always 0
    assert has_signal(third).tolist() == [False]
    assert has_signal(torch.zeros(0, 4)).tolist() == []


def test_bounds_of_the_mean_are_inclusive():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert has_signal(rewards, low=0.5).tolist() == [False, True, True, False]
    assert has_signal(rewards, high=0.5).tolist() == [True, True, False, False]
    assert has_signal(rewards, 0.25, 0.75).tolist() == [True, True, True, False]


def maker(*rounds):
    """What the rounds bring, and how many groups each was asked for."""
    asked, rest = [], list(rounds)

    def make(count):
        asked.append(count)
        return torch.tensor(rest.pop(0), dtype=torch.bool)

    return make, asked


def test_rounds_ask_for_what_is_missing_times_the_oversampling():
    make, asked = maker([0, 1, 0, 0, 0], [1, 0, 1])
    assert refill([1, 4, 6], make, rounds=5, oversample=1.5) == Refill({1: 1, 4: 5, 6: 7}, (), 2, 8)
    assert asked == [5, 3]  # 4.5 and 3, rounded up


def test_what_the_budget_leaves_stays():
    make, asked = maker([0, 0], [0, 1])
    assert refill([3, 5], make, rounds=2) == Refill({3: 3}, (5,), 2, 4)
    assert asked == [2, 2]
    assert refill([3], make, rounds=0) == Refill({}, (3,), 0, 0)
    assert refill([], make, rounds=3) == Refill({}, (), 0, 0)


def test_a_round_has_a_largest_size_and_may_bring_less():
    make, asked = maker([1], [1, 1])
    assert refill([0, 1, 2], make, rounds=2, oversample=3, most=4) == Refill({0: 0, 1: 1, 2: 2}, (), 2, 3)
    assert asked == [4, 4]


@pytest.mark.parametrize("oversample", [1.0, 2.0])
def test_good_groups_beyond_the_missing_ones_are_not_taken(oversample):
    make, _ = maker([1, 1, 1, 1])
    assert refill([9], make, rounds=1, oversample=oversample).taken == {9: 0}
