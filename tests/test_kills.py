"""A run that is killed twice, while it samples and while it writes a checkpoint, ends in the weights of one that was not."""

from __future__ import annotations

import math
import random

import pytest
import torch

from tests.bench import kills
from tests.bench.kills import PHASES, STEPS, Kill


def test_draws_are_fixed_by_the_seed_and_cover_all_phases() -> None:
    seconds = {phase: 1.0 + i for i, phase in enumerate(PHASES)}
    drawn = kills.draw(3, seconds)
    assert drawn == kills.draw(3, seconds) != kills.draw(4, seconds)
    assert sorted(kill.phase for kill in drawn) == sorted(PHASES)
    assert [kill.step for kill in drawn] == sorted({kill.step for kill in drawn}) and drawn[-1].step < STEPS
    assert all(0 <= kill.delay < seconds[kill.phase] for kill in drawn)
    assert random.Random(3).sample(PHASES, 4) == [kill.phase for kill in drawn]


def test_difference_and_summary_by_hand() -> None:
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    assert kills.difference(one, {name: value.clone() for name, value in one.items()}) == 0.0
    assert kills.difference(one, one | {"b": torch.tensor([3.5])}) == 0.5
    with pytest.raises(ValueError, match="other weights"):
        kills.difference(one, {"a": one["a"]})
    struck = [{"killed": True, "in": "training"}, {"killed": False, "in": None}]
    trials = [{"kills": struck, "equal": d == 0.0, "difference": d} for d in (0.0, 0.25)]
    found = kills.summary(trials)
    assert found == {"kills": 2, "in": {"training": 2}, "trials": 2, "equal": 1, "largest_difference": 0.25}


def test_nan_is_never_equal() -> None:
    """`max` of Python's floats passes over a NaN that is not the first."""
    one = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
    nan = one | {"b": torch.tensor([float("nan")])}
    assert kills.equal(one, dict(one)) and not kills.equal(one, nan) and not kills.equal(nan, nan)
    assert not kills.equal(one, one | {"b": torch.tensor([2.5])}) and not kills.equal(one, {"a": one["a"]})
    assert math.isnan(kills.difference(one, nan)) and math.isnan(kills.difference(nan, one))
    trials = [{"kills": [], "equal": d == 0.0, "difference": d} for d in (0.0, float("nan"))]
    found = kills.summary(trials)
    assert found["equal"] == 1 and math.isnan(found["largest_difference"])


def test_killed_twice_and_resumed(tmp_path) -> None:
    code, notes = kills.run(tmp_path / "whole")
    assert code == 0
    seconds = kills.phase_seconds(notes)
    wanted = [Kill("generation", 4, 0.5 * seconds["generation"]), Kill("checkpoint", 6, 0.5 * seconds["checkpoint"])]
    happened = kills.trial(tmp_path / "killed", wanted)
    assert [kill["killed"] for kill in happened] == [True, True]
    assert happened[0]["checkpoint"] is not None
    whole = kills.weights(tmp_path / "whole")
    assert kills.equal(kills.weights(tmp_path / "killed"), whole)
    assert max(float(value.abs().max()) for name, value in whole.items() if "lora_B" in name) > 0
