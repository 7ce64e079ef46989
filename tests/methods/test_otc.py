"""otc: the card's table and worked group, memory over epochs, TRL's tool loop, limits, restart."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
import torch
import trl

import trl_ext
from tests.methods.groups import logged, made_group
from tests.methods.scripted_tools import right, spoke, tool_trainer
from tests.methods.training import train
from tests.test_vlm import train as train_vlm
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext.methods.grpo.otc import UNSOLVED, Memory, Otc, fewest_in_groups, mapped_calls, tool_coefficient
from trl_ext.plan import PlanError
from trl_ext.recipe import load_recipe

TABLE = {
    (0, 1.0): [1.000000, 0.500000, 0.309017, 0.222521, 0.173648, 0.142315, 0.120537],
    (1, 1.0): [0.000000, 1.000000, 0.866025, 0.707107, 0.587785, 0.500000, 0.433884],
    (2, 1.0): [0.000000, 0.866025, 1.000000, 0.951057, 0.866025, 0.781831, 0.707107],
    (3, 1.0): [0.000000, 0.707107, 0.951057, 1.000000, 0.974928, 0.923880, 0.866025],
    (0, 5.0): [1.000000, 0.900969, 0.766044, 0.654861, 0.568065, 0.500000, 0.445738],
}


def group(rewards, calls, questions=None, measured=None, names=("right",)):
    """A Group of (P, G) or (P, G, F) rewards."""
    calls, found = torch.tensor(calls), made_group(rewards, names)
    return dataclasses.replace(
        found,
        tool_calls=calls,
        questions=torch.tensor(list(range(len(calls))) if questions is None else questions),
        measured=measured or {"correctness": found.rewards[..., 0]},
    )


# The maths


@pytest.mark.parametrize("n, c", TABLE)
def test_table(n, c):
    found = tool_coefficient(torch.arange(7), torch.tensor(n), c)
    assert found.tolist() == pytest.approx(TABLE[n, c], abs=1e-6)


def test_mapping():
    """f(m, 0) = m, f(n, n) = n, and towards 2n."""
    assert mapped_calls(torch.tensor([0, 4, 3, 10**6]), torch.tensor([0, 0, 3, 3])).tolist() == pytest.approx(
        [0, 4, 3, 6], abs=1e-4
    )


def test_coefficient_invariants():
    for m, n in itertools.product(range(12), range(12)):
        value = float(tool_coefficient(torch.tensor(m), torch.tensor(n)))
        assert 0 <= value <= 1 and (value == 1) == (m == n)
        if n > 0:
            assert value == pytest.approx(math.sin(math.pi * m / (m + n)), abs=1e-6)
        if m >= n:
            assert float(tool_coefficient(torch.tensor(m + 1), torch.tensor(n))) < value


def test_worked_group():
    seen = group([[1, 1, 0, 1]], [[1, 3, 0, 2]])
    found = Otc().shape_rewards(seen.rewards, seen)[0, :, 0]
    assert found.tolist() == pytest.approx([1.0, 0.707107, 0.0, 0.866025], abs=1e-6)


def test_wrong_answers_earn_nothing_and_right_ones_at_most_alpha():
    draw = random.Random(0)
    for _ in range(50):
        verdicts = [[float(draw.random() < 0.6) for _ in range(6)]]
        calls = [[draw.randrange(5) for _ in range(6)]]
        seen = group(verdicts, calls)
        found = Otc(alpha=2.0).shape_rewards(seen.rewards, seen)[0, :, 0].tolist()
        ranked = sorted((m, value) for m, value, good in zip(calls[0], found, verdicts[0], strict=True) if good)
        assert all(value == 0 for value, good in zip(found, verdicts[0], strict=True) if not good)
        assert all(low[1] >= high[1] > 0 for low, high in itertools.pairwise(ranked))
        assert not ranked or ranked[0][1] == 2.0


def test_negative_and_partial_rewards():
    """n = 2 from the right one: partial credit is multiplied, what is negative, zero or None is not."""
    seen = group([[1, 0.5, -1, 0, math.nan]], [[2, 4, 4, 4, 4]])
    found = Otc(alpha=3.0).shape_rewards(seen.rewards, seen)[0, :, 0]
    assert found[:4].tolist() == pytest.approx([3.0, 1.5 * 0.866025, -3.0, 0.0], abs=1e-5)
    assert math.isnan(found[4])


def test_only_the_named_reward_is_multiplied():
    rewards = [[[1.0, 0.5], [1.0, 0.7]]]
    seen = group(rewards, [[0, 1]], names=("right", "form"))
    found = Otc(correctness="right").shape_rewards(seen.rewards, seen)
    torch.testing.assert_close(found, torch.tensor([[[1.0, 0.5], [0.5, 0.7]]]))
    assert torch.equal(seen.rewards, torch.tensor(rewards)), "the input is not changed"


def test_other_methods_may_have_scaled_the_rewards_before():
    """Right or wrong is read from what the function gave, the coefficient multiplies what is there."""
    seen = group([[1, 1]], [[0, 1]])
    assert Otc().shape_rewards(seen.rewards * 0.1, seen)[0, :, 0].tolist() == pytest.approx([0.1, 0.05])


def test_ppo_form_takes_no_group():
    seen = group([[1, 1, 1]], [[1, 2, 3]])
    found = Otc(form="ppo").shape_rewards(seen.rewards, seen)[0, :, 0]
    assert found.tolist() == pytest.approx(TABLE[0, 1.0][1:4], abs=1e-6)


# Memory


def test_fewest_in_groups():
    solved = torch.tensor([[True, False, True], [False, False, False]])
    assert fewest_in_groups(solved, torch.tensor([[3, 0, 2], [1, 1, 1]])).tolist() == [2, UNSOLVED]


def test_memory_against_a_dictionary():
    draw, slow, memory = random.Random(1), {}, Memory(torch.zeros(0).long(), torch.zeros(0).long())
    for _ in range(20):
        names = [draw.randrange(-(2**62), 2**62) if draw.random() < 0.3 else draw.randrange(6) for _ in range(5)]
        fewest = [UNSOLVED if draw.random() < 0.3 else draw.randrange(6) for _ in range(5)]
        for name, n in zip(names, fewest, strict=True):
            if n != UNSOLVED:
                slow[name] = min(n, slow.get(name, n))
        memory = memory.with_groups(torch.tensor(names), torch.tensor(fewest))
        asked = [*names, 99]
        assert memory.of(torch.tensor(asked)).tolist() == [slow.get(name, UNSOLVED) for name in asked]
    assert memory.questions.tolist() == sorted(slow)


def epochs(method, *rollouts):
    """R of each rollout of one question, with the state moved as the trainer does."""
    found = []
    for rewards, calls in rollouts:
        seen = group([rewards], [calls])
        found.append(method.shape_rewards(seen.rewards, seen)[0, :, 0].tolist())
        method.observe(seen)
    return found


def test_n_is_the_minimum_over_epochs():
    method = Otc()
    first, nothing, later = epochs(method, ([1, 1], [1, 2]), ([0, 0], [0, 0]), ([1, 1], [2, 3]))
    assert first == pytest.approx([1.0, 0.866025], abs=1e-6) and nothing == [0, 0]
    assert later == pytest.approx([0.866025, 0.707107], abs=1e-6), "n = 1 from the first epoch"
    assert method.state["fewest"].tolist() == [1]
    (lower,) = epochs(method, ([1, 1], [0, 1]))
    assert lower == pytest.approx([1.0, 0.5], abs=1e-6) and method.state["fewest"].tolist() == [0]
    (stays,) = epochs(method, ([1, 1], [4, 4]))
    assert stays == pytest.approx([0.173648] * 2, abs=1e-6) and method.state["fewest"].tolist() == [0]


def test_group_only_forgets():
    method = Otc(group_only=True)
    _, later = epochs(method, ([1, 1], [1, 2]), ([1, 1], [2, 4]))
    assert later == pytest.approx([1.0, 0.866025], abs=1e-6) and method.state == {}


def test_an_unsolved_question_has_no_n():
    """Partial credit below the threshold is left alone, also with calls."""
    method = Otc()
    assert epochs(method, ([0.5, 0.2], [3, 0])) == [pytest.approx([0.5, 0.2])]
    assert method.state["questions"].numel() == 0


def test_the_same_question_twice_shares_n():
    seen = group([[1, 1], [1, 1]], [[2, 2], [1, 1]], questions=[7, 7])
    found = Otc().shape_rewards(seen.rewards, seen)[..., 0]
    assert found.flatten().tolist() == pytest.approx([0.866025] * 2 + [1.0] * 2, abs=1e-6)


def test_metrics_of_a_hand_example():
    method = Otc()
    epochs(method, ([1, 1, 0, 1], [1, 3, 0, 2]))
    seen = group([[1, 1, 0, 1], [1, 0, 0, 0]], [[2, 2, 1, 3], [0, 5, 1, 0]])
    method.observe(seen)
    found = logged(seen.metrics)
    coefficients = [0.866025, 0.866025, 0.707107, 1.0]
    expected = {"calls": 14 / 8, "calls_correct": 7 / 4, "accuracy": 4 / 8, "productivity": 4 / 14}
    expected |= {"n": 0.5, "n_zero": 0.5, "known": 0.5, "r_tool": sum(coefficients) / 4}
    assert found == pytest.approx(expected, abs=1e-6)
    assert method.summary(str) == [
        "2 questions were solved at least once, with 0.50 calls at best on average; 50% of them without a call"
    ]


# In the trainer


def worked(step):
    """The card's group, then all right with more calls than n = 1."""
    return [(1, True), (3, True), (0, False), (2, True)] if step == 0 else [(2, True)] * 3 + [(3, True)]


