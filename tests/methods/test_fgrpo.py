"""fgrpo: the card's worked example, masks, the dual step, coupled baselines, text and images, limits, restart."""

from __future__ import annotations

import math

import pytest
import torch
import trl

import trl_ext
from tests.methods.groups import made_group
from tests.methods.training import train
from tests.test_vlm import train as train_vlm
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext.methods.grpo.fgrpo import Fgrpo, constraint_advantages, dual_step, group_normalised, whitened
from trl_ext.plan import PlanError
from trl_ext.recipe import load_recipe

ACC = [[1, 1, 0, 0], [1, 1, 1, 0]]
FMT = [[1, 1, 1, 1], [1, 1, 1, 0]]
R_C = [[1, 0, 1, 1], [1, 1, 0, 0]]
R_S = [[0.8, 0.6, 0.9, 0.1], [1, 0.5, 0.75, 0.2]]
NAMES = ("acc", "fmt", "C", "S")
TAUS = {"C": 0.95, "S": 0.95}
A_TASK = [[0.865726, 0.865726, -0.865726, -0.865726], [0.499900, 0.499900, 0.499900, -1.499700]]
A_C = [[0.707007, -0.707007, 0, 0], [0.577250, 0.577250, -1.154501, 0]]
A_S = [[0.706607, -0.706607, 0, 0], [0.999600, -0.999600, 0, 0]]
SUM = [[2.279339, -0.547888, -0.865726, -0.865726], [2.076750, 0.077550, -0.654601, -1.499700]]
WHITE = [[1.612138, -0.387512, -0.612313, -0.612313], [1.468851, 0.054850, -0.462988, -1.060713]]
A_C_ZERO = [[1.499700, -0.499900, -0.499900, -0.499900], [0.865875, 0.865875, -0.865875, -0.865875]]


def group(*signals, names=NAMES, weights_=(0.5, 0.5, 0.0, 0.0)):
    """A Group of (P, G) signals."""
    return made_group(torch.stack([torch.tensor(signal) for signal in signals], -1), names, weights_)


def card():
    return group(ACC, FMT, R_C, R_S)


def method(**settings):
    return Fgrpo(**{"constraints": TAUS, "accuracy": "acc", "minimum": 1} | settings)


def close(found, expected, atol=1e-6):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=atol)


# The maths


def test_worked_example():
    seen = card()
    right = torch.tensor(ACC) > 0
    close(group_normalised(seen.total), A_TASK)
    close(constraint_advantages(torch.tensor(R_C).float().masked_fill(~right, math.nan)), A_C)
    close(constraint_advantages(torch.tensor(R_S).masked_fill(~right, math.nan)), A_S)
    close(method(whiten=False).group_advantages(seen.advantages, seen), SUM)
    close(method().group_advantages(seen.advantages, seen), WHITE)
    close(constraint_advantages(torch.tensor(R_C) * right.float()), A_C_ZERO)
    only_c = method(masked="zero", whiten=False, constraints={"C": 0.95})
    close(only_c.group_advantages(seen.advantages, seen) - group_normalised(seen.total), A_C_ZERO)


def test_worked_dual_step_and_metrics():
    seen, found = card(), method()
    found.observe(seen)
    assert found.state["lambda"] == pytest.approx({"C": 1.0175, "S": 1.011}, abs=1e-6)
    logged = {name: float(total[0] / total[1]) for name, total in seen.metrics.totals.items()}
    expected = {"accuracy": 5 / 8, "score_C": 0.6, "gap_C": 0.35, "applies_C": 5 / 8, "lambda_C": 1.0}
    expected |= {"score_S": 0.73, "gap_S": 0.22, "applies_S": 5 / 8, "lambda_S": 1.0}
    expected |= {"spread_C": float(torch.tensor(A_C).std()), "spread_S": float(torch.tensor(A_S).std())}
    assert logged == pytest.approx(expected, abs=1e-5)
    assert found.summary(str) == ["lambda of C: 1.0175 (tau 0.95)", "lambda of S: 1.0110 (tau 0.95)"]
    again = card()
    found.observe(again)
    assert float(again.metrics.totals["lambda_C"][0]) == pytest.approx(1.0175, abs=1e-6), (
        "in use from the next rollout"
    )


