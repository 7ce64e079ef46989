"""FG-ExPO: the card's numbers, the KL coefficient in TRL's loss, and draws that follow the table of pass rates."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import trl

import trl_ext
from tests.methods.groups import logged, made_group
from tests.methods.training import make, train
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext.method import Draw, Metrics
from trl_ext.methods.grpo.fg_expo import FgExpo, frontier_weights, kl_scale, outcomes
from trl_ext.plan import PlanError, make_plan
from trl_ext.recipe import load_recipe
from trl_ext.rollouts.pass_rates import PassRates

OFF = {"akl": False, "gcs": False}
SHARP = {"sigma": 0.15, "factor": 0.5}


def one_in_four(completions, **kwargs):
    """One right answer in every group of four."""
    return [float(i % 4 == 0) for i in range(len(completions))]


def long_text(completions, **kwargs):
    """0/1, and not the same for all groups."""
    return [float(sum(map(ord, c[0]["content"])) % 5 < 2) for c in completions]


def with_rates(rates, groups=20):
    """(P,) pass rates -> (P, groups, 1) rewards with that share of ones."""
    return [[[float(g < round(rate * groups))] for g in range(groups)] for rate in rates]


def asked(count, size, step=0):
    """What the trainer asks for, with metrics of its own."""
    return Draw(count, size, seed=0, step=step, metrics=Metrics(), row=lambda i: {})


# Adaptive KL


@pytest.mark.parametrize(
    "accuracy, rho, beta",
    [
        (0.0, 0.500000, 0.010000),
        (0.25, 0.622459, 0.012449),
        (0.5, 0.731059, 0.014621),
        (0.75, 0.817574, 0.016351),
        (1.0, 0.880797, 0.017616),
    ],
)
def test_worked_kl_coefficients(accuracy, rho, beta):
    assert kl_scale(accuracy) == pytest.approx(rho, abs=1e-6)
    method = FgExpo()
    method.observe(made_group(with_rates([accuracy], groups=4)))
    assert method.kl_coef(0.02, 0) == pytest.approx(beta, abs=1e-6)


def test_less_accuracy_means_less_kl():
    scales = [kl_scale(x) for x in np.linspace(0, 1, 101)]
    assert all(a < b for a, b in itertools.pairwise(scales))
    assert scales[0] == 0.5 and scales[-1] == pytest.approx(0.880797, abs=1e-6)
    assert {kl_scale(x, "constant") for x in (0.0, 0.3, 1.0)} == {1.0}


def test_the_accuracy_is_that_of_the_named_reward_over_all_completions():
    rewards = [[[1.0, 0.0], [0.0, 9.0]], [[1.0, -2.0], [1.0, 0.5]], [[0.0, 1.0], [0.0, 1.0]]]
    method = FgExpo(accuracy="right", gcs=False)
    seen = made_group(rewards, names=("right", "style"))
    method.observe(seen)
    assert method.state["acc"] == 0.5 == logged(seen.metrics)["acc"]
    assert logged(seen.metrics)["one_sided"] == pytest.approx(2 / 3)


def test_without_a_name_the_sum_reaches_the_threshold_or_not():
    rewards = [[[1.0, 0.0], [0.5, 0.6]], [[1.0, 0.5], [float("nan"), 1.0]]]
    seen = made_group(rewards, names=("a", "b"), weights=(1.0, 2.0))
    assert outcomes(seen, None, 1.7).tolist() == [[0.0, 1.0], [1.0, 1.0]]  # sums 1, 1.7, 2, 2
    assert outcomes(seen, "a", 1.0).tolist() == [[1.0, 0.0], [1.0, 0.0]]  # no score is wrong


def test_rewards_that_are_no_accuracy_are_refused():
    with pytest.raises(ValueError, match=r"'right' is between -1 and 1.*set threshold"):
        outcomes(made_group([[-1.0, 1.0]], ["right"]), "right", None)
    with pytest.raises(ValueError, match=r"the reward is between 0 and 1\.5"):
        outcomes(made_group([[[0.0], [1.5]]]), None, None)


def test_fixed_accuracy_is_trl_with_the_scaled_beta(tmp_path):
    """acc is 0.25 in every rollout: bit for bit GRPO with beta rho(0.25), which is less KL than with beta."""
    kwargs = {"rewards": one_in_four, "num_iterations": 2, "max_steps": 4}
    scaled = train(tmp_path, {"fg_expo": {"gcs": False}}, beta=0.5, **kwargs)
    by_hand = train(tmp_path, None, beta=0.5 * kl_scale(0.25), **kwargs)
    assert_equal(weights(scaled), weights(by_hand))
    for entry in scaled.state.log_history[:4]:
        assert entry["fg_expo/beta_eff"] == pytest.approx(0.5 * 0.622459, abs=1e-6)
    other = weights(train(tmp_path, None, beta=0.5, **kwargs))
    assert any(not torch.equal(value, other[name]) for name, value in weights(scaled).items())


def test_every_update_on_a_rollout_has_its_coefficient(tmp_path):
    """Two passes over each rollout: beta_eff is rho of the accuracy that was logged at its first pass."""
    settings = {"num_iterations": 2, "max_steps": 6, "beta": 0.5, "rewards": long_text}
    log = train(tmp_path, {"fg_expo": {"gcs": False}}, **settings).state.log_history[:6]
    accuracies = [entry["fg_expo/acc"] for entry in log if "fg_expo/acc" in entry]
    assert len(accuracies) == 3 and len(set(accuracies)) > 1
    expected = [0.5 * kl_scale(accuracies[step // 2]) for step in range(6)]
    assert [entry["fg_expo/beta_eff"] for entry in log] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("settings", [OFF, {"gcs": False, "rho": "constant"}])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_neutral_settings_are_trl_bit_for_bit(tmp_path, settings, beta):
    if settings is not OFF and beta == 0:
        with pytest.raises(PlanError, match="beta: 0 has none"):
            make(tmp_path, {"fg_expo": settings}, beta=beta)
        return
    ours = train(tmp_path, {"fg_expo": settings}, beta=beta)
    config = trl.GRPOConfig(**grpo_args(str(tmp_path), loss_type="grpo", beta=beta))
    stock = trl.GRPOTrainer(tiny_path(), letters_reward, config, prompts())
    stock.train()
    assert_equal(weights(ours), weights(stock))


# Curriculum


def test_worked_visits():
    """Card: four prompts at 0.5, three of them visited with rates 1, 0.25, 0."""
    method = FgExpo(akl=False)
    draw = asked(3, 4)
    method.choose_prompts(draw)
    assert logged(draw.metrics)["effective_prompts"] == pytest.approx(4)  # the first rollout is uniform
    seen = made_group(with_rates([1, 0.25, 0]), drawn=torch.tensor([0, 1, 2]))
    method.observe(seen)
    assert method.state["rates"].tolist() == pytest.approx([0.55, 0.475, 0.45, 0.5], abs=1e-6)
    table = method._table(4)
    assert table.weights.tolist() == pytest.approx([0.989848, 0.997452, 0.989848, 1], abs=1e-6)
    expected = [0.248884, 0.250796, 0.248884, 0.251436]
    assert table.probabilities.tolist() == pytest.approx(expected, abs=1e-6)
    next_draw = asked(3, 4, step=1)
    method.choose_prompts(next_draw)
    number = 1 / sum(p * p for p in expected)
    assert logged(next_draw.metrics)["effective_prompts"] == pytest.approx(number, abs=1e-4)
    found = logged(seen.metrics)
    assert found["acc"] == pytest.approx(1.25 / 3) and found["one_sided"] == pytest.approx(2 / 3)
    assert (found["rate_drawn"], found["visits"], found["visited"]) == (0.5, 1, 0.75)
    assert [found[f"rates_{b}"] for b in ("0.2_0.4", "0.4_0.6")] == [0, 1]


def test_worked_table():
    rates = np.array([0, 0.25, 0.5, 0.9, 1])
    found = frontier_weights(rates, 0.5, 0.35)
    assert found.tolist() == pytest.approx([0.360448, 0.774837, 1, 0.520450, 0.360448], abs=1e-6)
    expected = [0.119505, 0.256893, 0.331545, 0.172553, 0.119505]
    assert (found / found.sum()).tolist() == pytest.approx(expected, abs=1e-6)
    assert found.max() / found.min() == pytest.approx(2.774, abs=5e-4)
    assert frontier_weights(rates, 0.5, float("inf")).tolist() == [1] * 5
    points = np.linspace(0, 1, 101)
    np.testing.assert_allclose(frontier_weights(points, 0.5, 0.2), frontier_weights(1 - points, 0.5, 0.2), atol=1e-12)
    assert frontier_weights(points, 0.7, 0.2).argmax() == 70


@pytest.mark.parametrize(
    "visits, rate, weight",
    [(1, 0.45, 0.989848), (5, 0.295245, 0.842720), (10, 0.174339, 0.648640), (22, 0.049239, 0.436341)],
)
def test_a_prompt_that_always_fails(visits, rate, weight):
    method = FgExpo(akl=False)
    method.choose_prompts(asked(1, 2))
    for _ in range(visits):
        method.observe(made_group(with_rates([0]), drawn=torch.tensor([1])))
    assert method.state["rates"].tolist() == pytest.approx([0.5, rate], abs=1e-6)
    assert float(method._table(2).weights[1]) == pytest.approx(weight, abs=1e-6)
    assert method.state["visits"].tolist() == [0, visits]


def recorded(monkeypatch):
    """The row numbers behind every rollout from here on, as the trainer's prompts show them."""
    seen = []
    original = trl_ext.GRPOTrainer._calculate_rewards

    def record(self, inputs, prompts, completions, ids):
        seen.append([int(p[0]["content"].split(" +")[0]) for p in prompts])
        return original(self, inputs, prompts, completions, ids)

    monkeypatch.setattr(trl_ext.GRPOTrainer, "_calculate_rewards", record)
    return seen


