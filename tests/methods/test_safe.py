"""safe: the card's sequence through the hooks, gradients, when the controller moves, critic, splits, restart, recipes."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import pytest
import torch
import trl

import trl_ext
from tests.methods.groups import logged, made_group
from tests.methods.spy import spied
from tests.methods.training import make, train
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext import controllers, critic, ops
from trl_ext.method import HIDDEN, REF_LOGPS, Group, Metrics, RunShape
from trl_ext.methods.grpo.safe import ASYMMETRIC, ENTROPY_AWARE, Safe
from trl_ext.methods.grpo.safe import CRITIC as CRITIC_ONLY
from trl_ext.plan import PlanError, make_plan
from trl_ext.recipe import load_recipe

REWARDS, KLS, ENTROPY = (0.5, 0.6, 0.4), (2.0, 3.0, 4.0), 1.5
CARD = {
    "kl_short": (0.2, 0.48, 0.832),
    "kl_long": (0.02, 0.0498, 0.089302),
    "pid": (0, 0.001440, -0.002410),
    "tau": (0.45, 0.452160, 0.446385),
    "g": (1.25, 1.25, 1.25),
    "penalty": (0, 0.000097, 0.018587),
    "c": (0, 0.006960, 0.096404),
    "active": (0, 1, 1),
    "phase": (0, 0, 0),
}
RUN = RunShape(100, 2, 1.0)
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


@dataclasses.dataclass
class FakeInput:
    """What the loss hooks read, on one process: kl is `kl` at every token, 9 tokens' worth elsewhere is padding."""

    step: int = 0
    kl: float = 0.0
    entropy: Any = ENTROPY
    mask: torch.Tensor = dataclasses.field(default_factory=lambda: MASK)
    first_pass: bool = True
    row_scale: float = 1.0
    metrics: Metrics = dataclasses.field(default_factory=Metrics)
    scratch: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.entropy = torch.full(self.mask.shape, float(self.entropy)).masked_fill(self.mask == 0, 50.0)
        self.ref_logps = torch.full(self.mask.shape, -5.0)
        self.logps = (self.ref_logps + self.kl).masked_fill(self.mask == 0, 3.0).requires_grad_()
        self.streams = {"share": torch.full((2,), 2 / 5)}

    def gather(self, values):
        return values, slice(None)


def group(step: int, reward: float, **measured: float) -> Group:
    """Four rollouts around a mean reward; one more was scored by no function."""
    own = {k: torch.tensor([[v, 0.0, 0.0]]) for k, v in measured.items()}
    return made_group([[reward - 0.1, reward + 0.1, math.nan]], ["r"], step=step, run=RUN, measured=own)


def step(method: Safe, at: int, reward: float, kl: float, entropy: float = ENTROPY) -> tuple[Any, dict[str, float]]:
    """One rollout and its one micro-batch -> the added loss, what was logged."""
    rollout = group(at, reward, kl=4 * kl, entropy=4 * entropy, tokens=4.0)
    method.observe(rollout)
    x = FakeInput(at, kl, entropy)
    added = method.aux_loss(x)
    method.observe_loss(x)
    return added, logged(rollout.metrics) | logged(x.metrics)


# The card's numbers


@pytest.mark.parametrize("kl_from, lag", [("previous_step", 1), ("rollout", 0)])
def test_sequence_of_the_card(kl_from, lag):
    method, logs = Safe(kl_from=kl_from), []
    for at, (reward, kl) in enumerate(zip((*REWARDS, 0.0), (*KLS, 0.0), strict=True)):
        logs.append(step(method, at, reward, kl)[1])
        assert logs[-1]["kl"] == pytest.approx(kl)
    assert ("tau" in logs[0]) == (lag == 0), "before anything is measured there is nothing to log"
    for name, expected in CARD.items():
        found = [log[name] for log in logs[lag : lag + 3]]
        assert found == pytest.approx(expected, abs=1e-6), name


@pytest.mark.parametrize("kl_from", ["previous_step", "rollout"])
def test_added_loss_and_its_gradient(kl_from):
    """c times the token mean of k3, the controller's part constant: c (1 - ref / pi) / 5 at each of the 5 tokens."""
    method = Safe(kl_from=kl_from)
    for at in range(3):
        step(method, at, REWARDS[at], KLS[at])
    if kl_from == "previous_step":
        method.observe(group(3, 0.0))
    x = FakeInput(3 if kl_from == "previous_step" else 2, kl=0.7)
    added = method.aux_loss(x)
    assert float(added.detach()) == pytest.approx(0.096404 * (math.exp(-0.7) + 0.7 - 1), abs=1e-6)
    added.backward()
    torch.testing.assert_close(x.logps.grad, 0.096404 / 5 * (1 - math.exp(-0.7)) * MASK, rtol=1e-4, atol=1e-8)


