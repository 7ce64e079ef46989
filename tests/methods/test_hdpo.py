"""hdpo: the card's worked example, the gradient of two clipped losses, denominators, TRL's tool loop, limits, restart."""

from __future__ import annotations

import random

import pytest
import torch
import trl

import trl_ext
from tests.methods.scripted_tools import right, spoke, tool_trainer
from tests.methods.spy import spied
from tests.methods.training import train
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext import ops
from trl_ext.methods.grpo.hdpo import clipped_loss, joined, tool_advantages, tool_reward
from trl_ext.plan import PlanError
from trl_ext.recipe import load_recipe

CALLS = torch.tensor([[0, 2, 3, 1]])
RIGHT = torch.tensor([[True, True, True, False]])
A_ACC = torch.tensor([0.573538, 0.573538, 0.344123, -1.491199])
A_TOOL = torch.tensor([1.148751, -0.473015, -0.675736, 0.000000])
LENGTHS = [4, 6, 10, 5]


# The maths


def test_worked_advantages():
    assert tool_reward(CALLS, RIGHT)[0].tolist() == pytest.approx([1.0, 0.333333, 0.25, 0], abs=1e-6)
    assert tool_advantages(CALLS, RIGHT)[0].tolist() == pytest.approx(A_TOOL.tolist(), abs=1e-6)


def test_worked_loss_and_shortcut():
    """Ratio 1: L_acc -0.068825, L_tool 0.250022 over 20 of 25 tokens, and the same loss from one advantage."""
    mask = torch.zeros(4, 10)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    ones, signal = torch.ones(4, 10), (A_TOOL != 0).unsqueeze(1)
    acc = (clipped_loss(A_ACC.unsqueeze(1), ones, 0.2, 0.2) * mask).sum() / mask.sum()
    tool = (clipped_loss(A_TOOL.unsqueeze(1), ones, 0.2, 0.2) * mask * signal).sum() / (mask * signal).sum()
    assert (float(acc), float(tool)) == pytest.approx((-0.068825, 0.250022), abs=1e-6)
    assert float(acc + 0.15 * tool) == pytest.approx(-0.031321, abs=1e-6)
    combined = A_ACC + 0.15 * 25 / 20 * A_TOOL
    assert combined.tolist() == pytest.approx([0.788929, 0.484848, 0.217422, -1.491199], abs=1e-6)
    assert float((clipped_loss(combined.unsqueeze(1), ones, 0.2, 0.2) * mask).sum() / 25) == pytest.approx(
        -0.031321, abs=1e-6
    )


def slow_tool_advantages(calls, good):
    """One rollout at a time."""
    chosen = [1 / (t + 1) for t, ok in zip(calls, good, strict=True) if ok]
    if len(chosen) < 2 or len(set(chosen)) == 1:
        return [0.0] * len(calls)
    mean = sum(chosen) / len(chosen)
    std = (sum((r - mean) ** 2 for r in chosen) / (len(chosen) - 1)) ** 0.5
    return [(1 / (t + 1) - mean) / (std + 1e-6) if ok else 0.0 for t, ok in zip(calls, good, strict=True)]


def test_tool_advantages_against_the_slow_way_and_invariants():
    draw = random.Random(0)
    for _ in range(60):
        calls = [draw.randrange(4) for _ in range(5)]
        good = [draw.random() < 0.6 for _ in range(5)]
        found = tool_advantages(torch.tensor([calls]), torch.tensor([good]))[0]
        assert found.tolist() == pytest.approx(slow_tool_advantages(calls, good), abs=1e-5)
        assert float(found.sum()) == pytest.approx(0, abs=1e-5)
        assert all(value == 0 for value, ok in zip(found.tolist(), good, strict=True) if not ok)
        others = torch.tensor([[t if ok else 9 for t, ok in zip(calls, good, strict=True)]])
        assert torch.equal(tool_advantages(others, torch.tensor([good]))[0], found), "calls of wrong rollouts"
        pairs = [(t, v) for t, v, ok in zip(calls, found.tolist(), good, strict=True) if ok and any(found != 0)]
        assert all(v > w for t, v in pairs for u, w in pairs if t < u)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.4)])
def test_joined_has_the_gradient_of_both_losses(low, high):
    """Every pair of signs at every side of the clip range."""
    values = torch.tensor([-1.3, -0.2, 0.0, 0.4, 2.0])
    ratios = torch.tensor([0.3, 0.79, 0.85, 1.0, 1.15, 1.3, 1.7])
    first, second, ratio = (g.flatten().unsqueeze(1) for g in torch.meshgrid(values, values, ratios, indexing="ij"))
    logs = [ratio.log().requires_grad_() for _ in range(2)]
    two = clipped_loss(first, logs[0].exp(), low, high) + clipped_loss(second, logs[0].exp(), low, high)
    one = clipped_loss(joined(first, second, ratio, low, high), logs[1].exp(), low, high)
    two.sum().backward()
    one.sum().backward()
    torch.testing.assert_close(logs[1].grad, logs[0].grad)
    shortcut = ratio.log().requires_grad_()
    clipped_loss(first + second, shortcut.exp(), low, high).sum().backward()
    assert not torch.allclose(shortcut.grad, logs[0].grad), "the shortcut is another gradient where signs disagree"
    inside = (ratio > 1 - low) & (ratio < 1 + high)
    torch.testing.assert_close(shortcut.grad[inside], logs[0].grad[inside])