def test_a_run_draws_what_the_table_says(tmp_path, monkeypatch):
    """A table that is played again from the logged rows and their outcomes gives the same draws, step by step."""
    rows, outcomes_seen = recorded(monkeypatch), []

    def observed(completions, **kwargs):
        outcomes_seen.append(long_text(completions))
        return outcomes_seen[-1]

    observed.__name__ = "long_text"
    trainer = train(
        tmp_path, {"fg_expo": SHARP | {"akl": False}}, max_steps=12, rewards=observed, seed=3, learning_rate=1e-3
    )
    by_hand = PassRates(16, factor=0.5, initial=0.5, weight=lambda p: np.exp(-((p - 0.5) ** 2) / (2 * 0.15**2)))
    for number, (found, scores) in enumerate(zip(rows, outcomes_seen, strict=True)):
        drawn = by_hand.draw(2, seed=3, number=number)
        assert found == drawn.repeat_interleave(4).tolist()  # each prompt for its whole group
        assert len(set(drawn.tolist())) == 2
        by_hand.update(drawn, torch.tensor(scores).view(2, 4).mean(1))
    (method,) = trainer.plan.methods
    assert len(rows) == 12 == method.state["draws"]
    assert torch.equal(method.state["visits"], by_hand.visits) and int(by_hand.visits.sum()) == 24
    torch.testing.assert_close(method.state["rates"], by_hand.rates, atol=1e-7, rtol=0)
    assert trainer.state.log_history[11]["fg_expo/visited"] == (by_hand.visits > 0).sum() / 16