def test_constant_has_the_penaltys_value_and_no_gradient():
    method = Safe(grad="constant", kl_from="rollout")
    for at in range(3):
        added, _ = step(method, at, REWARDS[at], KLS[at])
    assert float(added) == pytest.approx(0.018587, abs=1e-6) and not added.requires_grad


def test_below_the_threshold_nothing_is_added():
    """A negative KL is never penalised, however large."""
    method = Safe(kl_from="rollout")
    for at, kl in enumerate((-9.0, -2.0, 3.0)):
        added, log = step(method, at, 0.5, kl)
        assert log["penalty"] == log["c"] == log["active"] == float(added.detach()) == 0
        x = FakeInput(at, kl)
        method.aux_loss(x).backward()
        assert bool((x.logps.grad == 0).all())


def test_floor_is_half_of_the_first_entropy():
    """None: g = max(0.5, H_0 / 2 / (H + 0.1)), H_0 the first measured one."""
    method = Safe(entropy_floor=None, kl_from="rollout")
    found = [step(method, at, 0.5, 1.0, entropy)[1]["g"] for at, entropy in enumerate((0.8, 0.3, 0.1))]
    assert found == pytest.approx([0.5, 0.4 / 0.4, 0.4 / 0.2], abs=1e-6)


def test_asymmetric():
    """0.1 (kl - 0.3)^2 above 0.3 on the step's own KL, plus 5 m^2 once the window is full."""
    method = Safe(controller="asymmetric", kl_from="rollout", momentum_window=3)
    logs = [step(method, at, 0.5, kl)[1] for at, kl in enumerate((-1.0, 0.2, 0.5, 1.0, 0.1))]
    m = [0, 0, 1.5 / 3, 0.8 / 3, 0]
    base, excess = (0, 0, 0.004, 0.049, 0), (0, 0, 0.2, 0.7, 0)
    assert [log["penalty"] for log in logs] == pytest.approx([b + 5 * v**2 for b, v in zip(base, m, strict=True)])
    slopes = [0.2 * e + 10 * v / 3 for e, v in zip(excess, m, strict=True)]
    assert [log["c"] for log in logs] == pytest.approx(slopes)
    assert "tau" not in logs[0] and "g" not in logs[0]


def test_phases_move_the_threshold():
    method = Safe(kl_from="rollout", phase_window=2, kp=0, ki=0, kd=0)
    logs = [step(method, at, reward, 0.0)[1] for at, reward in enumerate((0.1, 0.1, 0.9, 0.9, 0.9, 0.9, 0.2))]
    names = [controllers.PHASES[int(log["phase"])] for log in logs]
    assert names == ["warmup", "plateau", "plateau", "climbing", "climbing", "converged", "plateau"]
    factors = {"warmup": 1.5, "climbing": 1.2, "plateau": 0.8, "converged": 1.0}
    assert [log["tau"] for log in logs] == pytest.approx([0.3 * factors[name] for name in names])
    (line,) = method.summary(str)
    assert "warmup 1, climbing 2, plateau 3, converged 1" in line and "0.240" in line


# When it moves


def test_micro_batches_and_later_passes():
    """Two micro-batches are one measurement, weighted by tokens; a second pass closes it and measures nothing."""
    method = Safe()
    method.observe(group(0, 0.5))
    other = torch.tensor([[1, 0, 0], [0, 0, 0]])
    for x in (FakeInput(0, 2.0, 1.0), FakeInput(0, 5.0, 3.0, mask=other)):
        assert method.aux_loss(x) is None
        method.observe_loss(x)
    for at in (1, 2):
        x = FakeInput(at, 9.0, first_pass=False)
        method.aux_loss(x)
        method.observe_loss(x)
        log = logged(x.metrics)
        assert log["kl_short"] == pytest.approx(0.1 * (2.0 * 5 + 5.0) / 6) and "kl" not in log
        assert method.state["trackers"]["entropy"] == pytest.approx((1.0 * 5 + 3.0) / 6)
    assert method.state.get("rewards") is None, "the rollout is still the newest"
    method.observe(group(3, 0.7))
    assert method.state["rewards"] == pytest.approx([0.5])


