"""Every pair of methods trains together, or the plan says why not and which setting resolves it."""

from __future__ import annotations

import itertools
import math

import pytest

import trl_ext
from tests.bench import index
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
    "real": {"threshold": 0.3},
    "group_dpo": {"beta": 1.0},
    "fg_expo": {"sigma": 0.15, "factor": 0.5},
    "mdpo": {"t": 0.1},
    "target_surrogate": {"eta": 0.1},
    "paced": {"use": "sampler", "smoothing": 0.5},  # its one use that everything but another sampler goes with
    "safe": {"kl_from": "rollout", "kl_base": 0.0, "tau_low": 0.0, "penalty_strength": 5.0},
    "rods": {"synthesizer": "tests.methods.test_rods.sums", "evaluation": []},
    "riskpo": {"bundle_size": 2},
    "otc": {"threshold": 0.3},
    "hdpo": {"threshold": 0.3},
    "fgrpo": {"constraints": {"letters_reward": 0.9}, "accuracy": "letters_reward", "minimum": 1},
    # Letters are half of the text at most: groups fail and are tried again; the row's answer is the hint
    "scaf_grpo": {"columns": {"answer": "Hint"}, "warmup": 0.0, "threshold": 0.5},
    "dynamic_sampling": {"low": 0.3, "rounds": 2},
}
"""On the tiny model, so that each method does something; the others run with their defaults."""
GRPO = [name for name, cls in METHODS.items() if cls.trainer == "grpo"]


def make(folder: object, *names: str) -> trl_ext.GRPOTrainer:
    methods = {name: SETTINGS.get(name, {}) for name in names}
    beta = 0.1 if "fg_expo" in names else 0.0  # it scales the KL term
    settings = {"max_steps": 2, "loss_type": "grpo", "beta": beta}
    if {"riskpo", "oblr_po"} & set(names):  # they replace the advantages
        settings |= {"scale_rewards": "none"}
    args = trl_ext.GRPOConfig(**grpo_args(str(folder), **settings), methods=methods)
    return trl_ext.GRPOTrainer(tiny_path(), letters_reward, args, prompts())


@pytest.mark.parametrize("pair", itertools.combinations(GRPO, 2), ids="+".join)
def test_pair(tmp_path: object, pair: tuple[str, str]) -> None:
    first, second = (METHODS[name](**SETTINGS.get(name, {})) for name in pair)
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


def test_the_paper_index_says_the_same() -> None:
    """What the page calls free is what the pairs above may train together, and the reasons are on the page."""
    for name in GRPO:
        cls, against = METHODS[name], index.refused(METHODS[name], METHODS)
        assert {*index.free(cls, METHODS), *against} == {*GRPO} - {name}
        text = index.entry(cls, METHODS, {})
        for other in GRPO:
            conflict = cls.conflicts.get(other) or METHODS[other].conflicts.get(name)
            assert (other in against) == bool(conflict or {*cls.owns} & {*METHODS[other].owns}) or other == name
            assert not conflict or conflict in text