def test_uniform_draws_are_grpo_on_the_rows_in_that_order(tmp_path, monkeypatch):
    """sigma = inf and rho 1: stock TRL gives the same weights when its data set holds the drawn rows in a line."""
    rows = recorded(monkeypatch)
    ours = train(tmp_path, {"fg_expo": {"sigma": float("inf"), "rho": "constant"}}, beta=0.1)
    order = [row for rollout in rows for row in rollout[::4]]
    config = trl.GRPOConfig(**grpo_args(str(tmp_path), loss_type="grpo", beta=0.1), shuffle_dataset=False)
    stock = trl.GRPOTrainer(tiny_path(), letters_reward, config, prompts().select(order))
    stock.train()
    assert_equal(weights(ours), weights(stock))


def test_several_rollouts_of_one_optimizer_step_draw_anew(tmp_path, monkeypatch):
    rows = recorded(monkeypatch)
    kwargs = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 2}
    trainer = train(tmp_path, {"fg_expo": SHARP | {"akl": False}}, max_steps=2, **kwargs)
    assert len(rows) == 4 == trainer.plan.methods[0].state["draws"]
    assert rows[0] != rows[1]


@pytest.mark.parametrize("stop", [2, 3])
def test_resume_equals_not_stopping(tmp_path, monkeypatch, stop):
    """At step 2 between two rollouts, at step 3 inside a generation window: same rows, same table, same weights."""
    settings = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 8}
    settings |= {"beta": 0.5, "rewards": long_text}
    methods = {"fg_expo": SHARP}
    rows = recorded(monkeypatch)
    whole = train(tmp_path, methods, **settings)
    drawn, rows[:] = list(rows), []
    resumed = train(tmp_path, methods, resume=str(tmp_path / f"checkpoint-{stop}"), **settings)
    assert rows == drawn[(stop + 1) // 2 :]
    assert_equal(weights(whole), weights(resumed))
    (first,), (second,) = whole.plan.methods, resumed.plan.methods
    assert first.state.keys() == second.state.keys() == {"rates", "visits", "draws", "acc"}
    for name, value in first.state.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second.state[name])), name