def test_several_rollouts_of_one_optimizer_step_are_one_reward():
    method = Safe()
    for at, reward in ((0, 0.2), (0, 0.6), (1, 0.9), (1, 0.7), (2, 0.0)):
        method.observe(group(at, reward))
    assert method.state["rewards"] == pytest.approx([0.4, 0.8])


def test_rewards_move_it_once_per_rollout(tmp_path):
    """Two passes over each rollout: 4 optimizer steps, 2 rollouts; the KL is measured on the first passes alone."""
    for settings, pushed in (({}, 1), ({"kl_from": "rollout"}, 2)):
        trainer = train(tmp_path, {"safe": settings}, max_steps=4, num_iterations=2)
        (method,), log = trainer.plan.methods, trainer.state.log_history
        assert method.state["rewards"] == pytest.approx([log[0]["reward"], log[2]["reward"]][:pushed], rel=1e-5)
        assert ["safe/kl" in entry for entry in log[:4]] == [True, False] * 2
        assert len(method.state["trackers"]["history"]) == 2


# In the trainer

STRONG = {"penalty_strength": 50.0, "kl_base": 0.0, "tau_low": 0.0, "tau_high": 0.0, "kl_short_ema": 0.0}
"""The penalty is there as soon as the sampled KL is above 0."""


def stock(tmp_path, **kwargs):
    args = trl.GRPOConfig(**grpo_args(str(tmp_path), **{"loss_type": "grpo"} | kwargs))
    trainer = trl.GRPOTrainer(tiny_path(), letters_reward, args, prompts())
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "settings, penalised",
    [
        ({"penalty_strength": 0}, None),
        ({"controller": "asymmetric", "penalty_strength": 0, "momentum_strength": 0}, None),
        (STRONG | {"tau_low": 9.0, "tau_high": 9.0}, False),
        (STRONG | {"grad": "constant"}, True),
    ],
)
@pytest.mark.parametrize("kwargs", [{}, {"loss_type": "dapo", "beta": 0.1}])
def test_neutral_settings_are_trl(tmp_path, settings, penalised, kwargs):
    ours = train(tmp_path, {"safe": settings}, **kwargs)
    assert_equal(weights(ours), weights(stock(tmp_path, **kwargs)))
    penalties = [entry["safe/penalty"] for entry in ours.state.log_history if "safe/penalty" in entry]
    if penalised is None:
        assert not penalties and ("ref_per_token_logps" in ours._buffered_inputs[0]) == ("beta" in kwargs)
    else:
        assert len(penalties) == 2 and (max(penalties) > 0) == penalised


def test_metrics_follow_from_the_log(tmp_path, monkeypatch):
    """Every logged number from what the loss saw and the pure functions, one step later."""
    seen = spied(monkeypatch)
    trainer = train(tmp_path, {"safe": {"entropy_floor": None, "kl_base": 0.01, "tau_low": 0.0}}, max_steps=4)
    log, short, long, pid = trainer.state.log_history[:4], 0.0, 0.0, controllers.Pid()
    gains = controllers.Gains(0.3, 0.01, 0.05, 0.95, 0.001, 1.0)
    for at, x in enumerate(seen):
        mask = x.mask.bool()
        kl = (x.logps.detach() - x.ref_logps)[mask].mean()
        assert log[at]["safe/kl"] == pytest.approx(float(kl), rel=1e-4, abs=1e-6)
        if at == 3:
            break
        after = log[at + 1]
        short, long = 0.9 * short + 0.1 * float(kl), 0.99 * long + 0.01 * float(kl)
        pid, output = controllers.pid_step(pid, log[at]["reward"], gains)
        tau = min(0.6, max(0.0, (0.01 + output) * 1.5))
        g = max(0.5, log[0]["entropy"] / 2 / (log[at]["entropy"] + 0.1))
        penalty, c = 0.1 * g * max(0, short - tau) ** 2, 0.2 * g * max(0, short - tau)
        expected = {"kl_short": short, "kl_long": long, "pid": output, "tau": tau, "g": g, "penalty": penalty, "c": c}
        expected |= {"active": float(penalty > 0), "phase": 0.0}
        for name, value in expected.items():
            assert after[f"safe/{name}"] == pytest.approx(value, rel=1e-3, abs=1e-7), name
    assert {key for key in log[0] if key.startswith("safe/")} == {"safe/kl"}


