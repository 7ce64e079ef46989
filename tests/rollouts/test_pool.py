"""The live pool: the card's worked examples, retirement, injection, epochs, and the bounds on how many rows enter."""

from __future__ import annotations

import copy
import json
import random

import pytest

from trl_ext.rollouts import pool as pools
from trl_ext.rollouts.pool import BOUNDARY, HARD, MASTERED, Bounds, Candidate, priority, region

BOUNDS = Bounds(0.2, 0.85, 0.95)
SEEDS = [1.0, 0.625, 0.15, 0.875, 0.3125, 0.5, 0.0, 0.85]
GENERATED = [0.97, 0.10, 0.55, 0.90]


def candidate(number, category="all"):
    return Candidate(parent=0, category=category, row={"prompt": f"new {number}"})


def worked():
    """Card, example B: seeds 0..7, generated 8..11, all observed in epoch 1."""
    pool = pools.new_pool(["all"] * 8, seed=0)
    pool["queue"] = [candidate(i) for i in range(4)]
    pools.inject(pool, 1.0, 4)
    pools.next_epoch(pool, 0)
    for row, rbar in enumerate(SEEDS + GENERATED):
        assert pools.observe(pool, row, rbar)
    return pool


@pytest.mark.parametrize(
    ("rbar", "phi", "where"),
    [
        (0.625, 0.937500, BOUNDARY),
        (0.15, 0.510000, HARD),
        (0.875, 0.437500, MASTERED),
        (0.3125, 0.859375, BOUNDARY),
        (1.0, 0.0, MASTERED),
    ],
)
def test_worked_priorities(rbar, phi, where):
    assert priority(rbar) == pytest.approx(phi, abs=1e-6) and region(rbar, BOUNDS) == where


def test_priority_is_symmetric_with_its_peak_at_one_half():
    points = [i / 100 for i in range(101)]
    assert [priority(p) for p in points] == pytest.approx([priority(1 - p) for p in points], abs=1e-12)
    assert (priority(0), priority(0.5), priority(1)) == (0, 1, 0) and max(map(priority, points)) == 1


def test_the_regions_part_the_unit_interval():
    found = [region(i / 1000, BOUNDS) for i in range(1001)]
    assert found == [HARD] * 200 + [BOUNDARY] * 651 + [MASTERED] * 150  # both thresholds are boundary


def test_worked_pool():
    pool = worked()
    order = pools.seeds_for_synthesis(pool, BOUNDS, budget=16, quota=None, cooldown=1)
    assert order == [5, 10, 1, 4, 7]  # s5, g2, s1, s4, s7
    phis = [priority(pool["entries"][row]["rbar"]) for row in order]
    assert phis == pytest.approx([1.0, 0.99, 0.9375, 0.859375, 0.51], abs=1e-6)
    assert pools.retire(pool, BOUNDS, stale=None, seeds_too=False, keep=1) == [8, 9]  # g0, g1
    assert len(pool["entries"]) == 10
    pool["queue"] = [candidate(i) for i in range(5)]
    entered, put_out = pools.inject(pool, 0.2, capacity=4)
    assert entered == [12, 13] and put_out == [] and pools.generated(pool) == 4
    assert [c["row"]["prompt"] for c in pool["queue"]] == ["new 2", "new 3", "new 4"]  # oldest first


def test_seeds_are_ranked_within_budget_quota_and_cooldown():
    pool = worked()
    for row, name in enumerate("aabbaabbabab"):
        pool["entries"][row]["category"] = name
    assert pools.seeds_for_synthesis(pool, BOUNDS, 2, None, 1) == [5, 10]
    assert pools.seeds_for_synthesis(pool, BOUNDS, 16, 1, 1) == [5, 7]  # s5, g2, s1, s4 are all of a
    pool["entries"][5]["asked"] = 1
    assert pools.seeds_for_synthesis(pool, BOUNDS, 16, None, 0) == [10, 1, 4, 7]  # asked in this epoch
    pools.next_epoch(pool, 0)
    assert pools.seeds_for_synthesis(pool, BOUNDS, 16, None, 0) == []  # nothing was observed in the new epoch
    pools.observe(pool, 5, 0.5)
    assert pools.seeds_for_synthesis(pool, BOUNDS, 16, None, cooldown=1) == []
    assert pools.seeds_for_synthesis(pool, BOUNDS, 16, None, cooldown=0) == [5]
    pools.next_epoch(pool, 0)
    pools.observe(pool, 5, 0.5)
    assert pools.seeds_for_synthesis(pool, BOUNDS, 16, None, cooldown=1) == [5]  # one epoch of rest is over