def test_through_trls_tool_loop(tmp_path, monkeypatch):
    seen, original = [], trl_ext.GRPOTrainer._compute_loss
    monkeypatch.setattr(
        trl_ext.GRPOTrainer,
        "_compute_loss",
        lambda self, model, inputs: seen.append(inputs["advantages"]) or original(self, model, inputs),
    )
    trainer = tool_trainer(tmp_path, {"otc": {}}, worked)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    expected = [0.800978, 0.143311, -1.444438, 0.500149]
    assert sorted(seen[0].tolist()) == pytest.approx(sorted(expected), abs=1e-6)
    assert (first["otc/calls"], first["otc/calls_correct"], first["otc/n"]) == (1.5, 2.0, 1.0)
    assert first["tools/call_frequency"] == 1.5 and first["otc/known"] == 0.0
    assert second["otc/known"] == 1.0 and second["otc/n"] == 1.0 and second["otc/accuracy"] == 1.0
    assert second["otc/r_tool"] == pytest.approx((3 * 0.866025 + 0.707107) / 4, abs=1e-5)
    assert second["rewards/right/mean"] == pytest.approx(second["otc/r_tool"], abs=1e-5)
    assert second["rewards/right/unshaped"] == 1.0
    assert float(seen[1].abs().max()) > 0.1, "an all-right group teaches when calls differ"
    assert (first["otc/productivity"], first["otc/n_zero"]) == (0.5, 0.0)


