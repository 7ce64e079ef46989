"""dcpo: the card's worked example, the entropy controller, and the mixed advantage inside real training. Card: dcpo."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import trl_ext
from tests.methods import training
from tests.parity.test_grpo import assert_same
from tests.tiny import assert_equal, grpo_args, letters_reward, weights
from trl_ext import memory
from trl_ext.method import ENTROPY_AT_ROLLOUT, HIDDEN, POLICY, Method
from trl_ext.methods import METHODS
from trl_ext.methods.grpo.dcpo import Dcpo, log_rho, mixed_advantages, mixing_weight
from trl_ext.plan import PlanError
from trl_ext.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"

LOG_P = torch.tensor([2.0, 1.0, 0.0, -1.0]).log_softmax(-1)


def rho_of(temperature, log_p=LOG_P):
    """For every token of the vocabulary."""
    n = log_p.numel()
    return log_rho(log_p.expand(n, n), torch.arange(n), temperature).exp()


# The card's numbers


@pytest.mark.parametrize(
    "temperature, rho",
    [
        (1.2, [0.910553, 1.075691, 1.270779, 1.501248]),
        (0.8, [1.115576, 0.868811, 0.676631, 0.526961]),
        (1.0, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_worked_example_rho(temperature, rho):
    assert LOG_P.tolist() == pytest.approx([-0.440190, -1.440190, -2.440190, -3.440190], abs=1e-6)
    assert rho_of(temperature).tolist() == pytest.approx(rho, abs=1e-6)
    assert rho_of(torch.full((4,), temperature)).tolist() == pytest.approx(rho, abs=1e-6)


def test_worked_example_hot_log_probs():
    found = LOG_P + rho_of(1.2).log()
    assert found.tolist() == pytest.approx([-0.533893, -1.367226, -2.200559, -3.033893], abs=1e-6)


def test_worked_example_advantages():
    """H0 = 0.5, H = 0.42, rewards (1, 0, 0, 1): response 1 with tokens (0, 2), response 2 with tokens (1, 1)."""
    alpha = mixing_weight(0.5 - 0.42, 0.1, 0.5)
    assert alpha == pytest.approx(0.137931, abs=1e-6)
    rho = rho_of(1.2)[torch.tensor([[0, 2], [1, 1]])]
    found = mixed_advantages(
        torch.tensor([0.866024, -0.866024]), torch.tensor([1.0, 0.0]), rho, torch.full((2,), alpha)
    )
    assert found[0].tolist() == pytest.approx([0.872166, 0.921852], abs=1e-6)
    assert found[1].tolist() == pytest.approx([-0.746572, -0.746572], abs=1e-6)


# Limits and invariants


def test_mixing_weight():
    assert mixing_weight(0.0, 0.1, 0.5) == 0 == mixing_weight(0.3, 0.0, 0.5)
    assert mixing_weight(0.3, 0.1, 0.0) == 0, "no positive sample: plain GRPO, not 0/0"
    for error in (0.01, -0.05, 0.1, 2.0, -2.0):
        for share in (0.01, 0.3, 1.0):
            a0 = min(abs(error), 0.1)
            found = mixing_weight(error, 0.1, share)
            assert found == pytest.approx((a0 / share) / (1 + a0 / share), rel=1e-12)
            assert 0 < found <= 0.1 / (0.1 + share)


def test_no_weight_is_grpo_and_temperature_one_is_reinforce():
    advantages, positive = torch.tensor([0.7, -0.7]), torch.tensor([1.0, 0.0])
    rho = torch.rand(2, 3) + 0.5
    assert torch.equal(mixed_advantages(advantages, positive, rho, torch.zeros(2)), advantages[:, None].expand(2, 3))
    found = mixed_advantages(advantages, positive, torch.ones(2, 3), torch.full((2,), 0.2))
    torch.testing.assert_close(found, torch.tensor([[0.76] * 3, [-0.56] * 3]))
    per_token = advantages[:, None].expand(2, 3)
    torch.testing.assert_close(mixed_advantages(per_token, positive, torch.ones(2, 3), torch.full((2,), 0.2)), found)


@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.2, 2.0])
def test_rho_averages_to_one_and_turns_at_one(temperature):
    log_p = (2 * torch.randn(9)).log_softmax(-1)
    rho = rho_of(temperature, log_p)
    assert float((log_p.exp() * rho).sum()) == pytest.approx(1.0, abs=1e-6)
    likely, rare = rho[log_p.argmax()], rho[log_p.argmin()]
    assert (likely < 1 < rare) if temperature > 1 else (rare < 1 < likely)


@pytest.mark.parametrize("temperature, sign", [(1.2, 1), (0.8, -1)])
def test_direction_on_a_bandit(temperature, sign):
    """Equal rewards, A = 0: the expected gradient of the term alone raises entropy for T > 1, lowers it for T < 1."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0], requires_grad=True)
    log_p = logits.log_softmax(-1)
    gain = mixed_advantages(torch.zeros(4), torch.ones(4), rho_of(temperature)[:, None], torch.full((4,), 0.1))
    (LOG_P.exp() * gain[:, 0] * log_p).sum().backward()  # E over pi_old, ratio 1
    after = (logits + 0.1 * logits.grad).log_softmax(-1)
    change = -(after.exp() * after).sum() + (LOG_P.exp() * LOG_P).sum()
    assert math.copysign(1, change.item()) == sign and abs(change.item()) > 1e-5