def test_the_new_multiplier_acts_in_the_next_rollout():
    seen, found = card(), method(whiten=False)
    before = found.group_advantages(seen.advantages, seen)
    found.observe(seen)
    after = found.group_advantages(seen.advantages, seen)
    close(after - before, (0.0175 * torch.tensor(A_C) + 0.011 * torch.tensor(A_S)).tolist())


def test_dual_step():
    """Up below tau, down above it, still at it, inside [0, largest], which a violation v reaches on time."""
    assert dual_step(1.0, 0.5, 0.9, 0.05, 5.0) == pytest.approx(1.02)
    assert dual_step(1.0, 1.0, 0.9, 0.05, 5.0) == pytest.approx(0.995)
    assert dual_step(1.0, 0.9, 0.9, 0.05, 5.0) == 1.0
    assert dual_step(0.001, 1.0, 0.5, 0.05, 5.0) == 0.0
    value, steps = 1.0, 0
    while value < 5.0:
        value, steps = dual_step(value, 0.4, 0.9, 0.05, 5.0), steps + 1
    assert steps == math.ceil((5 - 1) / (0.05 * 0.5)) and value == 5.0


def test_the_minimum_of_applicable_rollouts():
    """5 of 8 are right: with the paper's 8 nothing moves, with 5 it does."""
    for minimum, moved in ((8, False), (6, False), (5, True)):
        found = method(minimum=minimum)
        found.observe(card())
        assert (found.state["lambda"]["C"] != 1.0) == moved
    found = method(eta=0.0)
    found.observe(card())
    assert found.state["lambda"] == {"C": 1.0, "S": 1.0}


def test_masked_entries_change_nothing():
    other = [[1, 0, -7, 3], [1, 1, 0, math.nan]]
    plain, changed, found = card(), group(ACC, FMT, other, R_S), method()
    assert torch.equal(*(found.group_advantages(g.advantages, g) for g in (plain, changed)))
    found.observe(changed)
    assert found.state["lambda"]["C"] == pytest.approx(1.0175, abs=1e-6)


def test_none_is_masked_and_always_takes_wrong_answers_too():
    """m_G of the paper: wherever there is a score."""
    grounded = [[1.0, math.nan, 0.0, 0.5], [math.nan, math.nan, math.nan, 0.2]]
    seen = group(ACC, FMT, grounded, R_S)
    found = method(constraints={"C": 0.7}, always=["C"], whiten=False)
    extra = found.group_advantages(seen.advantages, seen) - group_normalised(seen.total)
    close(extra, [[0.9998, 0.0, -0.9998, 0.0], [0.0] * 4], atol=1e-5)
    found.observe(seen)
    assert found.state["lambda"]["C"] == pytest.approx(1 + 0.05 * (0.7 - 1.7 / 4), abs=1e-6)


def test_a_constant_constraint_adds_exactly_nothing():
    seen = group(ACC, FMT, [[0.7] * 4, [0.3] * 4], R_S)
    without = method(constraints={"S": 0.95}, initial=5.0)
    both = method(initial=5.0)
    assert torch.equal(*(m.group_advantages(seen.advantages, seen) for m in (without, both)))


def test_scale_of_a_constraint_does_not_matter():
    scaled = [[100 * v for v in row] for row in R_S]
    first, second = card(), group(ACC, FMT, R_C, scaled)
    a, b = (method().group_advantages(g.advantages, g) for g in (first, second))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_whitened():
    found = whitened(torch.randn(5, 7) * 3 + 1)
    assert (float(found.mean()), float(found.std())) == pytest.approx((0, 1), abs=1e-4)