def test_penalty_in_the_trainer(tmp_path, monkeypatch):
    """The weights move as if c times the token mean of k3 were added: the gradient of the log-probs tells."""
    seen = spied(monkeypatch)
    grads = []
    for settings in (STRONG, STRONG | {"grad": "constant"}):
        seen.clear()
        trainer = train(tmp_path, {"safe": settings | {"penalty_strength": 1.0}}, max_steps=3)
        grads.append(seen[2].logps.grad)
    c, x = trainer.state.log_history[2]["safe/c"], seen[2]
    assert c > 0
    k3_slope = (1 - (x.ref_logps - x.logps.detach()).exp()) * x.mask / x.mask.sum()
    torch.testing.assert_close(grads[0] - grads[1], c * k3_slope, rtol=1e-3, atol=1e-6)


def test_measuring_at_the_rollout_sees_the_same_policy(tmp_path):
    """Without a penalty worth the name both runs are alike, and so is the KL; the controller's lag is the difference."""
    weak = {"penalty_strength": 1e-12}
    logs = [
        train(tmp_path, {"safe": weak | {"kl_from": kl_from}}, max_steps=4).state.log_history
        for kl_from in ("previous_step", "rollout")
    ]
    for at in range(4):
        assert logs[0][at]["safe/kl"] == pytest.approx(logs[1][at]["safe/kl"], rel=1e-3, abs=1e-6)
    for at in range(3):
        for name in ("kl_short", "tau", "g"):
            lagged, exact = logs[0][at + 1][f"safe/{name}"], logs[1][at][f"safe/{name}"]
            assert lagged == pytest.approx(exact, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_reference_is_the_start(tmp_path, lora, beta):
    """At the first step policy and reference are one; `beta` does not change what SAFE measures."""
    log = train(tmp_path, {"safe": {}}, lora=lora, beta=beta).state.log_history
    assert log[0]["safe/kl"] == pytest.approx(0, abs=1e-5)
    assert ("kl" in log[1]) == (beta != 0)


CRITIC = {"critic": True, "critic_lr": 0.05, "critic_gradient": "policy"}


def fitting(settings):
    """Those that the chosen controller and critic read, and what the critic asks of TRL."""
    on = {settings.get("controller", "entropy_aware")} | ({"critic"} if settings.get("critic") else set())
    parts = {"entropy_aware": ENTROPY_AWARE, "asymmetric": ASYMMETRIC, "critic": CRITIC_ONLY}
    off = {name for part, names in parts.items() if part not in on for name in names}
    kwargs = {"scale_rewards": "none"} if "critic" in on else {}
    return {name: value for name, value in settings.items() if name not in off}, kwargs


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("settings", [{}, {"kl_from": "rollout"}, CRITIC])
def test_accumulation_does_not_matter(tmp_path, settings, loss_type):
    runs = {}
    for size in (8, 2):
        trainer = train(
            tmp_path,
            {"safe": fitting(STRONG | settings)[0]},
            **fitting(settings)[1],
            max_steps=4,
            num_iterations=2,
            loss_type=loss_type,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            optim="sgd",
            learning_rate=0.1,
        )
        runs[size] = weights(trainer), trainer.state.log_history[3]
    assert runs[8][1]["safe/c"] == pytest.approx(runs[2][1]["safe/c"], rel=1e-3)
    assert runs[8][1]["safe/c"] > 0
    for name, value in runs[8][0].items():
        torch.testing.assert_close(runs[2][0][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize("settings", [{}, {"kl_from": "rollout"}, CRITIC, {"controller": "asymmetric"}])
def test_resume_equals_not_stopping(tmp_path, settings, at):
    """After 2 of 6 steps, between generation windows of 2, and after 3, inside one."""
    kwargs = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    own, needed = fitting(STRONG | {"tau_high": 0.6, "momentum_window": 2} | settings)
    methods, kwargs = {"safe": own}, kwargs | needed
    whole = train(tmp_path, methods, **kwargs)
    resumed = train(tmp_path, methods, resume=str(tmp_path / f"checkpoint-{at}"), **kwargs)
    assert_equal(weights(whole), weights(resumed))
    logs = [
        [{k: v for k, v in e.items() if "safe/" in k} for e in t.state.log_history[at:6]] for t in (whole, resumed)
    ]
    assert logs[0] == logs[1] and all(logs[0])
    assert max(entry["safe/c"] for entry in logs[0]) > 0
    if "critic" in settings:
        first, second = (t.plan.methods[0].state["critic"]["heads"] for t in (whole, resumed))
        assert_equal(first, second)


# Critic


def slow_advantages(rewards, stats, values):
    """y - V, then standardised over all rows; the running statistics have seen these rewards."""
    _, mean, variance = stats
    raw = [(r - mean) / (math.sqrt(variance) + 1e-8) - v for r, v in zip(rewards, values, strict=True)]
    spread = statistics.stdev(raw)
    return [(v - statistics.fmean(raw)) / (spread + 1e-8) for v in raw]


@pytest.mark.parametrize("iterations", [1, 2])
def test_critic_gives_the_advantages(tmp_path, monkeypatch, iterations):
    """V_old from the new heads on the states before each last token; with two passes TRL's own forward has them."""
    seen = spied(monkeypatch)
    trainer = train(tmp_path, {"safe": {"critic": True}}, max_steps=1, num_iterations=iterations, scale_rewards="none")
    (x,) = seen
    last = x.mask.sum(1) - 1
    states = torch.stack([row[i] for row, i in zip(x.policy.hidden.detach(), last.tolist(), strict=True)])
    value = ops.soft_min(critic.values(critic.new_heads(16, 0), states), 0.3)
    torch.testing.assert_close(x.streams["safe/old_value"], value, rtol=1e-4, atol=1e-5)
    texts = trainer.processing_class.batch_decode(x.completion_ids, skip_special_tokens=True)
    rewards = letters_reward(texts)
    stats = critic.merged(critic.fresh_stats(), torch.tensor(rewards))
    torch.testing.assert_close(trainer.plan.methods[0].state["stats"], stats)
    expected = slow_advantages(rewards, stats.tolist(), value.tolist())
    assert x.advantages.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    log = trainer.state.log_history[0]
    target = critic.standardised(torch.tensor(rewards), stats)
    loss = critic.value_loss(value, value, target, 0.2, 0.5)
    assert log["safe/value_loss"] == pytest.approx(float(loss.mean()), rel=1e-3)
    assert log["safe/value"] == pytest.approx(float(value.mean()), rel=1e-3, abs=1e-5)
    both = critic.values(critic.new_heads(16, 0), states)
    assert log["safe/value_gap"] == pytest.approx(float((both[0] - both[1]).abs().mean()), rel=1e-3)


def test_critic_is_detached_from_the_policy(tmp_path):
    """A thousand times the value loss does not move the policy's first step; with critic_gradient policy it does."""
    moved = {}
    for gradient in ("detached", "policy"):
        first, second = (
            weights(
                train(
                    tmp_path,
                    {"safe": {"critic": True, "critic_gradient": gradient, "value_weight": weight}},
                    max_steps=1,
                    optim="sgd",
                    scale_rewards="none",
                )
            )
            for weight in (0.5, 500.0)
        )
        moved[gradient] = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert moved["detached"] == 0 and moved["policy"] > 1e-4


def test_critic_is_trained_on_what_the_loss_sees(tmp_path, monkeypatch):
    """Its weights after three steps of two micro-batches, from the states and targets of each; the last is still open."""
    seen = spied(monkeypatch)
    settings = {"critic": True, "critic_lr": 0.02, "critic_seed": 7}
    kwargs = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "scale_rewards": "none"}
    trainer = train(tmp_path, {"safe": settings}, **kwargs)
    slow = critic.new_critic(16, 7, 0)
    for i, x in enumerate(seen):
        if i in (2, 4):
            slow = critic.updated(slow, x.step, 0.02, 0.5)
        own = [x.streams[f"safe/{name}"] for name in ("old_value", "target")]
        states = critic.last_states(x.policy.hidden, x.mask)
        slow = critic.with_rows(slow, states, torch.ones(4), *own, weight=0.5, alpha=0.3, clip=0.2, delta=0.5)
    found = trainer.plan.methods[0].state["critic"]
    assert (found["at"], float(found["updates"]), float(found["rows"])) == (2, 2, 8)
    for part in ("heads", "grad", "exp_avg", "exp_avg_sq"):
        for name, value in slow[part].items():
            torch.testing.assert_close(found[part][name], value)
    fresh = critic.new_heads(16, 7)["first.weight"]
    assert float((found["heads"]["first.weight"] - fresh).abs().max()) > 0.01


def test_rows_without_a_reward_do_not_count(tmp_path, monkeypatch):
    """TRL gives them no advantage; the critic neither learns from them nor standardises with them."""
    seen = spied(monkeypatch)

    def reward(completions, **kwargs):
        return [None if i % 4 == 1 else v for i, v in enumerate(letters_reward(completions))]

    trainer = train(tmp_path, {"safe": {"critic": True}}, max_steps=1, rewards=reward, scale_rewards="none")
    (x,) = seen
    unknown = x.streams["safe/target"].isnan()
    assert int(unknown.sum()) == 2 and bool((x.advantages[unknown] == 0).all())
    assert float(x.advantages[~unknown].mean()) == pytest.approx(0, abs=1e-5)
    assert float(trainer.plan.methods[0].state["stats"][0]) == pytest.approx(6, abs=1e-3)
    assert float(trainer.plan.methods[0].state["critic"]["rows"]) == 6


# What it declares


def test_needs_and_slots():
    assert Safe().needs() == {REF_LOGPS} and Safe(penalty_strength=0).needs() == frozenset()
    assert Safe(critic=True).needs() == {REF_LOGPS, HIDDEN}
    assert Safe(controller="asymmetric", penalty_strength=0).needs() == {REF_LOGPS}
    assert Safe().owns == ("kl controller",) and Safe(critic=True).owns == ("kl controller", "baseline")
    assert "nothing" in Safe(penalty_strength=0).cost() and "policy forward" in Safe(kl_from="rollout").cost()


@pytest.mark.parametrize(
    "settings, kwargs, words",
    [
        ({"tau_low": 0.7}, {}, "swap them"),
        ({}, {"use_adaptive_entropy": True}, "use_adaptive_entropy: false"),
        (
            {"kl_from": "rollout"},
            {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
            "raise steps_per_generation",
        ),
        ({"controller": "asymetric"}, {}, "did you mean 'asymmetric'"),
    ],
)
def test_clashes_name_the_flag(tmp_path, settings, kwargs, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **kwargs), methods={"safe": settings})


def test_critic_comes_before_methods_that_change_advantages(tmp_path):
    own: dict = {"paced": {"use": "advantages"}}
    with pytest.raises(PlanError, match="name safe before paced"):
        make(tmp_path, own | {"safe": {"critic": True}}, scale_rewards="none")
    make(tmp_path, {"safe": {"critic": True}} | own, scale_rewards="none")
    make(tmp_path, own | {"safe": {}}, scale_rewards="none")
    make(tmp_path, {"capo": {}, "safe": {"critic": True}}, scale_rewards="none")  # capo's advantages are TRL's


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ({"safe": {"critic": True}, "real": {}}, "real has no use for the critic's advantages"),
        ({"safe": {"critic": True}, "group_dpo": {}}, "group_dpo has no use for the critic's advantages"),
        ({"safe": {"critic": True}}, "scale_rewards group has no effect"),
        ({"safe": {"critic_lr": 0.1}}, "critic_lr has no effect without critic: true"),
        ({"safe": {"momentum_strength": 1.0}}, "momentum_strength has no effect without controller: asymmetric"),
        ({"safe": {"controller": "asymmetric", "kp": 1.0}}, "kp has no effect without controller: entropy_aware"),
    ],
)
def test_settings_that_nothing_would_read(tmp_path, methods, words):
    with pytest.raises(PlanError, match=words):
        make(tmp_path, methods)


def test_a_rollout_that_nobody_scored_moves_nothing():
    method = Safe()
    for at, reward in enumerate((0.8, 0.8, math.nan, 0.8)):
        method.observe(group(at, reward))
    assert method.state["rewards"] == pytest.approx([0.8, 0.8])  # the last one is still pending, the third is left out


def test_two_kl_controllers_are_refused():
    with pytest.raises(PlanError, match="both replace the kl controller"):
        make_plan({"safe": {}, "fg_expo": {}})


def test_recipe_has_the_papers_numbers():
    recipe = load_recipe("safe_qwen2.5_3b", ["--use_cpu", "true"])
    (safe,), args = recipe.plan.methods, recipe.training_args
    assert safe == Safe(critic=True), "all at the defaults, which are the card's"
    assert (args.beta, args.epsilon, args.entropy_coef, args.max_steps) == (0.0, 0.2, 0.01, 2 * 2000)
    assert (args.learning_rate, args.num_iterations, args.max_completion_length) == (1e-5, 2, 128)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16
    assert (recipe.model_args.lora_r, recipe.model_args.lora_alpha) == (128, 128)