def test_calls_that_do_not_differ_are_trl(tmp_path):
    """Every right rollout with two calls: r_tool is 1 for all, so the weights are TRL's, tools and all."""

    def same(step):
        return [(2, True), (2, True), (1, False), (2, True)]

    ours = tool_trainer(tmp_path, {"otc": {}}, same)
    ours.train()
    stock = tool_trainer(tmp_path, None, same, trl.GRPOTrainer)
    stock.train()
    assert_equal(weights(ours), weights(stock))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_without_tools_it_is_trl(tmp_path, loss_type):
    ours = train(tmp_path, {"otc": {}}, loss_type=loss_type, beta=0.1)
    args = trl.GRPOConfig(**grpo_args(str(tmp_path), loss_type=loss_type, beta=0.1))
    stock = trl.GRPOTrainer(tiny_path(), letters_reward, args, prompts())
    stock.train()
    assert_equal(weights(ours), weights(stock))


def test_resume_inside_a_window_equals_not_stopping(tmp_path):
    """The memory of the first rollout decides rewards of the second, which comes after the restart."""
    settings = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}

    def script(step):
        return worked(0 if step < 2 else 1)

    whole = tool_trainer(tmp_path, {"otc": {}}, script, **settings)
    whole.train()
    resumed = tool_trainer(tmp_path, {"otc": {}}, script, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_equal(weights(whole), weights(resumed))
    ours, theirs = (t.plan.methods[0].state for t in (whole, resumed))
    assert ours["fewest"].tolist() == [1] and torch.equal(ours["questions"], theirs["questions"])


def test_clashes_name_the_flag(tmp_path):
    with pytest.raises(PlanError, match="leave it out"):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path)), methods={"otc": {"form": "ppo", "group_only": True}})
    with pytest.raises(PlanError, match=r"several rewards \(right, spoke\); name .* correctness"):
        tool_trainer(tmp_path, {"otc": {}}, worked, rewards=[right, spoke])
    with pytest.raises(PlanError, match="'wrong' is not a reward of this run"):
        tool_trainer(tmp_path, {"otc": {"correctness": "wrong"}}, worked, rewards=[right, spoke])


def test_questions_with_images_are_remembered(tmp_path):
    trainer = train_vlm(tmp_path, methods={"otc": {"threshold": 0.3}})
    assert "otc/calls" in trainer.state.log_history[0]


def test_recipe_has_the_cards_numbers():
    recipe = load_recipe("otc_qwen2.5_3b", ["--use_cpu", "true"])
    (otc,) = recipe.plan.methods
    assert (otc.alpha, otc.smoothing, otc.form, otc.group_only) == (1.0, 1.0, "grpo", False)
    assert [tool.__name__ for tool in recipe.tools] == ["calculator"]