def test_random_seeds_come_from_all_regions():
    pool = worked()
    found = pools.seeds_for_synthesis(pool, BOUNDS, 12, None, 1, random.Random(0))
    assert sorted(found) == list(range(12)) and found != list(range(12))


def test_what_retires():
    def gone(stale=None, seeds_too=False, keep=1):
        return pools.retire(worked(), BOUNDS, stale, seeds_too, keep)

    assert gone() == [8, 9]
    assert gone(stale=1) == [8, 9, 10, 11]  # one epoch in the pool is over
    assert gone(stale=2) == [8, 9]
    assert gone(seeds_too=True) == [0, 2, 6, 8, 9]  # 0.875 and 0.9 are mastered, but stay
    assert gone(seeds_too=True, keep=10) == [0, 2]


def test_a_row_without_an_observation_is_on_trial():
    pool = pools.new_pool(["all"] * 10, seed=0)
    pool["queue"] = [candidate(0), candidate(1)]
    pools.inject(pool, 0.2, 10)
    pools.next_epoch(pool, 0)
    pools.observe(pool, 10, 0.1)
    assert pools.retire(pool, BOUNDS, None, False, 1) == [10] and 11 in pool["entries"]


def test_beyond_the_capacity_the_lowest_priority_leaves():
    pool = worked()
    pool["queue"] = [candidate(0), candidate(1), candidate(2)]
    entered, put_out = pools.inject(pool, 1.0, capacity=5)
    assert len(entered) == 3 and put_out == [8, 11]  # 0.97 and 0.90: phi 0.1164 and 0.36, the same as of 0.1
    assert pools.generated(pool) == 5
    pool["queue"] = [candidate(i) for i in range(9)]
    entered, put_out = pools.inject(pool, 1.0, capacity=5)  # three rows are on trial and keep their places
    assert len(entered) == 2 and put_out == [9, 10] and len(pool["queue"]) == 7


@pytest.mark.parametrize("capacity", [0, 3, 7])
def test_invariants_over_many_epochs(capacity):
    rng = random.Random(1)
    pool = pools.new_pool(["all"] * 20, seed=3)
    last = 20
    left: set[int] = set()
    for _ in range(30):
        drawn = []
        while not pools.epoch_over(pool, 4):
            drawn += pools.draw(pool, 4)
        assert len(set(drawn)) == len(drawn) == len(pool["entries"]) // 4 * 4
        assert set(drawn) <= set(pool["entries"]) and not left & set(drawn)
        assert all(pool["entries"][row]["added"] <= pool["epoch"] for row in drawn)
        for row in drawn:
            pools.observe(pool, row, rng.random())
        pool["queue"] += [candidate(i) for i in range(rng.randrange(5))]
        left |= set(pools.retire(pool, BOUNDS, None, False, 4))
        size = len(pool["entries"])
        entered, put_out = pools.inject(pool, 0.15, capacity)
        left |= set(put_out)
        assert len(entered) <= int(0.15 * size) and pools.generated(pool) <= capacity
        assert all(row >= last for row in entered)
        last = pool["next_id"]
        assert set(range(20)) <= set(pool["entries"])  # seeds stay
        pools.next_epoch(pool, 3)


def test_fractions_are_floored_but_for_rounding():
    pool = pools.new_pool(["all"] * 100, seed=0)
    pool["queue"] = [candidate(i) for i in range(40)]
    assert len(pools.inject(pool, 0.29, 100)[0]) == 29  # 0.29 x 100 is 28.999999999999996 in binary


def test_epochs_have_other_orders_and_depend_on_the_seed_alone():
    first, second = pools.new_pool(["all"] * 30, 0), pools.new_pool(["all"] * 30, 0)
    assert first == second and sorted(first["order"]) == list(range(30)) != first["order"]
    assert pools.new_pool(["all"] * 30, 1)["order"] != first["order"]
    before = copy.deepcopy(first["order"])
    pools.next_epoch(first, 0)
    assert first["order"] != before


def test_a_pool_is_plain_data():
    pool = worked()
    read = json.loads(json.dumps(pool))
    read["entries"] = {int(row): entry for row, entry in read["entries"].items()}
    assert read == pool


def test_shares_count_observed_rows():
    pool = worked()
    assert pools.shares(pool, BOUNDS) == {HARD: 3 / 12, BOUNDARY: 5 / 12, MASTERED: 4 / 12}
    assert pools.shares(pools.new_pool(["all"], 0), BOUNDS) == {}
