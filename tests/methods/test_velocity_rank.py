"""velocity_rank: the card's worked example, limits of the effective rank, slow references, state. Card: velocity_rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset

import trl_ext
from tests.methods.spy import spied
from tests.parity.test_grpo import assert_same
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext.data import load_data
from trl_ext.method import HIDDEN, Method, Setup
from trl_ext.methods import METHODS
from trl_ext.methods.grpo.velocity_rank import VelocityRank, bonus, centred_rank, gram_of, response_metrics, signal
from trl_ext.plan import PlanError, make_plan
from trl_ext.recipe import load_recipe

ROWS = [[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1], [2, 0, 1]]
Z = torch.tensor(ROWS, dtype=torch.float64)
MU = torch.tensor([2.5, 0.6, -0.2], dtype=torch.float64)


def slow_rank(states):
    """The formula with a direct SVD."""
    if len(states) < 2:
        return 0.0
    sigma = torch.linalg.svdvals(states.double() - states.double().mean(0))
    p = sigma / (sigma.sum() + 1e-8)
    return float(torch.exp(-(p * torch.log(p + 1e-8)).sum()))


def slow_metrics(states, stride, window=512):
    """ER, ERV, ERA of one response with lists."""
    last = states[-window:]
    m = [slow_rank(last[: t + 1]) for t in range(stride, len(last), stride)]
    delta = [m[j] - sum(m[:j]) / j for j in range(1, len(m))]
    change = [delta[j] - delta[j - 1] for j in range(1, len(delta))]
    return [slow_rank(states), *(sum(x) / len(x) if x else 0.0 for x in (delta, change))]


def rank(states):
    return float(centred_rank(gram_of(states)))


# Worked example


def test_worked_example_metrics():
    prefixes = [rank(Z[: t + 1]) for t in (2, 4, 6)]
    assert prefixes == pytest.approx([1.928623, 2.812976, 2.975772], abs=1e-6)
    found = response_metrics(Z.unsqueeze(0), torch.ones(1, 8), 2, 512)[0].tolist()
    assert found == pytest.approx([2.913812, 0.744663, -0.279380], abs=1e-6)


def test_worked_example_signal_and_bonus():
    metrics = torch.tensor([[2.913812, 0.744663, -0.279380]], dtype=torch.float64)
    phi, g = signal(metrics, MU, 2.0, 5.0)
    assert (g.item(), phi.item()) == pytest.approx((0.311354, 0.213963), abs=1e-6)
    advantages = torch.tensor([1.2, -0.8, 0.0, 0.2], dtype=torch.float64)
    shaped = advantages + bonus(phi.expand(4), advantages, 2.0)
    assert shaped.tolist() == pytest.approx([1.413963, -0.586037, 0.0, 0.3], abs=1e-6)


# Effective rank


def test_rank_of_known_matrices():
    direction = torch.randn(1, 5).double()
    assert rank(torch.randn(7, 1).double() * direction + 3) == pytest.approx(1, abs=1e-6)
    for k in (1, 2, 4):  # rows +-e_i: k equal singular values, already centred
        assert rank(torch.cat([torch.eye(6)[:k], -torch.eye(6)[:k]])) == pytest.approx(k, abs=1e-5)
    assert rank(torch.full((5, 3), 0.1)) == 1.0
    assert rank(torch.randn(1, 4)) == 0.0 and rank(torch.randn(0, 4)) == 0.0


@pytest.mark.parametrize("n, width", [(2, 5), (9, 4), (12, 30), (40, 3)])
def test_rank_is_bounded_invariant_and_the_svds(n, width):
    states = torch.randn(n, width).double()
    found = rank(states)
    assert 1 - 1e-6 <= found <= min(n - 1, width) + 1e-6
    assert found == pytest.approx(slow_rank(states), abs=1e-6)
    rotation = torch.linalg.qr(torch.randn(width, width).double()).Q
    for other in (states * 7, states @ rotation, states + 100 * torch.randn(width).double()):
        assert rank(other) == pytest.approx(found, abs=1e-6)


def test_precision_with_a_large_common_mean():
    """bfloat16 states whose mean is a thousand times their spread: the Gram matrix must not lose them."""
    states = (1000 + torch.randn(60, 32)).bfloat16()
    assert rank(states) == pytest.approx(slow_rank(states), rel=1e-6)


@pytest.mark.parametrize("stride, window", [(1, 512), (3, 512), (3, 10), (7, 512), (40, 512)])
def test_metrics_equal_the_slow_reference(stride, window):
    """Rows of 0..20 tokens, one with a hole (tool output); prefixes of the last tokens only."""
    hidden, mask = torch.randn(6, 20, 8), torch.zeros(6, 20)
    for row, length in enumerate((20, 13, 2, 1, 0)):
        mask[row, :length] = 1
    mask[5, :15] = 1
    mask[5, 4:7] = 0
    found = response_metrics(hidden, mask, stride, window)
    expected = [slow_metrics(h[m.bool()], stride, window) for h, m in zip(hidden, mask, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_short_responses_have_no_velocity():
    """Under 2 s tokens there is one prefix at most."""
    found = response_metrics(torch.randn(2, 10, 4), torch.ones(2, 10), 5, 512)
    assert not found[:, 1:].any() and found[:, 0].all()


# Signal


def test_signal_is_bounded_and_grows_with_era():
    metrics = torch.randn(100, 3).double() * 10
    phi, _ = signal(metrics, MU, 2.0, 5.0)
    assert phi.abs().max() <= 1
    more_er = torch.tensor([[3.0, 0.5, era] for era in (-2.0, -0.3, -0.2, 0.0, 2.0)]).double()
    phi, g = signal(more_er, MU, 2.0, 5.0)  # tanh(d_ER) > 0 > tanh(d_ERV)
    assert bool((g.diff() > 0).all()) and bool((phi.diff() > 0).all())


def test_bonus_keeps_signs():
    advantages, phi = torch.randn(200), torch.rand(200) * 2 - 1
    added = bonus(phi, advantages, 2.0)
    assert bool((added >= 0).all()) and bool((added <= advantages.abs() / 2).all())
    assert torch.equal((advantages + added).sign(), advantages.sign())
    assert not bonus(torch.ones(1), torch.zeros(1), 2.0).any()
    assert not bonus(torch.ones(3), torch.ones(3), math.inf).any()
    wide = bonus(phi[:4].unsqueeze(1), advantages[:12].view(4, 3), 2.0)
    torch.testing.assert_close(wide, torch.minimum(phi[:4, None].clamp(min=0), advantages[:12].view(4, 3).abs() / 2))


# State


def follow(method, means):
    """mu / correction that the loss of each rollout uses, for rollouts with these batch means of all columns."""
    used = []
    for mean in means:
        method.observe(None)
        found = method._averages(torch.zeros(1))
        used.append(None if found is None else found.tolist()[0])
        method.state["sums"] = torch.full((4,), 2.0 * mean)
        method.state["counts"] = torch.full((4,), 2.0)
    return used


def test_averages_up_to_the_previous_rollout():
    """a = 0.3: after x1, x1 itself; after x2, (0.3 x2 + 0.7 0.3 x1) / (1 - 0.49)."""
    used = follow(VelocityRank(), [1.0, 2.0, 5.0, 0.0])
    assert used[:2] == [None, pytest.approx(1.0)]
    assert used[2] == pytest.approx((0.3 * 2 + 0.21 * 1) / 0.51)
    assert used[3] == pytest.approx((0.3 * 5 + 0.21 * 2 + 0.147 * 1) / (1 - 0.343))


def test_literal_order_starts_at_zero_and_lags():
    """Card: at step 2 mu = 0, at step 3 a * mean_1; step n holds batches up to n - 2."""
    used = follow(VelocityRank(averages="literal"), [1.0, 2.0, 5.0, 0.0])
    assert used == [None, 0.0, pytest.approx(0.3), pytest.approx(0.7 * 0.3 + 0.3 * 2)]
    phi, _ = signal(torch.tensor([[3.0, 1.0, -1.0]]), torch.zeros(3), 2.0, 5.0)
    g = 1 / (1 + math.exp(10))  # d = (5, 5, -5)
    assert phi.item() == pytest.approx(g * math.tanh(5) + (1 - g) * math.tanh(5))


def test_adaptive_weight():
    """w (1 - (score + 1) / 2), the score kept in [-1, 1]."""
    for score, expected in ((-1.0, 3.0), (0.0, 1.5), (0.5, 0.75), (1.0, 0.0), (4.0, 0.0)):
        mu = torch.tensor([0.0, 0.0, 0.0, score])
        assert float(VelocityRank(weight=3.0, adaptive_weight=True)._weight(mu)) == pytest.approx(expected)
    assert VelocityRank(weight=3.0)._weight(torch.zeros(4)) == 3.0


# In the trainer

LONG = {"max_completion_length": 12, "loss_type": "grpo"}
SETTINGS = {"stride": 3}


def make(tmp_path, methods, reward=letters_reward, **kwargs):
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **(LONG | kwargs)), methods=methods)
    return trl_ext.GRPOTrainer(tiny_path(), reward, args, prompts())


def train(tmp_path, methods, *rest, **kwargs):
    trainer = make(tmp_path, methods, *rest, **kwargs)
    trainer.train()
    return trainer


@pytest.fixture(name="spied")
def _spied(monkeypatch):
    return spied(monkeypatch)


@pytest.mark.parametrize("settings", [{"weight": 0}, SETTINGS | {"kappa": math.inf}], ids=str)
@pytest.mark.parametrize("lora", [False, True])
def test_neutral_settings_are_trl(tmp_path, settings, lora):
    """weight 0 computes nothing; kappa infinite computes and logs everything, and trains the same."""
    assert VelocityRank(**settings).needs() == (frozenset() if "weight" in settings else frozenset({HIDDEN}))
    assert_same(tmp_path, lora, {"velocity_rank": settings}, beta=0.1, **LONG)


def expected_phi(x, averages):
    """Phi of each row from the hidden states, the slow way."""
    rows = zip(x.policy.hidden.detach(), x.mask.bool(), strict=True)
    metrics = torch.tensor([slow_metrics(h[m], 3) for h, m in rows], dtype=torch.float64)
    if averages is None:
        return metrics, torch.zeros(len(metrics)).double(), None
    d = ((metrics - averages) / (averages.abs() + 1e-8)).clamp(-5, 5)
    g = torch.sigmoid(2 * d[:, 2])
    return metrics, g * d[:, 0].tanh() + (1 - g) * d[:, 1].tanh(), g


@pytest.mark.parametrize("bonus_on", ["response", "last_token"])
def test_gradient_and_log_against_a_slow_reference(tmp_path, spied, bonus_on):
    """Three rollouts: the gradient is that of the shaped advantages as constants; every logged number by hand."""
    trainer = train(tmp_path, {"velocity_rank": SETTINGS | {"bonus_on": bonus_on, "threshold": 0.2}})
    means, shaped = [], 0
    for step, x in enumerate(spied):
        averages = None
        if means:
            parts = [0.3 * 0.7 ** (len(means) - 1 - i) for i in range(len(means))]
            averages = sum(p * m for p, m in zip(parts, means, strict=True)) / sum(parts)
        metrics, phi, g = expected_phi(x, averages)
        means.append(metrics.mean(0))
        added = torch.minimum(phi.float().clamp(min=0), x.advantages.abs() / 2)
        token = x.mask.float()
        if bonus_on == "last_token":
            token = torch.nn.functional.one_hot(x.mask.sum(1) - 1, x.mask.size(1)).float()
        per_token = x.advantages.unsqueeze(1) + added.unsqueeze(1) * token
        expected = -per_token * x.mask / (x.mask.sum(1, keepdim=True) * len(x.mask))
        torch.testing.assert_close(x.logps.grad, expected, rtol=1e-4, atol=1e-7)
        shaped += int((added > 0).sum())
        entry = {k.removeprefix("velocity_rank/"): v for k, v in trainer.state.log_history[step].items()}
        score = x.streams["velocity_rank/score"]
        found = {}
        for label, rows in (("", score >= -1), ("_right", score >= 0.2), ("_wrong", score < 0.2)):
            for i, name in enumerate(("er", "erv", "era")):
                found[name + label] = metrics[rows, i].mean()
        found["er_erv_correlation"] = torch.corrcoef(metrics.T)[0, 1]
        if averages is not None:
            learns = x.advantages != 0
            found |= {"g": g.mean(), "phi": phi.mean()}
            found |= {f"mu_{name}": averages[i] for i, name in enumerate(("er", "erv", "era"))}
            capped = (phi >= x.advantages.abs() / 2)[learns].double().mean()
            found |= {"bonus_share": (added / x.advantages.abs())[learns].mean(), "capped": capped}
        for name, value in found.items():
            assert entry[name] == pytest.approx(float(value), rel=1e-3, abs=1e-5), name
    assert shaped > 0 and "g" not in {k.split("/")[-1] for k in trainer.state.log_history[0]}


@pytest.mark.parametrize("kwargs", [{}, {"steps_per_generation": 2, "num_iterations": 2}], ids=str)
@pytest.mark.parametrize("averages", ["corrected", "literal"])
def test_resume_is_exact(tmp_path, kwargs, averages):
    methods = {"velocity_rank": SETTINGS | {"averages": averages}}
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6} | kwargs
    whole = train(tmp_path / "whole", methods, **saving)
    for stop in (1, 3):
        again = make(tmp_path / f"again{stop}", methods, **saving)
        again.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{stop}"))
        assert_equal(weights(whole), weights(again))
        first, second = (trainer.plan.methods[0].state for trainer in (whole, again))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_accumulation_does_not_matter(tmp_path):
    runs = []
    for size in (8, 1):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        trainer = train(tmp_path, {"velocity_rank": SETTINGS}, **split)
        runs.append((weights(trainer), trainer.plan.methods[0].state))
    for name, value in runs[0][0].items():
        torch.testing.assert_close(runs[1][0][name], value, rtol=1e-3, atol=5e-5)
    torch.testing.assert_close(runs[0][1]["mu"], runs[1][1]["mu"], rtol=1e-3, atol=1e-3)
    assert int(runs[1][1]["rollouts"]) == 2


@dataclass(frozen=True)
class Ramp(Method):
    name = "ramp"
    title = paper = "none"

    def token_advantages(self, advantages, x):
        return advantages.unsqueeze(1) * torch.arange(x.mask.size(1), dtype=torch.float32)


def test_token_advantages_are_capped_one_by_one(tmp_path, spied, monkeypatch):
    monkeypatch.setitem(METHODS, "ramp", Ramp)
    train(tmp_path, {"ramp": {}, "velocity_rank": SETTINGS}, max_steps=2)
    x = spied[1]
    base = x.advantages.unsqueeze(1) * torch.arange(12.0)[: x.mask.size(1)]
    shaped = -x.logps.grad * x.mask.sum(1, keepdim=True) * len(x.mask)
    added = (shaped - base) * x.mask
    assert bool((added >= -1e-5).all()) and bool((added <= base.abs() / 2 + 1e-5).all()) and added.max() > 1e-3


def test_rows_without_tokens_or_verdict(tmp_path):
    """Masked truncation leaves empty rows, a reward of None no verdict; neither enters the averages."""
    trainer = train(
        tmp_path,
        {"velocity_rank": SETTINGS},
        lambda completions, **kwargs: [None, *letters_reward(completions)[1:]],
        mask_truncated_completions=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
    )
    state = trainer.plan.methods[0].state
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history[:3])
    assert "mu" not in state or bool(state["mu"].isfinite().all())
    assert float(state.get("counts", torch.zeros(4))[0]) < 8


def test_several_rewards(tmp_path):
    """Without a verifier there is no split by right and wrong; adaptive_weight must be told which reward it means."""

    def second(completions, **kwargs):
        return [float(i % 2) for i in range(len(completions))]

    entry = train(tmp_path, {"velocity_rank": SETTINGS}, [letters_reward, second]).state.log_history[0]
    assert "velocity_rank/er" in entry and "velocity_rank/er_right" not in entry
    named = SETTINGS | {"verifier": "second", "adaptive_weight": True}
    entry = train(tmp_path, {"velocity_rank": named}, [letters_reward, second]).state.log_history[0]
    assert "velocity_rank/er_right" in entry and "velocity_rank/er_wrong" in entry
    with pytest.raises(PlanError, match="letters_reward, second"):
        make(tmp_path, {"velocity_rank": {"adaptive_weight": True}}, [letters_reward, second])
    with pytest.raises(PlanError, match="'x' is not a reward"):
        make(tmp_path, {"velocity_rank": {"verifier": "x"}})


def test_bounds():
    with pytest.raises(PlanError, match="must be > 1"):
        make_plan({"velocity_rank": {"kappa": 1}})
    (method,) = make_plan({"velocity_rank": {"kappa": "inf", "ema_alpha": 1}}).methods
    assert math.isinf(method.kappa) and VelocityRank().check(Setup(None)) == []


def test_the_recipe_for_a_real_model(tmp_path):
    """The card's values, a whole batch per step, and the data set's columns (our own text in them)."""
    path = tmp_path / "math.jsonl"
    row = {"problem": "What is 1 + 1?", "level": "Level 1", "type": "Algebra", "solution": "So $\\boxed{2}$."}
    Dataset.from_list([row, row | {"problem": "word " * 600}]).to_json(path)
    device = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    recipe = load_recipe("velocity_rank_qwen2.5_7b", [*device, "--dataset_name", str(path)])
    args, (method,) = recipe.training_args, recipe.plan.methods
    card = {"epsilon": 0.2, "beta": 0.001, "entropy_coef": 0.001, "num_generations": 8, "max_steps": 161} | {
        "temperature": 1.0,
        "max_completion_length": 1536,
    }
    assert {key: getattr(args, key) for key in card} == card
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 24 * 8
    assert args.gradient_accumulation_steps == args.steps_per_generation  # one rollout per step
    assert method == VelocityRank()  # the recipe writes out the defaults
    data = load_data(recipe, count_tokens=lambda prompt: len(prompt[0]["content"].split()))
    assert (data.rows, data.dropped) == (1, 1)
    replies = [[{"role": "assistant", "content": f"so it is \\boxed{{{n}}}"}] for n in (2, 3)]
    (reward,) = recipe.rewards
    prompt = [data.train[0]["prompt"]] * 2
    assert reward(prompts=prompt, completions=replies, answer=[data.train[0]["answer"]] * 2) == [1.0, 0.0]