# In the trainer


def score(completions, **kwargs):
    """Letters among the first characters: positive for about half of the completions of a random model."""
    return [max(0.0, 2 * value - 0.4) for value in letters_reward(completions)]


make = functools.partial(training.make, rewards=score)
train = functools.partial(training.train, rewards=score)


@pytest.fixture
def recorded(monkeypatch):
    """(loss input, advantages that went out, log rho, its own forward's) of every micro-batch."""
    seen = []
    original = Dcpo.token_advantages

    def record(self, advantages, x):
        out = original(self, advantages, x)
        log_p = x.other(POLICY).log_probs_at(torch.ones_like(x.mask).bool())
        hot = x.streams["hot"].repeat_interleave(x.mask.size(1)).bool()
        temperature = torch.where(hot, self.temperature_high, self.temperature_low)
        own = log_rho(log_p, x.completion_ids.flatten(), temperature).view(x.mask.shape)
        seen.append((x, out, self._log_rho(x), own))
        return out

    monkeypatch.setattr(Dcpo, "token_advantages", record)
    return seen


@pytest.mark.parametrize("lora", [False, True])
def test_advantages_in_training(tmp_path, recorded, lora):
    """A~ on every token from the slow formula; negative samples get (1 - alpha) A."""
    train(tmp_path, "dcpo", lora=lora)
    for x, out, _, own in recorded:
        s = x.streams
        share = float(s["positive"].mean())  # one micro-batch is the whole generation batch
        alpha = 0.1 / (share + 0.1)  # |H0 - H| is above the cap: the tiny model has 4 nats
        expected = (1 - alpha) * x.advantages[:, None] + alpha * s["positive"][:, None] * own.exp()
        valid = x.mask.bool()
        torch.testing.assert_close(out[valid], expected[valid], rtol=1e-4, atol=1e-5)
        assert 0 < share < 1 and not out.requires_grad
    assert [bool(x.streams["hot"][0]) for x, *_ in recorded] == [True, False, False]  # 0 nats assumed, then about 4


@pytest.mark.parametrize("lora", [False, True])
def test_rho_is_that_of_the_sampling_weights(tmp_path, recorded, lora):
    """Two updates per rollout: the second uses the first one's rho although the policy has moved; beta > 0 adds a
    reference forward that must not be taken for the policy's."""
    train(tmp_path, "dcpo", lora=lora, num_iterations=2, max_steps=4, beta=0.1)
    for first, second in (recorded[:2], recorded[2:]):
        x, _, stored, own = first
        valid = x.mask.bool()
        assert bool((valid == second[0].mask.bool()).all())
        torch.testing.assert_close(stored[valid], own[valid], rtol=1e-4, atol=1e-5)
        assert torch.equal(second[2], stored) and not torch.allclose(second[3][valid], stored[valid], atol=1e-4)


def test_no_forward_is_added(tmp_path, monkeypatch):
    """On policy or with several updates per rollout: as many forwards of the backbone as without the method."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

    calls = []
    forward = Qwen3Model.forward
    monkeypatch.setattr(Qwen3Model, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))
    for kwargs in ({}, {"num_iterations": 2}):
        counts = []
        for methods in (None, "dcpo"):
            calls.clear()
            train(tmp_path, methods, max_steps=2, rewards=_always_one, **kwargs)
            counts.append(len(calls))
        assert counts[0] == counts[1]


def _always_one(completions, **kwargs):
    return [1.0] * len(completions)


def test_advantages_carry_no_gradient(tmp_path, monkeypatch, recorded):
    """Training with the recorded advantages given as constants is the same training, bit for bit."""
    ours = weights(train(tmp_path, "dcpo"))
    replay = iter([out for _, out, *_ in recorded])

    @dataclass(frozen=True)
    class Constant(Method):
        name = "constant"
        title = paper = "none"

        def token_advantages(self, advantages, x):
            return next(replay)

    monkeypatch.setitem(METHODS, "constant", Constant)
    assert_equal(weights(train(tmp_path, "constant")), ours)


@pytest.mark.parametrize("kwargs", [{}, {"num_iterations": 2, "beta": 0.1}])
@pytest.mark.parametrize("lora", [False, True])
def test_neutral_setting_is_trl(tmp_path, lora, kwargs):
    assert_same(tmp_path, lora, {"dcpo": {"cap": 0}}, loss_type="grpo", **kwargs)


def test_nothing_positive_is_trl(tmp_path):
    """p = 0: alpha is 0, the advantages are GRPO's own."""
    assert_same(tmp_path, False, {"dcpo": {"threshold": 9}}, loss_type="grpo")