def test_coupled_baselines():
    """The paper's two, with C for right answers and S in the place of the grounding."""
    acc, fmt, c, s = (torch.tensor(v, dtype=torch.float32) for v in (ACC, FMT, R_C, R_S))
    expected = {"additive": (acc + acc * c + fmt * s) / 3, "multiplicative": 0.5 * acc * c + 0.5 * fmt * s}
    for mode, reward in expected.items():
        seen, found = card(), Fgrpo(constraints=TAUS, accuracy="acc", always=["S"], mode=mode, format="fmt")
        close(found.group_advantages(seen.advantages, seen), group_normalised(reward).tolist())
        found.observe(seen)
        assert found.state == {}, "no multipliers"


# In the trainer


def accurate(completions, **kwargs):
    return letters_reward(completions)


def short_words(completions, **kwargs):
    """Not applicable to a text without a letter."""
    texts = [c[0]["content"] for c in completions]
    return [None if not any(ch.isalpha() for ch in t) else 1.0 - t.count("a") / len(t) for t in texts]


SETTINGS = {"constraints": {"short_words": 0.99}, "accuracy": "accurate", "minimum": 1, "eta": 0.5}
WITH = {"reward_weights": [1.0, 0.0]}


def run(folder, settings=None, resume=None, **kwargs):
    return train(
        folder,
        {"fgrpo": SETTINGS | (settings or {})},
        resume,
        rewards=[accurate, short_words],
        **WITH | kwargs,
    )


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_no_multiplier_is_trl(tmp_path, loss_type):
    settings = {"loss_type": loss_type, "beta": 0.1}
    ours = run(tmp_path, {"initial": 0, "eta": 0, "whiten": False}, **settings)
    args = trl.GRPOConfig(**grpo_args(str(tmp_path), reward_weights=[1.0, 0.0], **settings))
    stock = trl.GRPOTrainer(tiny_path(), [accurate, short_words], args, prompts())
    stock.train()
    assert_equal(weights(ours), weights(stock))


def test_constant_multipliers_are_trls_normalise_then_sum(tmp_path):
    """One constraint on all rows with lambda 0.7 for good: TRL's own multi-objective mode with that weight."""
    fixed = {"initial": 0.7, "eta": 0, "always": ["short_words"]}
    ours = run(tmp_path, fixed)
    config = {"reward_weights": [1.0, 0.7], "multi_objective_aggregation": "normalize_then_sum", "loss_type": "grpo"}
    stock = trl.GRPOTrainer(
        tiny_path(), [accurate, short_words], trl.GRPOConfig(**grpo_args(str(tmp_path), **config)), prompts()
    )
    stock.train()
    for name, value in weights(stock).items():
        torch.testing.assert_close(weights(ours)[name], value, rtol=1e-4, atol=1e-5)


def test_metrics_in_the_log(tmp_path):
    log = run(tmp_path).state.log_history[:3]
    value = 1.0
    for entry in log:
        assert entry["fgrpo/lambda_short_words"] == pytest.approx(value, abs=1e-5)
        assert entry["fgrpo/gap_short_words"] == pytest.approx(0.99 - entry["fgrpo/score_short_words"], abs=1e-5)
        assert 0 < entry["fgrpo/applies_short_words"] <= 1 and entry["fgrpo/accuracy"] > 0
        assert "fgrpo/spread_short_words" in entry
        value = min(max(value + 0.5 * entry["fgrpo/gap_short_words"], 0), 5)
    assert value != 1.0


def test_accumulation_does_not_matter(tmp_path):
    runs = {}
    for size in (8, 2):
        runs[size] = run(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            optim="sgd",
            learning_rate=0.1,
        )
    for name, value in weights(runs[8]).items():
        torch.testing.assert_close(weights(runs[2])[name], value, rtol=1e-3, atol=1e-5)


def test_resume_inside_a_window_equals_not_stopping(tmp_path):
    """The multipliers are in the checkpoint: the rollout after the restart uses them."""
    settings = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    whole = run(tmp_path, **settings)
    resumed = run(tmp_path, resume=str(tmp_path / "checkpoint-3"), **settings)
    assert_equal(weights(whole), weights(resumed))
    ours, theirs = (t.plan.methods[0].state["lambda"]["short_words"] for t in (whole, resumed))
    assert ours == theirs != 1.0


