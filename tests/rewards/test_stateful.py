"""Rewards with a memory: in checkpoints, out of evaluations; and rewards that need whole groups, with methods that cut them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import trl_ext
from tests.methods.training import make, train
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext import checkpoints
from trl_ext.checkpoints import CheckpointError
from trl_ext.method import Setup
from trl_ext.plan import PlanError, make_plan
from trl_ext.recipe import RecipeError, load_recipe
from trl_ext.rewards import checked, make_reward
from trl_ext.rewards.reward_ensemble import make_reward_ensemble
from trl_ext.rewards.stateful import load_states, stateful, states_of

STEPS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}


def large(completions: list, **kwargs: Any) -> list[float]:
    """Large, and heavy-tailed: its mean and deviation go on moving."""
    return [1000.0 * sum(map(ord, c[0]["content"])) ** 2 for c in completions]


def running(**settings: Any) -> Any:
    return make_reward("reward_ensemble", {"rewards": [letters_reward, large], "normalize": "running_z"} | settings)


class Counting:
    """The number of completions scored so far, plus 1 for each other one."""

    def __init__(self) -> None:
        self.seen, self.mode = 0, True

    def __call__(self, completions: list, **kwargs: Any) -> list[float]:
        found = [float(self.seen + i % 2) for i in range(len(completions))]
        self.seen += len(completions) * self.mode
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]

    def train(self, mode: bool = True) -> None:
        self.mode = mode


def counts(reward: Any) -> list[float]:
    """How many scores each member of an ensemble has seen."""
    (entry,) = states_of([reward])
    return entry["state"]["moments"]["count"].tolist()


# In checkpoints


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("more", [{}, {"steps_per_generation": 2, "num_iterations": 2}], ids=str)
def test_a_resumed_run_with_running_z_equals_one_that_was_not_stopped(tmp_path, stop, more) -> None:
    first, second = running(), running()
    whole = train(tmp_path, None, rewards=first, **STEPS, **more)
    resumed = train(tmp_path, None, resume=str(tmp_path / f"checkpoint-{stop}"), rewards=second, **STEPS, **more)
    assert_equal(weights(whole), weights(resumed))
    assert counts(first) == counts(second) == [2 * 16.0 if more else 5 * 8.0] * 2


def test_what_a_users_own_reward_learned_is_kept(tmp_path) -> None:
    train(tmp_path, None, rewards=checked(Counting()), **STEPS)
    fresh = Counting()
    train(tmp_path, None, resume=str(tmp_path / "checkpoint-3"), rewards=fresh, **STEPS)
    assert fresh.seen == 40


def test_a_checkpoint_of_other_rewards_is_refused_and_one_without_them_warns(tmp_path, caplog) -> None:
    train(tmp_path, None, rewards=running(), **STEPS)
    saved = str(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"checkpoint-2 does not fit this run: it holds the state of rewards "):
        train(tmp_path, None, resume=saved, **STEPS)
    more = running(rewards=[letters_reward, large, letters_reward])
    with pytest.raises(CheckpointError, match=r"reward reward_ensemble: it had 2 members, now 3.*start a new run"):
        train(tmp_path, None, resume=saved, rewards=more, **STEPS)
    (tmp_path / "checkpoint-2" / checkpoints.rollout_file(0)).unlink()  # as stock TRL leaves it
    train(tmp_path, None, resume=saved, rewards=running(), **STEPS)
    assert "holds no state of reward functions, so that of reward_ensemble begins anew" in caplog.text


def test_members_keep_theirs_and_take_the_mode() -> None:
    own, other = Counting(), Counting()
    reward = make_reward_ensemble([own, letters_reward])
    reward(prompts=["p"] * 3, completions=["a"] * 3)
    load_states([make_reward_ensemble([other, letters_reward])], states_of([reward]))
    assert other.seen == 3
    ((_, memory),) = stateful([reward])
    memory.train(False)
    assert not own.mode


def test_what_counts_as_state() -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_path(), num_labels=1)
    plain = make_reward_ensemble([letters_reward, large])
    assert stateful([model, "a/reward-model", letters_reward, plain, SimpleNamespace(state_dict=dict)]) == []
    assert [name for name, _ in stateful([checked(Counting()), running()])] == ["Counting", "reward_ensemble"]


# Out of evaluations


def test_an_evaluation_moves_nothing(tmp_path) -> None:
    reward = running()
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), max_steps=1, per_device_eval_batch_size=4))
    trainer = trl_ext.GRPOTrainer(tiny_path(), reward, args, prompts(), eval_dataset=prompts(3))
    trainer.evaluate()
    assert counts(reward) == [0, 0]
    trainer.train()
    before = states_of([reward])[0]["state"]["moments"]
    trainer.evaluate()
    after = states_of([reward])[0]["state"]["moments"]
    assert all(torch.equal(before[name], after[name]) for name in ("count", "mean", "squares"))
    reward(prompts=["p"], completions=[[{"role": "assistant", "content": "a"}]])
    assert counts(reward) == [9, 9], "training goes on"


def test_an_evaluation_that_fails_leaves_training_as_it_was(tmp_path) -> None:
    reward = Counting()
    trainer = make(tmp_path, None, rewards=reward)
    with pytest.raises(ValueError):
        trainer.evaluate()  # there is no data for it
    assert reward.mode


# Whole groups

GROUPED = {"rewards": [letters_reward, letters_reward], "objective": "mean", "normalize": "group_z"}


def test_refilled_groups_are_normalised_as_groups(tmp_path) -> None:
    """In every call, also where dynamic_sampling makes fresh groups: the two of a round, or one."""
    found: list[tuple[list[float], list[float]]] = []

    def flat_first(completions: list, **kwargs: Any) -> list[float]:
        return [0.0 if i < 4 else value for i, value in enumerate(letters_reward(completions))]

    inner = make_reward("reward_ensemble", GROUPED | {"rewards": [flat_first] * 2})

    def seen(completions: list, **kwargs: Any) -> list[float]:
        found.append((flat_first(completions), inner(completions=completions, **kwargs)))
        return found[-1][1]

    train(tmp_path, {"dynamic_sampling": {"rounds": 2}}, rewards=seen, max_steps=2)
    assert len(found) > 2
    for raw, values in found:
        for group, own in zip(torch.tensor(raw).view(-1, 4), torch.tensor(values).view(-1, 4), strict=True):
            assert torch.allclose(own, (group - group.mean()) / (group.std() + 1e-4), atol=1e-5)


def test_hinted_completions_are_no_group(tmp_path) -> None:
    words = (
        "scaf_grpo: reward reward_ensemble compares a prompt's completions.*a hint is scored by itself; set the rew"
    )
    with pytest.raises(PlanError, match=words):
        make(tmp_path, {"scaf_grpo": {}}, rewards=make_reward("reward_ensemble", GROUPED))
    with pytest.raises(PlanError, match=words):  # also as a member
        make(tmp_path, {"scaf_grpo": {}}, rewards=running(rewards=[make_reward_ensemble(**GROUPED), large]))
    make(tmp_path, {"scaf_grpo": {}}, rewards=running())
    members = {"rewards": ["answer_correct", "json_valid"]}
    grouped = str({"reward_ensemble": members | {"normalize": "group_z"}}).replace("'", '"')
    with pytest.raises(RecipeError, match="methods: scaf_grpo: reward reward_ensemble compares"):
        load_recipe("sandbox_scaf_grpo", ["--rewards", grouped])


@pytest.mark.parametrize(("processes", "refused"), [(1, False), (2, False), (3, True), (8, True)])
def test_fresh_groups_must_divide_among_processes(processes, refused) -> None:
    args = SimpleNamespace(num_generations=4, world_size=processes)
    plan = make_plan("dynamic_sampling")
    setup = Setup(args, ["grouped"], group_rewards={"grouped": 2})
    if refused:
        with pytest.raises(PlanError, match=f"{processes} processes share out fresh groups of 4 unevenly"):
            plan.check(setup)
    else:
        plan.check(setup)


@pytest.mark.parametrize(
    ("more", "objective", "words"),
    [
        ({}, "mean", None),
        ({"num_generations_eval": 1}, "mean", None),
        ({"num_generations_eval": 1, "eval_strategy": "steps"}, "mean", "at least 2 .*num_generations_eval is 1"),
        ({}, "wco", "at least 8 completions of a prompt, and num_generations is 4"),
        ({"num_generations": 8, "eval_strategy": "steps"}, "wco", None),
    ],
)
def test_groups_that_are_too_small_are_told_before_training(tmp_path, more, objective, words) -> None:
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), per_device_eval_batch_size=8, **more))
    reward = make_reward("reward_ensemble", GROUPED | {"objective": objective})

    def built() -> trl_ext.GRPOTrainer:
        return trl_ext.GRPOTrainer(tiny_path(), reward, args, prompts(), eval_dataset=prompts(4))

    if words is None:
        built()
    else:
        with pytest.raises(PlanError, match=f"reward_ensemble: compares {words}; raise it"):
            built()
