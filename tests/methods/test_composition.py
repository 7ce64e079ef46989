"""Every pair of methods trains together, or the plan says why not and which setting resolves it."""

from __future__ import annotations

import itertools
import math

import pytest

import trl_ext
from tests.bench.readme import partners
from tests.tiny import grpo_args, letters_reward, prompts, tiny_path
from trl_ext.methods import METHODS
from trl_ext.plan import PlanError

SETTINGS = {
    "trace": {"action": "both", "annotator": "tests.tiny.annotate_first", "clip": None, "coverage": 0.5},
    "dgpo": {"tau": 0.05},
    "dcpo": {"threshold": 0.5},
    "capo": {"tau_fisher": 0.05, "tau_hessian": 0},
    "velocity_rank": {"stride": 1},
    "pgpo": {"pattern": "[0-9]+ .+ [0-9]+"},
    "d3s": {"sample_start": 0.5, "sample_end": 0.5},
    "epo": {"coefficient": 0.1, "lower": 0.9, "upper": 1.1},
}
"""On the tiny model, so that each method does something; the others run with their defaults."""
GRPO = [name for name, cls in METHODS.items() if cls.trainer == "grpo"]


def make(folder: object, *names: str) -> trl_ext.GRPOTrainer:
    methods = {name: SETTINGS.get(name, {}) for name in names}
    args = trl_ext.GRPOConfig(**grpo_args(str(folder), max_steps=2, loss_type="grpo"), methods=methods)
    return trl_ext.GRPOTrainer(tiny_path(), letters_reward, args, prompts())


@pytest.mark.parametrize("pair", itertools.combinations(GRPO, 2), ids="+".join)
def test_pair(tmp_path: object, pair: tuple[str, str]) -> None:
    first, second = (METHODS[name] for name in pair)
    reason = first.conflicts.get(second.name) or second.conflicts.get(first.name)
    shared = set(first.owns) & set(second.owns)
    if reason or shared:
        with pytest.raises(PlanError) as refused:
            make(tmp_path, *pair)
        assert all(name in str(refused.value) for name in pair)
        return
    trained = 0
    for order in (pair, pair[::-1]):
        try:
            trainer = make(tmp_path, *order)
        except PlanError as refused:  # an order may be refused, with words, but not both
            assert all(name in str(refused) for name in pair) and "before" in str(refused)
            continue
        trainer.train()
        trained += 1
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(logged) == 2 and all(math.isfinite(entry["loss"]) for entry in logged)
        seen = {key.split("/")[0] for entry in logged for key in entry}
        assert set(pair) <= seen, "both methods report what they did"
    assert trained


def test_the_table_of_the_readme_says_the_same() -> None:
    for name in GRPO:
        free, _, against = partners(METHODS[name], METHODS).partition("not ")
        for other in GRPO:
            refused = METHODS[name].conflicts.get(other) or METHODS[other].conflicts.get(name)
            if other != name:
                assert (f"`{other}`" in free) == (not refused) and (f"`{other}`" in against) == bool(refused)