# With images: the task's reward is that of tests.test_vlm


def test_on_a_vision_language_model(tmp_path):
    settings = {"constraints": {"letters_reward": 0.99}, "accuracy": "letters_reward", "minimum": 1}
    trainer = train_vlm(tmp_path, methods={"fgrpo": settings})
    first, second = trainer.state.log_history[:2]
    assert first["fgrpo/lambda_letters_reward"] == 1.0
    expected = dual_step(1.0, first["fgrpo/score_letters_reward"], 0.99, 0.05, 5.0)
    assert second["fgrpo/lambda_letters_reward"] == pytest.approx(expected, abs=1e-5)
    assert expected > 1.0


def test_no_multiplier_is_trl_with_images(tmp_path):
    neutral = {"constraints": {"letters_reward": 0.9}, "accuracy": "letters_reward"}
    neutral |= {"initial": 0, "eta": 0, "whiten": False}
    ours = train_vlm(tmp_path, methods={"fgrpo": neutral}, beta=0.1)
    stock = train_vlm(tmp_path, trl.GRPOTrainer, trl.GRPOConfig, beta=0.1)
    assert_equal(weights(ours), weights(stock))


# Configuration


@pytest.mark.parametrize(
    ("settings", "kwargs", "words"),
    [
        ({"constraints": {}}, {}, "no constraints; name rewards"),
        ({"constraints": {"short_words": "high"}}, {}, "short_words has no number"),
        ({"always": ["other"]}, {}, "other is no constraint"),
        ({"initial": 6.0}, {}, "initial 6.0 is above largest"),
        ({"mode": "additive"}, {}, "eta has no effect without mode: constrained"),
        ({"format": "accurate"}, {}, "format has no effect without mode: additive"),
        ({}, {"scale_rewards": "none"}, "set scale_rewards: group"),
        ({}, {"multi_objective_aggregation": "normalize_then_sum"}, "set multi_objective_aggregation: sum_then"),
        ({"constraints": {"other": 0.9}}, {}, "'other' is not a reward of this run"),
        ({}, {"reward_weights": [1.0, 1.0]}, "set reward_weights with 0 in its place"),
        ({"accuracy": None, "constraints": {"spoke": 0.5}}, {"reward_weights": [1, 1, 0]}, "name the one .* accuracy"),
    ],
)
def test_clashes_name_the_flag(tmp_path, settings, kwargs, words):
    rewards = [accurate, short_words, spoke]
    weights_ = kwargs.pop("reward_weights", [1.0, 0.0])
    rewards = rewards[: len(weights_)]
    given = {"reward_weights": weights_} | kwargs
    args = grpo_args(str(tmp_path), **given)
    with pytest.raises(PlanError, match=words):
        config = trl_ext.GRPOConfig(**args, methods={"fgrpo": SETTINGS | settings})
        trl_ext.GRPOTrainer(tiny_path(), rewards, config, prompts())


def spoke(completions, **kwargs):
    return [1.0] * len(completions)


def test_other_owners_of_the_advantage_are_refused(tmp_path):
    args = grpo_args(str(tmp_path))
    for other, words in (
        ({"capo": {"preset": "rein_capo"}}, "capo and fgrpo both replace the baseline"),
        ({"paced": {"use": "advantages"}}, "name fgrpo before paced"),
    ):
        with pytest.raises(PlanError, match=words):
            trl_ext.GRPOConfig(**args, methods=other | {"fgrpo": SETTINGS})


def test_recipe_has_the_papers_numbers():
    recipe = load_recipe("fgrpo_qwen2.5_vl_3b", ["--use_cpu", "true"])
    (found,), args = recipe.plan.methods, recipe.training_args
    assert found.constraints == {"judge_consistent": 0.95} and found.accuracy == "math_correct"
    assert (found.initial, found.eta, found.largest, found.minimum) == (1.0, 0.05, 5.0, 8)
    assert (args.num_generations, args.beta, args.epsilon) == (5, 0.001, 0.28)
    assert args.reward_weights == [0.5, 0.5, 0.0]
