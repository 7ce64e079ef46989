"""group_dpo: the card's numbers, DPO at two completions, frozen and exact weights, splits, restart, what it costs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import trl

import trl_ext
from tests.methods.spy import spied
from tests.methods.training import make, train
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, tiny_tokenizer, weights
from trl_ext.method import Metrics, RunShape, StepRows, overrides
from trl_ext.methods.grpo.group_dpo import GroupDpo, group_losses, unit_range
from trl_ext.plan import PlanError
from trl_ext.recipe import load_recipe

R = torch.tensor([[1.0, 0.0, 0.5, 0.5]])
D = torch.tensor([[0.8, -0.4, 0.1, 0.3]])


def advantages(rewards, ddof=1):
    return (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True, correction=ddof)


# The maths


def test_worked_example():
    a = advantages(R)
    assert a[0].tolist() == pytest.approx([1.224745, -1.224745, 0, 0], abs=1e-6)
    loss, slopes, u = group_losses(D, a, 0.1)
    assert (u.item(), loss.item()) == pytest.approx((0.146969, 0.622360), abs=1e-6)
    assert slopes[0].tolist() == pytest.approx([-0.056745, 0.056745, 0, 0], abs=1e-6)


def test_worked_example_with_the_population_std():
    loss, _, u = group_losses(D, advantages(R, ddof=0), 0.1)
    assert (u.item(), loss.item()) == pytest.approx((0.169706, 0.611890), abs=1e-6)


def test_two_completions_are_dpo():
    """-log sigmoid(beta' (d_w - d_l)), beta' = beta / sqrt(2) with ddof 1, beta with ddof 0."""
    rewards, d = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.8, -0.4]])
    for ddof, beta in ((1, 0.1 / math.sqrt(2)), (0, 0.1)):
        loss, _, _ = group_losses(d, advantages(rewards, ddof), 0.1)
        assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-beta * 1.2))), abs=1e-6)
    loss, _, u = group_losses(d, advantages(rewards), 0.1)
    assert (u.item(), loss.item()) == pytest.approx((0.084853, 0.651621), abs=1e-6)


def test_at_the_reference():
    loss, slopes, _ = group_losses(torch.zeros(1, 4), advantages(R), 0.1)
    assert loss.item() == pytest.approx(0.693147, abs=1e-6)
    torch.testing.assert_close(slopes, -0.05 * advantages(R))


def test_what_does_not_matter():
    """A constant on all d_i or all R_i, a positive factor on R; and the slopes of a group add up to 0."""
    loss, slopes, _ = group_losses(D, advantages(R), 0.1)
    assert slopes.sum().item() == pytest.approx(0, abs=1e-7)
    for d, rewards in ((D + 3.0, R), (D, R - 7.0), (D, 5.0 * R)):
        again, same, _ = group_losses(d, advantages(rewards), 0.1)
        torch.testing.assert_close(again, loss)
        torch.testing.assert_close(same, slopes)


def test_derivative_is_that_of_the_written_loss():
    torch.manual_seed(0)
    d = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    a = advantages(torch.rand(5, 6, dtype=torch.float64))
    written = -torch.log(1 / (1 + torch.exp(-0.7 * (a * d).sum(1))))
    written.sum().backward()
    loss, slopes, _ = group_losses(d, a, 0.7)
    torch.testing.assert_close(loss, written.detach().float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slopes, d.grad.float(), rtol=1e-5, atol=1e-6)


def test_loss_falls_as_the_best_rises_and_stays_finite():
    losses = [group_losses(torch.tensor([[d, 0, 0, 0]]), advantages(R), 0.1)[0].item() for d in (-1e4, -1, 0, 1, 1e4)]
    assert losses == sorted(losses, reverse=True) and math.isfinite(losses[0]) and losses[-1] == 0


def test_unit_range():
    """Each reward by itself, in its own group; equal values give 0; an unscored one stays so."""
    nan = math.nan
    rewards = torch.tensor([[[2.0, 5.0], [4.0, 5.0], [3.0, nan]], [[nan, 0.0], [nan, -1.0], [nan, 3.0]]])
    expected = torch.tensor([[[0, 0.0], [1, 0], [0.5, nan]], [[nan, 0.25], [nan, 0], [nan, 1]]])
    torch.testing.assert_close(unit_range(rewards), expected, equal_nan=True)
    assert not overrides(GroupDpo(), "shape_rewards") and overrides(GroupDpo(min_max=True), "shape_rewards")


# Rows and metrics, by hand: two groups, the second with equal rewards


def rollout(old, metrics=None):
    """d of the worked example and of a group with equal rewards, as 2 tokens a row: one carries d, one is masked."""
    given = torch.cat([D, torch.full((1, 4), 2.0)]).view(8, 1)
    logps = torch.cat([given - 1, torch.full((8, 1), 99.0)], dim=1)
    return SimpleNamespace(
        advantages=torch.cat([advantages(R), torch.zeros(1, 4)]).flatten(),
        mask=torch.tensor([[1, 0]] * 8),
        old_logps=logps if old else None,
        ref_logps=lambda: torch.full((8, 2), -1.0),
        gather=lambda values: (values, slice(None)),
        run=RunShape(10, 4, 2.0),
        metrics=metrics or Metrics(),
    )


def observed(method):
    """`method` after the rollout was scored."""
    method.observe(SimpleNamespace(total=torch.cat([R, torch.zeros(1, 4)])))
    return method


def step_rows(method):
    given = rollout(True)
    observed(method)
    streams = method.streams(rollout(False))
    return StepRows(
        mask=given.mask,
        drift=lambda: None,
        logps=lambda: given.old_logps,
        ref_logps=given.ref_logps(),
        streams=streams,
        by_group=lambda values: values.view(2, 4),
        own=lambda table: table.flatten(),
        step=0,
        run=given.run,
        metrics=Metrics(),
    )


def test_frozen_and_exact_rows_are_the_same_here_and_their_metrics_right():
    metrics = Metrics()
    frozen = observed(GroupDpo()).streams(rollout(True, metrics))
    method = GroupDpo()
    rows = step_rows(method)
    exact = method.coupled(rows)
    weight = (0.463324 + 0.5) / 2  # 1 - sigmoid(0.146969)
    for found, store in ((frozen, metrics), (exact, rows.metrics)):
        assert found["value"].tolist() == pytest.approx([0.622360] * 4 + [0.693147] * 4, abs=1e-6)
        assert found["slope"].tolist() == pytest.approx([-0.226981, 0.226981] + [0] * 6, abs=1e-5)  # 4 x the card's
        logged = {key: float(total[0] / total[1]) for key, total in store.totals.items()}
        assert logged == pytest.approx({"u_mean": 0.146969 / 2, "weight": weight, "implicit_acc": 1.0}, abs=1e-6)


def test_dropping_equal_groups_keeps_the_scale_of_the_others():
    """One of two groups counts: the mean over rows is its loss, and its gradient twice that of keeping both."""
    method = GroupDpo(equal_rewards="drop")
    found = method.coupled(step_rows(method))
    assert found["value"].mean().item() == pytest.approx(0.622360, abs=1e-6)
    assert found["slope"].tolist() == pytest.approx([-0.453961, 0.453961] + [0] * 6, abs=1e-5)


def test_mean_over_the_group():
    """u / 4: slopes -(1 - sigmoid(0.036742)) 0.025 A."""
    method = GroupDpo(over_group="mean")
    found = method.coupled(step_rows(method))
    slope = 4 * 0.025 * 1.224745 / (1 + math.exp(0.036742))
    assert found["slope"].tolist() == pytest.approx([-slope, slope] + [0] * 6, abs=1e-6)
    assert found["value"][0].item() == pytest.approx(math.log(1 + math.exp(-0.036742)), abs=1e-6)


# In the trainer


def reference(x, beta, length_norm=False):
    """-log sigmoid of a micro-batch of whole groups, written out, with gradient to x.logps."""
    logps = x.logps.detach().clone().requires_grad_()
    d = ((logps - x.ref_logps) * x.mask).sum(1)
    d = d / x.mask.sum(1) if length_norm else d
    ids = x.streams["groups/id"]
    margins = [beta * (x.advantages[ids == i] * d[ids == i]).sum() for i in ids.unique()]
    loss = -torch.stack(margins).sigmoid().log().mean()
    loss.backward()
    return loss.detach(), logps.grad


EXACT = {"weight_at": "step", "beta": 2.0}


@pytest.mark.parametrize("kwargs", [{}, {"lora": True}], ids=["plain", "lora"])
def test_exact_weights_are_the_written_loss(tmp_path, monkeypatch, kwargs):
    """The reference is the model at the start, which under PEFT is the one with the adapter off."""
    seen = spied(monkeypatch)
    train(tmp_path, {"group_dpo": EXACT}, num_iterations=2, max_steps=4, **kwargs)
    apart = 0.0
    for x in seen:
        _, gradient = reference(x, 2.0)
        torch.testing.assert_close(x.logps.grad, gradient, rtol=1e-4, atol=1e-6)
        apart = max(apart, float((x.logps.detach() - x.ref_logps).abs().max()))
    assert bool((seen[0].logps - seen[0].ref_logps).abs().max() < 1e-5)
    assert apart > 1e-2


def test_length_norm(tmp_path, monkeypatch):
    seen = spied(monkeypatch)
    train(tmp_path, {"group_dpo": EXACT | {"length_norm": True}}, max_steps=2)
    for x in seen:
        torch.testing.assert_close(x.logps.grad, reference(x, 2.0, True)[1], rtol=1e-4, atol=1e-6)


def test_first_step_is_half_a_policy_gradient(tmp_path, monkeypatch):
    """(beta / 2) A_i per sequence log-prob, a mean over 2 groups."""
    seen = spied(monkeypatch)
    trainer = train(tmp_path, "group_dpo", max_steps=1)
    (x,) = seen
    torch.testing.assert_close(x.logps.grad, -0.025 * x.advantages.unsqueeze(1) * x.mask)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert (log["group_dpo/u_mean"], log["group_dpo/weight"]) == pytest.approx((0, 0.5), abs=1e-5)
    assert log["group_dpo/kl"] == pytest.approx(0, abs=1e-6) and "group_dpo/implicit_acc" in log and "kl" not in log


def test_frozen_weights_are_those_of_the_rollout(tmp_path, monkeypatch):
    """Two passes: the slopes of the first serve the second, in which the exact ones would be others."""
    seen = spied(monkeypatch)
    train(tmp_path, {"group_dpo": {"beta": 2.0}}, num_iterations=2, max_steps=4)
    for first, second in (seen[:2], seen[2:]):
        torch.testing.assert_close(first.logps.grad, reference(first, 2.0)[1], rtol=1e-4, atol=1e-6)
        expected = first.streams["group_dpo/slope"] / 8
        torch.testing.assert_close(second.streams["group_dpo/slope"], 8 * expected)
        torch.testing.assert_close(second.logps.grad, expected.unsqueeze(1) * second.mask)
        assert bool((reference(second, 2.0)[1] - second.logps.grad).abs().max() > 1e-4)


def test_frozen_and_exact_give_the_same_first_step(tmp_path):
    """On each rollout's first step, with old log-probs of TRL (two passes, one taken) and without."""
    for kwargs in ({"num_iterations": 2, "max_steps": 1}, {"max_steps": 3}):
        frozen, exact = (
            train(tmp_path, {"group_dpo": {"weight_at": at, "beta": 2.0}}, optim="sgd", learning_rate=0.1, **kwargs)
            for at in ("rollout", "step")
        )
        for name, value in weights(exact).items():
            torch.testing.assert_close(weights(frozen)[name], value, rtol=0, atol=1e-6)


def test_equal_rewards_train_nothing(tmp_path):
    def praise(completions, **kwargs):
        return [1.0] * len(completions)

    for methods in ("group_dpo", {"group_dpo": {"min_max": True, "equal_rewards": "drop"}}):
        trainer = train(tmp_path, methods, rewards=praise)
        assert_equal(weights(trainer), weights(make(tmp_path, None, rewards=praise)))
        assert all("group_dpo/implicit_acc" not in entry for entry in trainer.state.log_history)


def test_equal_rewards_leave_the_kl_term(tmp_path):
    """TRL with advantages of 0 and its KL term, bit for bit."""

    def praise(completions, **kwargs):
        return [1.0] * len(completions)

    kwargs = {"beta": 0.1, "num_iterations": 2, "loss_type": "grpo"}
    ours = train(tmp_path, "group_dpo", rewards=praise, **kwargs)
    stock = trl.GRPOTrainer(tiny_path(), praise, trl.GRPOConfig(**grpo_args(str(tmp_path), **kwargs)), prompts())
    stock.train()
    assert_equal(weights(ours), weights(stock))


SPLITS = {
    "groups in micro-batches": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "groups in steps": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
}


@pytest.mark.parametrize("weight_at", ["rollout", "step"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("split", SPLITS.values(), ids=list(SPLITS))
def test_micro_batches_do_not_matter(tmp_path, split, passes, weight_at):
    kwargs = {"optim": "sgd", "learning_rate": 0.2, "num_iterations": passes, "max_steps": 4}
    methods = {"group_dpo": {"weight_at": weight_at, "beta": 1.0, "equal_rewards": "drop"}}
    whole = train(tmp_path, methods, **kwargs)
    cut = train(tmp_path, methods, **kwargs, **split)
    start = weights(make(tmp_path, methods))
    assert max(float((value - start[name]).abs().max()) for name, value in weights(whole).items()) > 1e-3
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], value, rtol=1e-3, atol=2e-5)
    for one, other in zip(whole.state.log_history, cut.state.log_history, strict=True):
        for key in (k for k in one if k.startswith("group_dpo/")):
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("weight_at", ["rollout", "step"])
def test_resume_inside_a_window_equals_not_stopping(tmp_path, weight_at):
    settings = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    methods = {"group_dpo": {"weight_at": weight_at, "beta": 1.0}}
    whole = train(tmp_path, methods, **settings)
    resumed = train(tmp_path, methods, resume=str(tmp_path / "checkpoint-3"), **settings)
    assert_equal(weights(whole), weights(resumed))


TORN = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize(
    "settings, kwargs, expected",
    [
        ({}, {}, {"reference": 2, "loss": 2}),  # nothing more
        ({}, TORN, {"reference": 2, "loss": 8, "coupled": 8}),  # the policy once per rollout, in micro-batches
        ({}, TORN | {"num_iterations": 2}, {"old": 1, "reference": 1, "loss": 8}),  # TRL's log-probs serve
        ({"weight_at": "step"}, TORN | {"num_iterations": 2}, {"old": 1, "reference": 1, "loss": 8, "coupled": 4}),
        ({"weight_at": "step"}, {"num_iterations": 2}, {"old": 1, "reference": 1, "loss": 2}),
    ],
)
def test_forwards(tmp_path, monkeypatch, settings, kwargs, expected):
    """Two optimizer steps cost what `cost` says."""
    count, original = [], trl.GRPOTrainer._get_per_token_logps_and_entropies
    monkeypatch.setattr(
        trl.GRPOTrainer,
        "_get_per_token_logps_and_entropies",
        lambda *a, **k: count.append(1) or original(*a, **k),
    )
    train(tmp_path, {"group_dpo": settings}, max_steps=2, **kwargs)
    assert len(count) == sum(expected.values())


def bytes_of(row):
    return tiny_tokenizer().decode(row, skip_special_tokens=True)


def test_min_max_balances_rewards(tmp_path, monkeypatch):
    """Plainly, a reward of tiny range changes nothing; scaled, it counts as much as the other."""
    seen = spied(monkeypatch)

    def tiny(completions, **kwargs):
        return [1e-4 * (sum(map(ord, c[0]["content"])) % 7) for c in completions]

    for settings in ({}, {"min_max": True}):
        args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), max_steps=1), methods={"group_dpo": settings})
        trl_ext.GRPOTrainer(tiny_path(), [letters_reward, tiny], args, prompts()).train()
    plain, scaled = seen
    assert torch.equal(plain.completion_ids, scaled.completion_ids)
    texts = [[{"content": bytes_of(row)}] for row in scaled.completion_ids]
    ids = scaled.streams["groups/id"]
    for i in ids.unique():
        parts = [
            torch.tensor(f([t for t, k in zip(texts, ids, strict=True) if k == i])) for f in (letters_reward, tiny)
        ]
        scores = sum((p - p.min()) / (p.max() - p.min()) if p.max() > p.min() else 0 * p for p in parts)
        expected = (scores - scores.mean()) / (scores.std() + 1e-4)
        torch.testing.assert_close(scaled.advantages[ids == i], expected, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(plain.advantages[ids == i], expected, atol=0.1)


@pytest.mark.parametrize(
    "settings, kwargs, words",
    [
        ({}, {"epsilon_high": 0.28}, "epsilon_high"),
        ({}, {"delta": 2.0}, "leave it at None"),
        ({}, {"loss_type": "vespo"}, "set loss_type: dapo"),
        ({"over_group": "man"}, {}, "did you mean 'mean'"),
        ({"beta": 0}, {}, "must be > 0"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, settings, kwargs, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **kwargs), methods={"group_dpo": settings})


def test_recipe_has_the_cards_numbers():
    """Eight prompts with six completions each per optimizer step, as on the paper's eight GPUs."""
    recipe = load_recipe("group_dpo_qwen2.5_3b", [] if torch.cuda.is_available() else ["--use_cpu", "true"])
    (method,), args = recipe.plan.methods, recipe.training_args
    assert method == GroupDpo()
    assert (args.num_generations, args.beta, args.num_iterations) == (6, 0.0, 1)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 8 * 6
    assert args.per_device_train_batch_size % args.num_generations == 0  # groups fit a micro-batch: nothing extra