def test_what_it_needs():
    assert Dcpo().needs() == {HIDDEN} and Dcpo(start="first_batch").needs() == {HIDDEN, ENTROPY_AT_ROLLOUT}
    assert Dcpo(cap=0, start="first_batch").needs() == frozenset()
    assert Dcpo(temperature_high=1, temperature_low=1).needs() == frozenset()


def test_without_the_second_ratio(tmp_path, monkeypatch):
    """Both temperatures 1: A~ = (1 - alpha) A + alpha R, for every token of a completion alike."""
    seen = []
    original = Dcpo.token_advantages
    monkeypatch.setattr(
        Dcpo, "token_advantages", lambda self, a, x: seen.append((x, original(self, a, x))) or seen[-1][1]
    )
    train(tmp_path, {"dcpo": {"temperature_high": 1, "temperature_low": 1}}, num_iterations=2)
    for x, out in seen:
        alpha, positive = x.streams["alpha"], x.streams["positive"]
        expected = (1 - alpha) * x.advantages + alpha * positive
        torch.testing.assert_close(out, expected[:, None].expand_as(out))


def test_rho_cap(tmp_path, recorded):
    train(tmp_path, {"dcpo": {"rho_cap": 1.05}}, max_steps=1)
    ((x, out, stored, _),) = recorded
    positive = (x.streams["positive"] > 0)[:, None] & x.mask.bool()
    alpha = x.streams["alpha"][:, None]
    expected = (1 - alpha) * x.advantages[:, None] + alpha * stored.exp().clamp(max=1.05)
    assert bool((stored.exp()[positive] > 1.05).any())
    torch.testing.assert_close(out[positive], expected[positive])


# The controller's state


@pytest.mark.parametrize("estimate", ["sampled", "exact"])
@pytest.mark.parametrize("size", [8, 2])
def test_estimate_is_the_mean_of_the_previous_step(tmp_path, monkeypatch, estimate, size):
    """Over all tokens of the step's micro-batches, for any split; used at the next step, not before."""
    sums = {}
    original = Dcpo.observe_loss

    def watch(self, x):
        valid = x.mask.bool()
        nats = -x.logps[valid] if estimate == "sampled" else x.entropy[valid]
        sums.setdefault(x.step, []).extend(nats.tolist())
        original(self, x)

    monkeypatch.setattr(Dcpo, "observe_loss", watch)
    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    trainer = train(tmp_path, {"dcpo": {"estimate": estimate}}, **split)
    log = trainer.state.log_history
    assert "dcpo/entropy_estimate" not in log[0]  # nothing measured yet: H = 0 is assumed
    for step in (1, 2):
        mean = sum(sums[step - 1]) / len(sums[step - 1])
        assert log[step]["dcpo/entropy_estimate"] == pytest.approx(mean, rel=1e-5)
    (method,) = trainer.plan.methods
    assert method.state["entropy"] == pytest.approx(log[2]["dcpo/entropy_estimate"], rel=1e-6)


def test_several_rollouts_in_a_step_share_the_estimate(tmp_path):
    """Four rollouts of 2 rows per step: the estimate of step 0 serves all of step 1."""
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 1}
    trainer = train(tmp_path, "dcpo", num_generations=2, max_steps=2, **split)
    (method,) = trainer.plan.methods
    entry = trainer.state.log_history[1]
    assert entry["dcpo/entropy_estimate"] == pytest.approx(method.state["entropy"], rel=1e-6)
    assert method.state["sums"][1] == 4 * 2 * 6  # step 1's own tokens wait for step 2