# In the trainer


def script(step):
    """The card's group."""
    return [(0, True), (2, True), (3, True), (1, False)]


def reference(x, k, w_tool=0.15):
    """(B, T) gradient of -loss times rows in both channels, by autograd on the log-probs, for loss_type grpo."""
    logps = x.logps.detach().requires_grad_()
    ratio = (logps - (logps.detach() if x.old_logps is None else x.old_logps)).exp()
    loss = 0.0
    for advantages, weight, count in ((x.advantages, 1.0, 4), (x.streams["hdpo/A_tool"], w_tool, 4 / k)):
        per_row = (clipped_loss(advantages.unsqueeze(1), ratio, 0.2, 0.2) * x.mask).sum(1) / x.mask.sum(1)
        loss = loss + weight * per_row.sum() / count
    loss.backward()
    return logps.grad


def test_gradient_through_trls_tool_loop(tmp_path, monkeypatch):
    """Step 1 has ratio 1, later ones clip: TRL's gradient is that of the two losses, rows without a signal left out."""
    seen = spied(monkeypatch)
    trainer = tool_trainer(
        tmp_path, {"hdpo": {}}, script, num_iterations=3, max_steps=3, learning_rate=0.05, lr_scheduler_type="constant"
    )
    trainer.train()
    clipped = 0.0
    for x, log in zip(seen, trainer.state.log_history, strict=False):
        assert sorted(x.streams["hdpo/A_tool"].tolist()) == pytest.approx(sorted(A_TOOL.tolist()), abs=1e-5)
        assert x.streams["hdpo/rows_k"].tolist() == pytest.approx([4 / 3] * 4)
        torch.testing.assert_close(x.logps.grad, reference(x, 4 / 3), rtol=1e-4, atol=1e-7)
        clipped += log["hdpo/clip_tool"] + log["hdpo/clip_acc"]
    assert clipped > 0, "the test must see closed clips"


def test_worked_advantages_in_training(tmp_path, monkeypatch):
    """The card's A_acc of 0.9 r_acc + 0.1 r_fmt, with TRL's epsilon 1e-4 in place of its 1e-6."""

    def formatted(completions, **kwargs):
        return [float(sum("tool_calls" in turn for turn in c) != 3) for c in completions]

    seen = spied(monkeypatch)
    settings = {"rewards": [right, formatted], "reward_weights": [0.9, 0.1], "max_steps": 1}
    tool_trainer(tmp_path, {"hdpo": {"answer": "right"}}, script, **settings).train()
    (x,) = seen
    expected = sorted(zip(A_TOOL.tolist(), [0.573408, 0.573408, 0.344045, -1.490860], strict=True))
    found = sorted(zip(x.streams["hdpo/A_tool"].tolist(), x.advantages.tolist(), strict=True))
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
def test_token_means_divide_by_the_tokens_with_a_signal(tmp_path, monkeypatch, loss_type):
    seen = spied(monkeypatch)
    trainer = tool_trainer(tmp_path, {"hdpo": {"w_tool": 0.5}}, script, loss_type=loss_type, max_steps=1)
    trainer.train()
    (x,), log = seen, trainer.state.log_history[0]
    tool = x.streams["hdpo/A_tool"]
    signal = x.mask * (tool != 0).unsqueeze(1)
    expected = -(tool.unsqueeze(1) * signal).sum() / signal.sum()
    assert log["hdpo/loss_tool"] == pytest.approx(float(expected), rel=1e-4)
    acc = -(x.advantages.unsqueeze(1) * x.mask).sum() / x.mask.sum()
    assert log["hdpo/loss_acc"] == pytest.approx(float(acc), abs=1e-6)
    assert log["loss"] == pytest.approx(float(acc + 0.5 * expected), abs=1e-5)
    grad = -(x.advantages.unsqueeze(1) * x.mask / x.mask.sum() + 0.5 * tool.unsqueeze(1) * signal / signal.sum())
    torch.testing.assert_close(x.logps.grad, grad, rtol=1e-4, atol=1e-8)


