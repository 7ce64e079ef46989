"""mdpo: the card's tabular example and PMD numbers, gradients, limits against stock TRL, exact KL, splits, restart."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import trl

import trl_ext
from tests.methods.spy import spied
from tests.methods.training import make, train
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext.method import HIDDEN, TEACHER, RunShape
from trl_ext.methods.grpo.mdpo import (
    Mdpo,
    exact_kl,
    kl_estimate,
    mirror_loss,
    pmd_advantages,
    pmd_loss,
    step_size,
)
from trl_ext.plan import PlanError
from trl_ext.recipe import load_recipe

OLD = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
NEW = torch.tensor([0.6, 0.22, 0.18], dtype=torch.float64)
A = torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64)
RHO, T = NEW / OLD, 0.5
pytestmark = pytest.mark.filterwarnings("ignore:mdpo. one optimizer step per rollout")


def near(found, expected):
    assert torch.as_tensor(found).tolist() == pytest.approx(expected, abs=1e-6)


# The maths: one state with three actions


def objective(pi):
    return float((pi * A).sum() - exact_kl(pi.log().unsqueeze(0), OLD.log().unsqueeze(0)) / T)


def test_closed_form_is_the_optimum():
    best = OLD * torch.exp(T * A)
    best = best / best.sum()
    near(best, [0.655294, 0.185723, 0.158982])
    assert objective(OLD) == pytest.approx(0.35, abs=1e-6)
    assert objective(best) == pytest.approx(0.459048, abs=1e-6)
    assert objective(NEW) == pytest.approx(0.445612, abs=1e-6)


def test_kl_and_its_estimators():
    assert float(exact_kl(NEW.log()[None], OLD.log()[None])) == pytest.approx(0.022194, abs=1e-6)
    near(RHO, [1.2, 0.733333, 0.9])
    sampled, simple = kl_estimate(RHO.log()), kl_estimate(RHO.log(), "simple")
    near(sampled, [0.018786, 0.039220, 0.005176])
    near(simple, [0.218786, -0.227447, -0.094824])
    for estimate in (sampled, simple):
        assert float((OLD * estimate).sum()) == pytest.approx(0.022194, abs=1e-6)
    near(RHO - 1 - RHO.log(), [0.017678, 0.043488, 0.005361])  # the other direction, which this is not
    assert float((OLD * (RHO - 1 - RHO.log())).sum()) == pytest.approx(0.022958, abs=1e-6)


def test_sampled_estimator_is_rho_times_k3_and_zero_only_at_one():
    d = torch.linspace(-3, 3, 101, dtype=torch.float64)
    rho, kl = d.exp(), kl_estimate(d)
    torch.testing.assert_close(kl, rho * (1 / rho - 1 + d), rtol=1e-10, atol=1e-12)
    assert bool((kl >= 0).all()) and (kl == 0).nonzero().tolist() == [[50]]


def test_loss_with_exact_kl():
    kl = exact_kl(NEW.log()[None], OLD.log()[None]).expand(3)
    near(mirror_loss(RHO.log(), A, kl, T), [-1.155612, 0.411055, 0.044388])


@pytest.mark.parametrize(
    ("rho", "advantage", "loss", "coefficient"),
    [(1.2, 1.0, -1.162428, -0.762428), (0.73333333333, -0.5, 0.445106, -0.088227), (1.0, 1.0, -1.0, -1.0)],
)
def test_loss_and_gradient_with_the_sampled_kl(rho, advantage, loss, coefficient):
    """Gradient: -rho (A - d / t)."""
    d = torch.tensor(math.log(rho), dtype=torch.float64, requires_grad=True)
    found = mirror_loss(d, torch.tensor(advantage), kl_estimate(d), T)
    found.backward()
    assert (float(found.detach()), float(d.grad)) == pytest.approx((loss, coefficient), abs=1e-6)
    assert float(d.grad) == pytest.approx(-rho * (advantage - math.log(rho) / T), abs=1e-9)


def test_equilibrium_is_at_t_times_the_advantage():
    d = (T * A).clone().requires_grad_()
    mirror_loss(d, A, kl_estimate(d), T).sum().backward()
    near(d.grad, [0, 0, 0])


@pytest.mark.parametrize("t", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("estimator", ["sampled", "simple"])
def test_first_step_is_the_policy_gradient(t, estimator):
    """The simple form has a constant slope 1/t there, which is 0 in expectation only: tested as such."""
    d = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    mirror_loss(d, A, kl_estimate(d, estimator), t).sum().backward()
    near(d.grad, (-A + (1 / t if estimator == "simple" else 0)).tolist())


def test_exact_kl_has_no_gradient_at_the_old_policy():
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(-1)
    kl = exact_kl(log_p, log_p.detach())
    near(kl.detach(), [0.0] * 4)
    kl.sum().backward()
    assert float(logits.grad.abs().max()) < 1e-12


def test_schedule():
    """The card's 1, 0.9, ..., 0.1 for ten rollouts; never below t_min."""
    assert [step_size(k, 10, 1.0, "linear") for k in range(10)] == pytest.approx([1 - k / 10 for k in range(10)])
    assert [step_size(k, 4, 2.0, "linear", 0.75) for k in range(4)] == [2.0, 1.5, 1.0, 0.75]
    assert {step_size(k, 10, 3.0) for k in range(10)} == {3.0}


R = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
S = torch.tensor([0.5, -0.2, 0.1, 0.3], dtype=torch.float64)
LENGTHS = torch.tensor([10, 12, 8, 10])


def test_pmd():
    own = pmd_advantages(R, 0.1)[0]
    near(own, [0.666667, -0.666667, 0.666667, -0.666667])
    losses = pmd_loss(S, own, LENGTHS, 0.1)
    near(losses, [0.190139, 0.174241, 0.269507, 0.242672])
    assert float(losses.mean()) == pytest.approx(0.219140, abs=1e-6)


def test_pmd_unnormalised():
    own = pmd_advantages(R, 0.1, "unnormalised")[0]
    losses = pmd_loss(S, own, LENGTHS, 0.1, "unnormalised")
    near(losses, [0.2025, 0.2304, 0.2401, 0.2809])
    assert float(losses.mean()) == pytest.approx(0.238475, abs=1e-6)


@pytest.mark.parametrize("tau", [0.01, 0.1, 100.0])
def test_partition_baseline_by_hand(tau):
    """Leave one out, in a loop; at a large tau it is the mean, at a small one the largest of the others."""
    found = pmd_advantages(R, tau, "partition")[0]
    slow = []
    for i in range(4):
        others = [float(R[0, j]) for j in range(4) if j != i]
        top = max(others)
        mean = sum(math.exp((r - top) / tau) for r in others) / 3
        slow.append(float(R[0, i]) - top - tau * math.log(mean))
    near(found, slow)
    if tau == 100:
        torch.testing.assert_close(found, pmd_advantages(R, tau)[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("pmd", ["mean", "partition", "unnormalised"])
def test_completions_without_a_reward_are_left_out(pmd):
    """A of the others is that of the group without them; one that is alone has no baseline."""
    holes = torch.tensor([[1.0, math.nan, 0.0, 1.0], [math.nan, math.nan, 2.0, math.nan]], dtype=torch.float64)
    found = pmd_advantages(holes, 0.1, pmd)
    near(
        found[0, [0, 2, 3]], pmd_advantages(torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64), 0.1, pmd)[0].tolist()
    )
    assert found[0, 1] == 0 and found[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("pmd", "factor"), [("mean", 1.0), ("partition", 1.0), ("unnormalised", 2 * 0.1 * 10)])
def test_pmd_gradient_at_zero_is_the_policy_gradient(pmd, factor):
    """-A / len, and -2 tau A of the unnormalised form."""
    own = pmd_advantages(R, 0.1, pmd)[0]
    s = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    pmd_loss(s, own, torch.full((4,), 10), 0.1, pmd).sum().backward()
    near(s.grad, (-factor * own / 10).tolist())


# In the trainer


def stock(folder, **kwargs):
    args = trl.GRPOConfig(**grpo_args(str(folder), **{"loss_type": "grpo"} | kwargs))
    trainer = trl.GRPOTrainer(tiny_path(), letters_reward, args, prompts())
    trainer.train()
    return trainer


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo", "luspo"])
def test_without_kl_it_is_trl_without_clip(tmp_path, loss_type):
    """t = inf, two passes over each rollout, beta beside it: to the last rounding."""
    settings = {"loss_type": loss_type, "num_iterations": 2, "max_steps": 4, "optim": "sgd", "learning_rate": 0.1}
    ours = weights(train(tmp_path, {"mdpo": {"t": "inf"}}, beta=0.1, **settings))
    theirs = weights(stock(tmp_path, epsilon=1e6, beta=0.1, **settings))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


def test_without_kl_one_step_per_rollout_is_trl_bit_for_bit(tmp_path):
    assert_equal(weights(train(tmp_path, {"mdpo": {"t": "inf"}})), weights(stock(tmp_path)))


@pytest.mark.parametrize("settings", [{"t": 0.05}, {"t": 3.0, "kl": "exact"}, {"t": 0.1, "schedule": "linear"}])
def test_one_step_per_rollout_is_the_policy_gradient(tmp_path, settings):
    """Whatever t is, TRL's clip being without effect there too. SGD: Adam would magnify a last bit."""
    sgd = {"optim": "sgd", "learning_rate": 0.1}
    ours, theirs = weights(train(tmp_path, {"mdpo": settings}, **sgd)), weights(stock(tmp_path, **sgd))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


FOUR = {"num_iterations": 4, "max_steps": 8}


def test_gradient_in_the_trainer(tmp_path, monkeypatch):
    """Of each token's log-prob at later steps on a rollout: -rho (A - d / t) / (B |o|)."""
    seen = spied(monkeypatch)
    train(tmp_path, {"mdpo": {"t": 0.3}}, **FOUR)
    for x in seen:
        d = (x.logps - x.old_logps).detach()
        weight = x.mask / x.mask.sum(1, keepdim=True) / x.mask.size(0)
        expected = -d.exp() * (x.advantages[:, None] - d / 0.3) * weight
        torch.testing.assert_close(x.logps.grad, expected, rtol=1e-4, atol=1e-6)
    assert float(d.abs().max()) > 0.1


def test_metrics_by_hand(tmp_path, monkeypatch):
    seen = spied(monkeypatch)
    log = train(tmp_path, {"mdpo": {"t": 0.3, "schedule": "linear"}}, **FOUR).state.log_history
    for step, x in enumerate(seen):
        d, mask = (x.logps - x.old_logps).detach(), x.mask.float()
        kl = ((d.exp() * d - d.exp() + 1) * mask).sum() / mask.sum()
        t = 0.3 * (1 - step // 4 / 2)
        spent = ((d.abs() > t * x.advantages.abs()[:, None]) * mask).sum() / mask.sum()
        assert log[step]["mdpo/t"] == pytest.approx(t)
        assert log[step]["mdpo/kl"] == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
        assert log[step]["mdpo/ratio_max"] == pytest.approx(float((d.exp() * mask).amax(1).mean()), rel=1e-5)
        assert log[step]["mdpo/spent"] == pytest.approx(float(spent), abs=1e-6)
        assert ("mdpo/kl_old" in log[step]) == (step % 4 == 3)
    assert log[7]["mdpo/kl_old"] == log[7]["mdpo/kl"] > 0
    assert all("mdpo/t" not in e for e in train(tmp_path, {"mdpo": {"t": "inf"}}).state.log_history)


def test_a_small_t_keeps_the_policy_near(tmp_path):
    found = {}
    for t in (0.1, 1.0, "inf"):
        settings = {"optim": "sgd", "learning_rate": 0.02, "num_iterations": 8, "max_steps": 8}
        found[t] = train(tmp_path, {"mdpo": {"t": t}}, **settings).state.log_history[7]["mdpo/kl_old"]
    assert 0 < found[0.1] < found[1.0] < found["inf"]


@pytest.mark.parametrize("lora", [False, True])
def test_old_weights_run_from_the_second_step_on_a_rollout(tmp_path, monkeypatch, lora):
    trainer = make(tmp_path, {"mdpo": {"t": 0.5, "kl": "exact"}}, lora=lora, **FOUR)
    at, original = [], type(trainer)._other

    def other(self, inputs, which, *args, **kwargs):
        at.append((self.state.global_step, which))
        return original(self, inputs, which, *args, **kwargs)

    monkeypatch.setattr(type(trainer), "_other", other)
    trainer.train()
    assert at == [(step, TEACHER) for step in (1, 2, 3, 5, 6, 7)]
    kl = [entry["mdpo/kl"] for entry in trainer.state.log_history[:8]]
    assert [kl[0], kl[4]] == [0, 0] and min(kl[1:4] + kl[5:]) > 0


def test_exact_kl_value_and_gradient_in_the_trainer(tmp_path, monkeypatch):
    """The head is not trained here, so the old distribution is head(old hidden states), which the first step showed."""
    seen = spied(monkeypatch)
    log = train(tmp_path, {"mdpo": {"t": 0.5, "kl": "exact"}}, lora=True, learning_rate=0.1, **FOUR).state.log_history
    for first in (0, 4):
        rows = seen[first].completion_ids
        for step in range(first + 1, first + 4):
            x = seen[step]
            order = [int((rows == row).all(1).nonzero()[0]) for row in x.completion_ids]
            here = x.mask.bool()
            old = x.policy.head.log_probs(seen[first].policy.hidden.detach()[order][here])
            hidden = x.policy.hidden.detach()[here].requires_grad_()
            kl = exact_kl(x.policy.head.log_probs(hidden), old)
            assert log[step]["mdpo/kl"] == pytest.approx(float(kl.mean().detach()), rel=1e-3, abs=1e-6)
            weight = (x.mask / x.mask.sum(1, keepdim=True) / x.mask.size(0))[here]
            (kl / 0.5 * weight).sum().backward()
            torch.testing.assert_close(x.policy.hidden.grad[here], hidden.grad, rtol=1e-3, atol=1e-6)
            ratio = torch.exp(x.logps - x.old_logps).detach()[here]
            gain = x.advantages[:, None].expand(x.mask.shape)[here]
            torch.testing.assert_close(x.logps.grad[here], -ratio * gain * weight, rtol=1e-4, atol=1e-6)


def test_first_step_has_no_teacher_forward_and_copies_follow_rollouts():
    method, run = Mdpo(kl="exact"), RunShape(12, 4, 4.0)
    assert [method.sync_teacher(step, run) for step in range(9)] == [True, *[False] * 3, True, *[False] * 3, True]
    assert method.needs() == {HIDDEN, TEACHER} and "copy" in method.cost()
    for other in (Mdpo(), Mdpo(kl="exact", t=math.inf), Mdpo(form="sequence")):
        assert other.needs() == frozenset() and "sync_teacher" in other.idle


@pytest.mark.parametrize("pmd", ["mean", "partition", "unnormalised"])
def test_sequence_form_in_the_trainer(tmp_path, monkeypatch, pmd):
    """Loss and gradient from the raw rewards, which letters_reward gives again here."""
    seen, tau = spied(monkeypatch), 0.2
    trainer = make(tmp_path, {"mdpo": {"form": "sequence", "pmd": pmd, "tau": tau}}, scale_rewards="none", **FOUR)
    groups = []
    original = type(trainer)._group
    monkeypatch.setattr(
        type(trainer), "_group", lambda self, *a, **k: groups.append(original(self, *a, **k)) or groups[-1]
    )
    trainer.train()
    for step, x in enumerate(seen):
        group = groups[step // 4]
        s = ((x.logps - x.old_logps) * x.mask).sum(1).detach()
        own = pmd_advantages(group.total, tau, pmd).flatten()
        assert sorted(x.advantages.tolist()) == pytest.approx(sorted(own.tolist()), abs=1e-5)
        length = x.mask.sum(1)
        if pmd == "unnormalised":
            slope = -2 * tau * (x.advantages - tau * s)
        else:
            slope = -(x.advantages - tau * s) / length
        torch.testing.assert_close(x.logps.grad, slope[:, None] / 8 * x.mask, rtol=1e-4, atol=1e-6)
        entry = trainer.state.log_history[step]
        assert entry["mdpo/log_ratio"] == pytest.approx(float(s.abs().mean()), rel=1e-3, abs=1e-6)
        assert entry["mdpo/residual"] == pytest.approx(float((x.advantages / tau - s).abs().mean()), rel=1e-4)
    assert bool(seen[3].logps.grad.abs().sum() > 0)


CASES = {
    "sampled": {"t": 0.3},
    "exact": {"t": 0.3, "kl": "exact", "schedule": "linear"},
    "sequence": {"form": "sequence", "tau": 0.2},
}


@pytest.mark.parametrize(
    ("case", "loss_type"), [*((case, "grpo") for case in CASES), ("sampled", "dapo"), ("exact", "dapo")]
)
def test_accumulation_does_not_matter(tmp_path, case, loss_type):
    runs = {}
    for size in (8, 2):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        sgd = {"optim": "sgd", "learning_rate": 0.1, "num_iterations": 3, "max_steps": 6, "scale_rewards": "none"}
        runs[size] = weights(train(tmp_path, {"mdpo": CASES[case]}, loss_type=loss_type, **split, **sgd))
    for name, value in runs[8].items():
        torch.testing.assert_close(runs[2][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_resume_inside_a_window_equals_not_stopping(tmp_path, case):
    settings = {"num_iterations": 3, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    settings["scale_rewards"] = "none"
    whole = train(tmp_path, {"mdpo": CASES[case]}, **settings)
    resumed = train(tmp_path, {"mdpo": CASES[case]}, resume=str(tmp_path / "checkpoint-4"), **settings)
    assert_equal(weights(whole), weights(resumed))


# What is refused


@pytest.mark.parametrize(
    ("settings", "kwargs", "words"),
    [
        ({}, {"epsilon": 0.3}, "leave it at 0.2"),
        ({}, {"epsilon_high": 0.28}, "epsilon_high"),
        ({}, {"delta": 4.0}, "delta"),
        ({}, {"importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({}, {"loss_type": "cispo"}, "set loss_type: dapo"),
        ({"tau": 0.1}, {}, "tau has no effect without form: sequence"),
        ({"form": "sequence", "t": 0.5}, {"scale_rewards": "none"}, "t has no effect without form: token"),
        ({"form": "sequence"}, {}, "set scale_rewards: none"),
        ({"form": "sequence"}, {"scale_rewards": "none", "loss_type": "dapo"}, "set loss_type: grpo"),
        ({"schedule": "linear", "t": 0.001}, {}, "t_min 0.01 is above t"),
        (
            {"kl": "exact"},
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
            "multiple of gradient_accumulation_steps",
        ),
    ],
)
def test_refused_with_the_flag_that_helps(tmp_path, settings, kwargs, words):
    args = grpo_args(str(tmp_path), **{"loss_type": "grpo", "num_iterations": 2} | kwargs)
    if "steps_per_generation" in kwargs:
        args["num_iterations"] = 1
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**args, methods={"mdpo": settings})


TRACE = {"annotator": "tests.tiny.annotate_first"}


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ({"mdpo": {"kl": "exact"}, "trace": TRACE}, "mdpo and trace both replace the teacher"),
        ({"mdpo": {"form": "sequence"}, "high_entropy": {}}, "high_entropy weighs single tokens"),
        ({"mdpo": {"form": "sequence"}, "oblr_po": {}}, "mdpo and oblr_po both replace the baseline"),
        ({"capo": {"preset": "rein_capo"}, "mdpo": {"form": "sequence"}}, "name mdpo before capo"),
        ({"safe": {"critic": True}, "mdpo": {"form": "sequence"}}, "safe and mdpo both replace the baseline"),
    ],
)
def test_slots_that_some_settings_take(tmp_path, methods, words):
    args = grpo_args(str(tmp_path), loss_type="grpo", num_iterations=2, scale_rewards="none")
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**args, methods=methods)


def test_one_step_per_rollout_is_said(tmp_path):
    with pytest.warns(UserWarning, match="unclipped policy gradient"):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path)), methods="mdpo")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="mdpo")
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), num_iterations=2), methods="mdpo")


def test_recipe():
    """The card's start for language models: m = 4 passes over the full batch, t constant; no clip."""
    recipe = load_recipe("mdpo_qwen2.5_3b", ["--use_cpu", "true"])
    (mdpo,), args = recipe.plan.methods, recipe.training_args
    assert (mdpo.form, mdpo.t, mdpo.schedule, mdpo.kl) == ("token", 1.0, "constant", "sampled")
    assert (args.num_iterations, args.steps_per_generation) == (4, args.gradient_accumulation_steps)