def test_controller_targets(tmp_path):
    """Above the estimate: hot; below: cold; the share of the term follows the error up to the cap."""
    for target, temperature in ((9.0, 1.2), (0.1, 0.8)):
        log = train(tmp_path, {"dcpo": {"entropy_target": target}}, max_steps=2).state.log_history
        assert (log[1]["dcpo/temperature"], log[1]["dcpo/target"]) == pytest.approx((temperature, target))
    log = train(
        tmp_path, {"dcpo": {"entropy_target": 0.04}}, max_steps=1
    ).state.log_history  # error 0.04, below the cap
    assert log[0]["dcpo/alpha"] == pytest.approx(0.04 / (0.04 + log[0]["dcpo/positive_share"]), rel=1e-5)


def test_first_batch_start(tmp_path):
    """The first estimate is the first rollout's mean entropy, which is what TRL logs for the step on it."""
    log = train(tmp_path, {"dcpo": {"start": "first_batch"}}).state.log_history
    assert log[0]["dcpo/entropy_estimate"] == pytest.approx(log[0]["entropy"], rel=1e-3)
    assert log[0]["dcpo/temperature"] == pytest.approx(0.8)


@pytest.mark.parametrize("kwargs", [{}, {"num_iterations": 2}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("stop", [1, 3])
def test_resume_is_exact(tmp_path, stop, kwargs):
    """The controller goes on where it was, also inside a generation window."""
    kwargs = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1} | kwargs
    whole = train(tmp_path / "whole", "dcpo", **kwargs)
    checkpoint = str(tmp_path / f"whole/checkpoint-{stop}")
    again = train(tmp_path / "again", "dcpo", resume=checkpoint, **kwargs)
    assert_equal(weights(whole), weights(again))
    first, second = (t.plan.methods[0].state for t in (whole, again))
    assert first["entropy"] == second["entropy"] and torch.equal(first["sums"], second["sums"])


def test_accumulation_does_not_matter(tmp_path):
    one = train(tmp_path, "dcpo")
    eight = train(tmp_path, "dcpo", per_device_train_batch_size=1, gradient_accumulation_steps=8)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(eight)[name], value, rtol=1e-3, atol=2e-5)


# Metrics, settings, recipe


def test_recipe_for_a_real_model():
    """The card's controller, clips and mini-batch, every rollout on policy, on one GPU with 48 GB."""
    recipe = load_recipe(
        str(RECIPES / "dcpo_qwen3_4b.yaml"), [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    )
    args = recipe.training_args
    assert recipe.plan.methods == (Dcpo(),)
    assert (args.epsilon, args.epsilon_high, args.delta, args.beta, args.loss_type) == (0.2, 0.2, 3.0, 0.0, "dapo")
    assert (args.num_generations, args.max_completion_length, args.temperature, args.top_p) == (5, 2048, 1.0, 1.0)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 128 * 5
    assert args.gradient_accumulation_steps % args.steps_per_generation == 0
    assert 24 < memory.predict(recipe).total / memory.GIB < 46


def test_metrics(tmp_path, recorded):
    log = train(tmp_path, "dcpo").state.log_history
    for entry, (x, _, _, own) in zip(log, recorded, strict=False):
        rows = [r.exp()[m.bool()] for r, m, ok in zip(own, x.mask, x.streams["positive"], strict=True) if ok]
        assert entry["dcpo/rho_mean"] == pytest.approx(torch.cat(rows).mean().item(), rel=1e-4)
        assert entry["dcpo/rho_max"] == pytest.approx(sum(float(r.max()) for r in rows) / len(rows), rel=1e-4)
        assert entry["dcpo/positive_share"] == pytest.approx(len(rows) / 8)
        assert entry["dcpo/alpha"] == pytest.approx(0.1 / (0.1 + len(rows) / 8), rel=1e-5)


def test_verifier_gives_the_score(tmp_path):
    kwargs = {"rewards": [letters_reward, _always_one], "max_steps": 1}
    with pytest.raises(PlanError, match="letters_reward, _always_one"):
        make(tmp_path, "dcpo", **kwargs)
    with pytest.raises(PlanError, match="'nobody' is not a reward of this run"):
        make(tmp_path, {"dcpo": {"verifier": "nobody"}}, **kwargs)
    log = train(tmp_path, {"dcpo": {"verifier": "_always_one"}}, **kwargs).state.log_history
    assert log[0]["dcpo/positive_share"] == 1.0


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"entropy_coef": 0.01}, "entropy_coef at 0"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy off"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level: token"),
        ({"loss_type": "vespo"}, "loss_type: dapo"),
        ({"methods": {"dcpo": {"temperature_low": 0}}}, "temperature_low: 0.0 must be > 0"),
        ({"methods": {"dcpo": {"entropy_base": 1}}}, "unknown setting 'entropy_base'"),
    ],
)
def test_clashes_name_the_flag(tmp_path, settings, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **{"methods": "dcpo"} | settings))
