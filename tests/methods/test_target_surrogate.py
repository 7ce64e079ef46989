"""target_surrogate: the card's linear model and log-prob example, minima, schedules, stock TRL at one step, restart."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
import trl

import trl_ext
from tests.methods.spy import spied
from tests.methods.training import train
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext.methods.grpo.target_surrogate import divergence, spread, surrogate_loss, target_step
from trl_ext.plan import PlanError
from trl_ext.recipe import load_recipe

pytestmark = pytest.mark.filterwarnings("ignore:target_surrogate. one optimizer step per rollout")
DOUBLE = {"dtype": torch.float64}


def near(found, expected):
    assert torch.as_tensor(found).flatten().tolist() == pytest.approx(expected, abs=1e-6)


# The maths


def test_worked_linear_model():
    """z = X theta, l = mean (z - y)^2 / 2: five inner steps; the surrogate stays above the true loss."""
    x, y = torch.tensor([[1.0, 2.0], [3.0, -1.0]], **DOUBLE), torch.tensor([1.0, 2.0], **DOUBLE)
    theta = torch.tensor([0.5, -0.5], requires_grad=True, **DOUBLE)

    def true_loss(z):
        return 0.5 * (z - y).square().mean()

    start = (x @ theta).detach().requires_grad_()
    (g,) = torch.autograd.grad(true_loss(start), start)
    start, level = start.detach(), float(true_loss(start).detach())
    near(start, [-0.5, 2.0])
    near(g, [-0.75, 0.0])
    assert level == pytest.approx(0.5625)
    thetas = [[0.5375, -0.425], [0.56, -0.366875], [0.574156, -0.322156], [0.583470, -0.287909], [0.589840, -0.261759]]
    surrogates, losses = [0.440156, 0.372131, 0.333496, 0.311351, 0.298608], [0.431016, 0.344972, 0.286806]
    losses += [0.246556, 0.218183]

    def surrogate(at):
        return level + surrogate_loss(x @ at - start, -g, 1.0).sum()

    (first,) = torch.autograd.grad(surrogate(theta), theta)
    near(first, [-0.75, -1.5])
    near(torch.autograd.grad(true_loss(x @ theta), theta)[0], [-0.75, -1.5])
    for i in range(5):
        (slope,) = torch.autograd.grad(surrogate(theta), theta)
        theta = (theta - 0.05 * slope).detach().requires_grad_()
        near(theta.detach(), thetas[i])
        assert float(surrogate(theta).detach()) == pytest.approx(surrogates[i], abs=1e-6)
        assert float(true_loss(x @ theta).detach()) == pytest.approx(losses[i], abs=1e-6)
        assert losses[i] <= surrogates[i]
    moved = start - g
    near(moved, [0.25, 2.0])
    best = torch.linalg.solve(x, moved)
    near(best, [0.607143, -0.178571])
    assert float(surrogate(best)) == pytest.approx(0.28125) and float(true_loss(x @ best)) == pytest.approx(0.140625)


def test_worked_log_prob_example():
    gain, old = torch.tensor([1.0, -0.5], **DOUBLE), torch.tensor([-1.2, -0.3], **DOUBLE)
    logp = torch.tensor([-1.0, -0.4], requires_grad=True, **DOUBLE)
    value = surrogate_loss(logp - old, gain, 0.5).mean()
    value.backward()
    near(logp.detach() - old, [0.2, -0.1])
    assert float(value.detach()) == pytest.approx(-0.1, abs=1e-6)
    near(logp.grad, [-0.3, 0.15])
    at_old = old.clone().requires_grad_()
    surrogate_loss(at_old - old, gain, 0.5).mean().backward()
    near(at_old.grad, [-0.5, 0.25])
    ratio = torch.exp(logp - old).detach()
    clipped = -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
    assert float(clipped) == pytest.approx(-0.373791, abs=1e-6), "the loss that it replaces, at the same point"


@pytest.mark.parametrize("eta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("gain", [1.5, -0.4])
def test_minimum_is_at_eta_times_the_advantage(eta, gain):
    """Value -eta A^2 / 2, symmetric around it, and the slope turns round beyond, for both signs of A."""
    target, gain = eta * gain, torch.tensor(gain, **DOUBLE)
    d = torch.tensor([target - 0.3, target, target + 0.3], requires_grad=True, **DOUBLE)
    value = surrogate_loss(d, gain, eta)
    value.sum().backward()
    assert float(value[1].detach()) == pytest.approx(-eta * float(gain) ** 2 / 2, abs=1e-12)
    assert float(value[0].detach()) == pytest.approx(float(value[2].detach()), abs=1e-12)
    near(d.grad, [-0.3 / eta, 0.0, 0.3 / eta])
    regression = (d - eta * gain).square() / (2 * eta)  # the same up to a constant
    near((value - regression).detach(), [-eta * float(gain) ** 2 / 2] * 3)


def test_kl_divergence():
    """exp(d) - 1 - d: unbiased for KL(old || new) on tokens of the old policy, d^2 / 2 near 0; minimum exp d = 1 + eta A."""
    old, new = torch.tensor([0.5, 0.3, 0.2], **DOUBLE), torch.tensor([0.6, 0.22, 0.18], **DOUBLE)
    d = (new / old).log()
    assert float((old * divergence(d, "kl")).sum()) == pytest.approx(float((old * -d).sum()), abs=1e-12)
    assert bool((divergence(d, "kl") > 0).all())
    small = torch.tensor([-1e-3, 1e-3], **DOUBLE)
    torch.testing.assert_close(divergence(small, "kl"), divergence(small), rtol=1e-3, atol=0)
    best = torch.tensor(math.log(1 + 0.5 * 0.8), requires_grad=True, **DOUBLE)
    surrogate_loss(best, torch.tensor(0.8, **DOUBLE), 0.5, "kl").backward()
    assert float(best.grad) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", ["l2", "kl"])
@pytest.mark.parametrize("eta", [0.01, 0.5, math.inf])
def test_slope_at_the_old_policy_is_the_policy_gradient(kind, eta):
    d = torch.zeros(3, requires_grad=True, **DOUBLE)
    gain = torch.tensor([1.0, -0.5, 0.0], **DOUBLE)
    surrogate_loss(d, gain, eta, kind).sum().backward()
    near(d.grad, (-gain).tolist())


def test_limits_of_eta():
    d, gain = torch.tensor([0.3, -0.2], **DOUBLE), torch.tensor([1.0, 2.0], **DOUBLE)
    assert torch.equal(surrogate_loss(d, gain, math.inf), -gain * d)
    near(surrogate_loss(d, gain, 1e9), (-gain * d).tolist())
    tiny = 1e-9 * surrogate_loss(d, gain, 1e-9)  # what is left is the distance alone: minimum at d = 0
    near(tiny, (d.square() / 2).tolist())


def test_schedules():
    assert [target_step(t, 4, 0.8, "sqrt") for t in (1, 4)] == pytest.approx([0.8, 0.4])
    assert [target_step(t, 4, 0.8) for t in (1, 4)] == [0.8, 0.8]
    assert [target_step(t, 4, 0.8, "exponential") for t in (1, 2, 4)] == pytest.approx([0.8 / 2**0.5, 0.4, 0.2])


def test_spread_keeps_the_sum_and_leaves_masked_tokens():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    found = spread(torch.tensor([4.0, 3.0, 5.0]), mask)
    assert found.tolist() == [[2, 2, 0], [1, 1, 1], [0, 0, 0]]


# In the trainer


def stock(folder, **kwargs):
    args = trl.GRPOConfig(**grpo_args(str(folder), **{"loss_type": "grpo"} | kwargs))
    trainer = trl.GRPOTrainer(tiny_path(), letters_reward, args, prompts())
    trainer.train()
    return trainer


@pytest.mark.parametrize("settings", [{}, {"eta": 0.01, "divergence": "kl"}, {"eta": "inf"}, {"target": "sequence"}])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo", "luspo"])
def test_one_step_per_rollout_is_trl(tmp_path, settings, loss_type):
    """Whatever the settings; accumulation and a reference KL beside it. SGD: Adam would magnify a last bit."""
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    split |= {"loss_type": loss_type, "beta": 0.1, "max_steps": 2}
    ours = weights(train(tmp_path, {"target_surrogate": settings}, **split))
    for name, value in weights(stock(tmp_path, **split)).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


FOUR = {"num_iterations": 4, "max_steps": 8}


@pytest.mark.parametrize("kind", ["l2", "kl"])
def test_gradient_and_metrics_in_the_trainer(tmp_path, monkeypatch, kind):
    """Of each token's log-prob: w (-A + D'(d) / eta)."""
    seen = spied(monkeypatch)
    settings = {"eta": 0.3, "schedule": "sqrt", "divergence": kind}
    log = train(tmp_path, {"target_surrogate": settings}, **FOUR).state.log_history
    for step, x in enumerate(seen):
        d, mask = (x.logps - x.old_logps).detach(), x.mask.float()
        gain = x.advantages[:, None].expand_as(d)
        eta = 0.3 / math.sqrt(1 + step // 4)
        weight = mask / mask.sum(1, keepdim=True) / 8
        slope = d if kind == "l2" else torch.expm1(d)
        torch.testing.assert_close(x.logps.grad, weight * (slope / eta - gain), rtol=1e-4, atol=1e-6)
        value = float((weight * surrogate_loss(d, gain, eta, kind)).sum())
        n, up, down = mask.sum(), mask * (gain > 0), mask * (gain < 0)
        expected = {
            "eta": eta,
            "d_mean_pos": float((d * up).sum() / up.sum()),
            "d_mean_neg": float((d * down).sum() / down.sum()),
            "d_abs": float((d.abs() * mask).sum() / n),
            "target_residual": float(((d - eta * gain).abs() * mask).sum() / n),
            "grad_inner": float(((slope / eta - gain).abs() * mask).sum() / n),
            "surrogate": value,
        }
        found = {name: log[step][f"target_surrogate/{name}"] for name in expected}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert ("target_surrogate/surrogate_last" in log[step]) == (step % 4 == 3)
    assert log[7]["target_surrogate/surrogate_last"] == log[7]["target_surrogate/surrogate"]


@pytest.mark.parametrize("kind", ["l2", "kl"])
def test_sequence_target_in_the_trainer(tmp_path, monkeypatch, kind):
    """With s the sequence's log-ratio every token of a row has the slope w (-A + D'(s) / eta)."""
    seen = spied(monkeypatch)
    settings = {"eta": 0.5, "target": "sequence", "divergence": kind}
    log = train(tmp_path, {"target_surrogate": settings}, loss_type="dr_grpo", **FOUR).state.log_history
    for step, x in enumerate(seen):
        s = ((x.logps - x.old_logps) * x.mask).sum(1).detach()
        slope = (s if kind == "l2" else torch.expm1(s)) / 0.5 - x.advantages
        torch.testing.assert_close(x.logps.grad, slope[:, None] * x.mask / (8 * 6), rtol=1e-4, atol=1e-5)
        residual = float((s - 0.5 * x.advantages).abs().mean())
        assert log[step]["target_surrogate/target_residual"] == pytest.approx(residual, rel=1e-3, abs=1e-5)


def test_surrogate_falls_within_a_rollout(tmp_path):
    sgd = {"optim": "sgd", "learning_rate": 0.02, "num_iterations": 6, "max_steps": 6}
    log = train(tmp_path, {"target_surrogate": {"eta": 0.5}}, **sgd).state.log_history[:6]
    values = [entry["target_surrogate/surrogate"] for entry in log]
    assert values[0] == 0 and all(b < a for a, b in itertools.pairwise(values))


ADAGRAD = {"schedule": "adagrad", "eta": 0.6}


def test_adagrad_counts_rollouts_once(tmp_path, monkeypatch):
    """The first rollout's own square is in it; all rows of the rollout, over which TRL's advantages are."""
    seen = spied(monkeypatch)
    log = train(tmp_path, {"target_surrogate": ADAGRAD}, **FOUR).state.log_history
    squares = [float(seen[step].advantages.square().mean()) for step in (0, 4)]
    for step in range(8):
        eta = 0.6 / math.sqrt(sum(squares[: 1 + step // 4]))
        assert log[step]["target_surrogate/eta"] == pytest.approx(eta, rel=1e-5)


def test_adagrad_without_any_advantage_does_nothing(tmp_path):
    trainer = train(tmp_path, {"target_surrogate": ADAGRAD}, rewards=lambda completions, **kw: [1.0] * 8)
    assert all(e["grad_norm"] == 0 and "target_surrogate/eta" not in e for e in trainer.state.log_history[:3])


CASES = {
    "token": {"eta": 0.3, "divergence": "kl", "schedule": "exponential"},
    "sequence": {"eta": 1.0, "target": "sequence"},
    "adagrad": ADAGRAD,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_accumulation_does_not_matter(tmp_path, case, loss_type):
    runs = {}
    for size in (8, 2):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 6}
        sgd = {"optim": "sgd", "learning_rate": 0.1, "num_iterations": 3, "loss_type": loss_type}
        runs[size] = weights(train(tmp_path, {"target_surrogate": CASES[case]}, **split, **sgd))
    for name, value in runs[8].items():
        torch.testing.assert_close(runs[2][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_resume_inside_a_window_equals_not_stopping(tmp_path, case):
    settings = {"num_iterations": 3, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    whole = train(tmp_path, {"target_surrogate": CASES[case]}, **settings)
    resumed = train(tmp_path, {"target_surrogate": CASES[case]}, resume=str(tmp_path / "checkpoint-4"), **settings)
    assert_equal(weights(whole), weights(resumed))
    assert resumed.plan.methods[0].state == whole.plan.methods[0].state


# What is refused


@pytest.mark.parametrize(
    ("methods", "kwargs", "words"),
    [
        ({"target_surrogate": {}}, {"epsilon": 0.3}, "leave it at 0.2"),
        ({"target_surrogate": {}}, {"loss_type": "sapo"}, "set loss_type: grpo"),
        ({"target_surrogate": {}}, {"importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"target_surrogate": {"eta": "inf", "schedule": "sqrt"}}, {}, "neither schedule nor divergence"),
        ({"target_surrogate": {"target": "sequence"}, "high_entropy": {}}, {}, "high_entropy weighs single tokens"),
        ({"target_surrogate": {}, "mdpo": {}}, {}, "both replace the surrogate"),
    ],
)
def test_refused_with_the_flag_that_helps(tmp_path, methods, kwargs, words):
    args = grpo_args(str(tmp_path), **{"loss_type": "grpo", "num_iterations": 2} | kwargs)
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**args, methods=methods)


def test_one_step_per_rollout_is_said(tmp_path):
    with pytest.warns(UserWarning, match="plain GRPO without clip"):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path)), methods="target_surrogate")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="target_surrogate")
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), num_iterations=2), methods="target_surrogate")


def test_recipe():
    recipe = load_recipe("target_surrogate_qwen2.5_3b", ["--use_cpu", "true"])
    (method,), args = recipe.plan.methods, recipe.training_args
    assert (method.eta, method.schedule, method.divergence, method.target) == (0.2, "constant", "l2", "token")
    assert (args.num_iterations, args.steps_per_generation) == (4, args.gradient_accumulation_steps)