def test_resume_on_another_data_set_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    train(tmp_path, {"fg_expo": {"akl": False}}, **settings)
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **settings), methods={"fg_expo": {"akl": False}})
    other = trl_ext.GRPOTrainer(tiny_path(), letters_reward, args, prompts(20))
    with pytest.raises(ValueError, match="has 16 rows, the training set has 20"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_one_part_alone_logs_only_its_own_numbers(tmp_path):
    common = {"fg_expo/acc", "fg_expo/one_sided"}
    curriculum = {f"fg_expo/rates_{i / 5:.1f}_{(i + 1) / 5:.1f}" for i in range(5)}
    curriculum |= {f"fg_expo/{name}" for name in ("effective_prompts", "rate_drawn", "visits", "visited")}
    expected = {
        "akl": common | {"fg_expo/beta_eff"},
        "gcs": common | curriculum,
    }
    for off, on in (("gcs", "akl"), ("akl", "gcs")):
        log = train(tmp_path, {"fg_expo": {off: False}}, max_steps=1, beta=0.1).state.log_history[0]
        assert {key for key in log if key.startswith("fg_expo/")} == expected[on]
        assert "kl" in log


def test_summary_tells_where_the_pass_rates_lie(tmp_path):
    (method,) = train(tmp_path, {"fg_expo": {"akl": False}}, rewards=long_text).plan.methods
    rates, visits = method.summary(str)
    visited = (method.state["visits"] > 0).double().mean()
    assert rates.startswith("Pass rates of 16 prompts: 0.0-0.2: 0%")
    assert "0.4 on average" in visits and f"{1 - visited:.0%} of the prompts never came" in visits  # 6 draws of 16
    assert FgExpo(**OFF).summary(str) == []


# Declarations


@pytest.mark.parametrize(
    "settings, kwargs, words",
    [
        ({}, {"beta": 0.0}, "set beta .paper: 0.02., or akl: false"),
        ({}, {"beta": 0.1, "shuffle_dataset": False}, "leave shuffle_dataset on, or gcs: false"),
        ({"sigma": 0.01}, {"beta": 0.1}, "set sigma to 0.05 or more"),
        ({"rho": "tan"}, {"beta": 0.1}, "did you mean 'tanh'"),
        ({"factor": 1.0}, {"beta": 0.1}, "factor: 1.0 must be < 1"),
    ],
)
def test_clashes_name_the_flag(tmp_path, settings, kwargs, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **kwargs), methods={"fg_expo": settings})


def test_switched_off_parts_ask_for_nothing(tmp_path):
    for settings, kwargs in (({"akl": False}, {}), ({"gcs": False}, {"beta": 0.1, "shuffle_dataset": False})):
        make(tmp_path, {"fg_expo": settings}, **kwargs)
    assert (FgExpo().owns, FgExpo(akl=False).owns) == (("sampler", "kl controller"), ("sampler",))
    assert (FgExpo(gcs=False).owns, FgExpo(**OFF).owns) == (("kl controller",), ())
    assert (
        "paced" in FgExpo.conflicts and "paced" in FgExpo().conflicts and set(FgExpo(gcs=False).conflicts) == {"dgpo"}
    )


def test_only_the_curriculum_clashes_with_paced():
    with pytest.raises(PlanError, match="set gcs: false in fg_expo"):
        make_plan({"paced": {"use": "advantages"}, "fg_expo": {}})
    with pytest.raises(PlanError, match="both replace the sampler"):
        make_plan({"fg_expo": {"akl": False}, "paced": {"use": "sampler"}})
    assert len(make_plan({"paced": {"use": "sampler"}, "fg_expo": {"gcs": False}}).methods) == 2


def test_the_accuracy_reward_must_be_known(tmp_path):
    args = grpo_args(str(tmp_path), beta=0.1)

    def built(settings):
        config = trl_ext.GRPOConfig(**args, methods={"fg_expo": settings})
        return trl_ext.GRPOTrainer(tiny_path(), [letters_reward, one_in_four], config, prompts())

    with pytest.raises(PlanError, match=r"several rewards \(letters_reward, one_in_four\); name the one"):
        built({})
    with pytest.raises(PlanError, match="accuracy 'one' is not a reward of this run"):
        built({"accuracy": "one"})
    assert built({"accuracy": "one_in_four"}) and built({"threshold": 1.5}) and built(OFF)


def test_values_from_a_command_line_are_cast():
    (method,) = make_plan('{"fg_expo": {"sigma": "inf", "akl": "false", "accuracy": "none"}}').methods
    assert (method.sigma, method.akl, method.accuracy) == (float("inf"), False, None)


def test_recipe_has_the_papers_numbers():
    """One optimizer step on 256 prompts with 8 completions each."""
    recipe = load_recipe("fg_expo_r1_distill_1.5b", ["--use_cpu", "true"])
    (method,), args = recipe.plan.methods, recipe.training_args
    assert (method.rho, method.center, method.sigma, method.factor, method.initial) == ("tanh", 0.5, 0.35, 0.9, 0.5)
    assert (args.beta, args.num_generations, args.max_completion_length, args.num_train_epochs) == (0.02, 8, 3072, 30)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 256 * 8
    assert recipe.extra.max_prompt_tokens == 1024 and recipe.reward_names == ["math_correct"]