def test_metrics(tmp_path):
    trainer = tool_trainer(tmp_path, {"hdpo": {}}, script, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    expected = {"accuracy": 0.75, "calls": 1.5, "calls_correct": 5 / 3, "nonzero": 0.75, "qualifying": 0.75}
    expected |= {"clip_acc": 0.0, "clip_tool": 0.0}
    assert {name: log[f"hdpo/{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("count", "calls"), [("turns", 1.5), ("calls", 3.0)])
def test_parallel_calls_are_one_turn(tmp_path, count, calls):
    trainer = tool_trainer(tmp_path, {"hdpo": {"count": count}}, script, per_turn=2, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["hdpo/calls"] == calls


def test_a_group_without_a_tool_signal_is_trl(tmp_path):
    """One right rollout, or equal calls: A_tool is 0, and so is its loss."""

    def same(step):
        return [(2, True), (2, True), (0, False), (1, False)] if step else [(2, True)] + [(0, False)] * 3

    ours = tool_trainer(tmp_path, {"hdpo": {}}, same)
    ours.train()
    stock = tool_trainer(tmp_path, None, same, trl.GRPOTrainer)
    stock.train()
    assert_equal(weights(ours), weights(stock))
    assert ours.state.log_history[0]["hdpo/nonzero"] == 0


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_no_weight_is_trl(tmp_path, loss_type):
    settings = {"loss_type": loss_type, "beta": 0.1, "num_iterations": 2}
    ours = train(tmp_path, {"hdpo": {"w_tool": 0}}, **settings)
    stock = trl.GRPOTrainer(
        tiny_path(), letters_reward, trl.GRPOConfig(**grpo_args(str(tmp_path), **settings)), prompts()
    )
    stock.train()
    assert_equal(weights(ours), weights(stock))


def test_forms_agree_while_nothing_is_clipped(tmp_path):
    runs = []
    for loss in ("two", "one"):
        settings = {"num_iterations": 2, "learning_rate": 1e-6, "optim": "sgd"}
        runs.append(tool_trainer(tmp_path, {"hdpo": {"loss": loss}}, script, **settings))
        runs[-1].train()
    for name, value in weights(runs[0]).items():
        torch.testing.assert_close(weights(runs[1])[name], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_accumulation_does_not_matter(tmp_path, loss_type):
    runs = {}
    for size in (4, 1):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "optim": "sgd"}
        settings |= {"learning_rate": 0.1, "num_iterations": 2, "loss_type": loss_type}
        runs[size] = tool_trainer(tmp_path, {"hdpo": {"w_tool": 1.0}}, script, **settings)
        runs[size].train()
    for name, value in weights(runs[4]).items():
        torch.testing.assert_close(weights(runs[1])[name], value, rtol=1e-3, atol=1e-5)


def test_resume_inside_a_window_equals_not_stopping(tmp_path):
    settings = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    whole = tool_trainer(tmp_path, {"hdpo": {}}, script, **settings)
    whole.train()
    resumed = tool_trainer(tmp_path, {"hdpo": {}}, script, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_equal(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    ("settings", "kwargs", "words"),
    [
        ({}, {"epsilon_high": 0.28}, "clip_low: 0.2 and clip_high: 0.28"),
        ({}, {"epsilon": 0.1}, "clip_low: 0.1 and clip_high: 0.1"),
        ({}, {"loss_type": "sapo"}, "set loss: one, or loss_type: dapo"),
        ({}, {"delta": 3.0}, "delta 3.0 is not part of the two losses"),
        ({}, {"importance_sampling_level": "sequence"}, "or set loss: one"),
    ],
)
def test_clashes_name_the_flag(tmp_path, settings, kwargs, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **kwargs), methods={"hdpo": settings})
    trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **kwargs), methods={"hdpo": {"loss": "one"}})


def test_several_rewards_need_a_name(tmp_path):
    with pytest.raises(PlanError, match=r"several rewards \(right, spoke\); name .* answer"):
        tool_trainer(tmp_path, {"hdpo": {}}, script, rewards=[right, spoke])


def test_weights_of_other_methods_act_on_both_losses(tmp_path, monkeypatch):
    """high_entropy drops tokens: neither channel has a gradient on them."""
    seen = spied(monkeypatch)
    tool_trainer(tmp_path, {"hdpo": {"w_tool": 1.0}, "high_entropy": {}}, script, max_steps=1).train()
    (x,) = seen
    kept = (x.logps.grad != 0).sum() / x.mask.sum()
    assert 0.1 < float(kept) < 0.3, "a fifth of the tokens"


def test_recipe_has_the_papers_numbers():
    recipe = load_recipe("hdpo_qwen3_8b", ["--use_cpu", "true"])
    (hdpo,), args = recipe.plan.methods, recipe.training_args
    assert (hdpo.w_acc, hdpo.w_tool, hdpo.eps, hdpo.answer) == (1.0, 0.15, 1e-6, "math_correct")
    assert (args.num_generations, args.beta, args.epsilon) == (16, 0.0, 0.2)
    assert args.loss_type in ops.TOKEN_MEAN
