"""oblr_po: the card's worked example, properties of baseline and rho, the variance claim, and both in real training."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import trl
from transformers import Qwen3ForCausalLM

import trl_ext
from tests.methods.groups import logged, made_group
from tests.methods.training import make, train
from tests.parity.test_grpo import assert_same
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext.method import GRADIENT_NOISE, GradientNoise, Metrics
from trl_ext.methods.grpo.oblr_po import (
    OblrPo,
    optimal_baseline,
    signal_and_noise,
    squared_logit_gradient,
    step_share,
)
from trl_ext.plan import PlanError
from trl_ext.recipe import load_recipe

REWARDS = torch.tensor([[1.0, 0, 0, 1]], dtype=torch.float64)
W = torch.tensor([[4.0, 1, 9, 2]], dtype=torch.float64)
GRADIENTS = torch.tensor([[1.0, 0], [0.8, 0.4], [1.2, -0.2], [0.6, 0.2]], dtype=torch.float64)


def statistics(gradients):
    """Mean of the squares, square of the mean, M."""
    return float(gradients.square().sum(1).mean()), float(gradients.mean(0).square().sum()), len(gradients)


def rho_of(gradients, lowest=0.1):
    return step_share(*signal_and_noise(*statistics(gradients)), lowest)


# The card's numbers


def test_worked_baseline():
    found = optimal_baseline(REWARDS, W)
    assert float(found) == pytest.approx(0.375, abs=1e-6)
    assert (REWARDS - found)[0].tolist() == pytest.approx([0.625, -0.375, -0.375, 0.625], abs=1e-6)
    for baseline, second_moment in ((found, 0.9375), (0.5, 1.0), (0.0, 1.5)):
        assert float((W * (REWARDS - baseline) ** 2).mean()) == pytest.approx(second_moment, abs=1e-6)


def test_worked_leave_one_out():
    found = optimal_baseline(REWARDS, W, leave_one_out=True)
    assert found[0].tolist() == pytest.approx([0.166667, 0.4, 0.857143, 0.285714], abs=1e-6)
    assert (REWARDS - found)[0].tolist() == pytest.approx([0.833333, -0.4, -0.857143, 0.714286], abs=1e-6)


def test_worked_proxy():
    """Two tokens of probability 0.9 and 0.5, with sums of squares 0.82 and 0.34."""
    p = torch.tensor([[0.9, 0.1, 0, 0, 0], [0.5, 0.2, 0.2, 0.1, 0]], dtype=torch.float64)
    assert p.square().sum(1).tolist() == pytest.approx([0.82, 0.34])
    found = squared_logit_gradient(p.log(), torch.tensor([0, 0]))
    assert found.tolist() == pytest.approx([0.02, 0.34], abs=1e-6)
    assert float(found.sum()) == pytest.approx(0.36, abs=1e-6)


def test_worked_signal_to_noise():
    assert statistics(GRADIENTS)[:2] == pytest.approx((0.92, 0.82))
    signal, noise = signal_and_noise(*statistics(GRADIENTS))
    assert 4 * noise == pytest.approx(0.133333, abs=1e-6)
    assert (signal, noise, signal / noise) == pytest.approx((0.786667, 0.033333, 23.6), abs=1e-6)
    assert rho_of(GRADIENTS) == pytest.approx(0.959350, abs=1e-6)


# Properties


def test_proxy_is_the_squared_gradient_of_the_logits():
    logits = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(9, (6,))
    logits.log_softmax(-1).gather(1, ids.unsqueeze(1)).sum().backward()
    found = squared_logit_gradient(logits.detach().log_softmax(-1), ids)
    torch.testing.assert_close(found, logits.grad.square().sum(1))
    assert bool((found >= 0).all()) and bool((found < 2).all())


def test_a_certain_policy_weighs_nothing():
    log_p = torch.tensor([[0.0, -200.0, -200.0]])
    assert squared_logit_gradient(log_p, torch.tensor([0])).tolist() == [0]
    assert squared_logit_gradient(log_p, torch.tensor([1])).tolist() == [2], "the limit, of probability 0"


def test_baseline_minimises_the_second_moment():
    torch.manual_seed(0)
    rewards, own = torch.rand(20, 6).double(), torch.rand(20, 6).double() * 5
    best = optimal_baseline(rewards, own)

    def moment(b):
        return (own * (rewards - b) ** 2).sum(1)

    for other in (rewards.mean(1, keepdim=True), torch.zeros(20, 1), best + 0.01, best - 0.01):
        assert bool((moment(best) < moment(other)).all())
    assert (own * (rewards - best)).sum(1).abs().max() < 1e-6
    assert bool((best >= rewards.amin(1, keepdim=True)).all() & (best <= rewards.amax(1, keepdim=True)).all())


def test_equal_weights_give_the_mean():
    rewards = torch.rand(5, 4).double()
    equal = torch.full_like(rewards, 3.0)
    torch.testing.assert_close(optimal_baseline(rewards, equal), rewards.mean(1, keepdim=True))
    others = (rewards.sum(1, keepdim=True) - rewards) / 3
    torch.testing.assert_close(optimal_baseline(rewards, equal, leave_one_out=True), others)


def test_equal_rewards_and_no_weights():
    weights = torch.rand(1, 4).double() + 0.5
    same = torch.full((1, 4), 0.7).double()
    for leave_one_out in (False, True):
        assert (same - optimal_baseline(same, weights, leave_one_out)).abs().max() < 1e-7
        assert bool((optimal_baseline(same, torch.zeros(1, 4), leave_one_out) == 0).all())


def test_own_reward_is_left_out():
    """Changing r_0 does not move its own baseline, and moves those of the others."""
    changed = REWARDS.clone()
    changed[0, 0] = 5
    before, after = (optimal_baseline(r, W, leave_one_out=True) for r in (REWARDS, changed))
    assert float(before[0, 0]) == pytest.approx(float(after[0, 0]))
    assert bool((before[0, 1:] != after[0, 1:]).all())


def test_limits_of_rho():
    assert rho_of(torch.ones(4, 3).double()) == 1
    assert rho_of(torch.tensor([[1.0, 0], [-1, 0]])) == 0.1
    assert rho_of(torch.tensor([[1.0, 0], [-1, 0]]), lowest=0.3) == 0.3
    assert rho_of(torch.zeros(3, 2)) == 0.1
    assert rho_of(GRADIENTS * 1e-12) == pytest.approx(rho_of(GRADIENTS)) == pytest.approx(rho_of(GRADIENTS * 1e12))


def test_signal_and_noise_are_unbiased():
    """True gradient (1, 0), unit noise in 2 dimensions, M = 4: signal 1 and noise 2 / 4, before the max."""
    draw = torch.randn(4000, 4, 2, generator=torch.Generator().manual_seed(0)).double() + torch.tensor([1.0, 0])
    mean_square, square_of_mean = draw.square().sum(-1).mean(1), draw.mean(1).square().sum(-1)
    noise = (mean_square - square_of_mean) / 3
    assert float(noise.mean()) == pytest.approx(0.5, abs=0.02)
    assert float((square_of_mean - noise).mean()) == pytest.approx(1.0, abs=0.05)
    assert signal_and_noise(float(mean_square[0]), float(square_of_mean[0]), 4)[1] == pytest.approx(float(noise[0]))


# The card's claim: less variance at a fixed policy


@pytest.fixture(scope="module")
def scores():
    """256 responses of 6 tokens to one prompt by a model that is sure of some tokens: exact scores, proxy, surprise."""
    model = Qwen3ForCausalLM.from_pretrained(tiny_path()).float().eval()
    model.lm_head.weight.data *= 6
    draw, ids, prompt = torch.Generator().manual_seed(1), torch.tensor([[5, 60, 70, 80]]).repeat(256, 1), 4
    with torch.no_grad():
        for _ in range(6):
            p = model(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=draw)], 1)
        log_p = model(ids).logits[:, prompt - 1 : -1].log_softmax(-1)
    taken = ids[:, prompt:]
    proxy = squared_logit_gradient(log_p.flatten(0, 1), taken.flatten()).view(256, 6).sum(1)
    found = []
    for row in ids.split(1):
        logps = model(row).logits[:, prompt - 1 : -1].log_softmax(-1).gather(2, row[:, prompt:].unsqueeze(2))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(logps.sum(), list(model.parameters()))]))
    return torch.stack(found), proxy, log_p.gather(2, taken.unsqueeze(2)).sum((1, 2))


def variance(advantages, found):
    """Trace of the covariance of a group's gradient, mean_i A_i s_i, over the groups."""
    size = advantages.size(1)
    return float((advantages.unsqueeze(2) * found.view(-1, size, found.size(1))).mean(1).var(0).sum())


def test_variance_is_below_that_of_the_mean(scores):
    """Measured here: none 2601, mean 675, proxy 387, exact 327; leave-one-out 881 and 576."""
    found, proxy, logps = scores
    rewards = (logps < logps.median()).float().view(-1, 8)
    exact, proxy = found.square().sum(1).view(-1, 8), proxy.view(-1, 8)
    none, mean = variance(rewards, found), variance(rewards - rewards.mean(1, keepdim=True), found)
    by_proxy, by_exact = (variance(rewards - optimal_baseline(rewards, w), found) for w in (proxy, exact))
    assert by_exact < by_proxy < 0.75 * mean < 0.25 * none
    alone = [variance(rewards - optimal_baseline(rewards, w, True), found) for w in (torch.ones_like(proxy), proxy)]
    assert alone[1] < 0.75 * alone[0]


def test_proxy_follows_the_exact_norm(scores):
    """Rank correlation with the squared norm of the whole gradient; measured 0.87."""
    found, proxy, _ = scores
    ranks = torch.stack([v.argsort().argsort().float() for v in (found.square().sum(1), proxy)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.7


# The method without a trainer


def test_advantages_of_a_group():
    group = made_group([[1.0, 0, 0, 1]], measured={"W": W.float()})
    found = OblrPo().group_advantages(group.advantages, group)
    assert found[0].tolist() == pytest.approx([0.625, -0.375, -0.375, 0.625], abs=1e-6)
    spread = math.sqrt(38 / 3)  # W - 4 = 0, -3, 5, -2
    assert logged(group.metrics) == pytest.approx({"baseline_shift": 0.125, "W_mean": 4, "W_std": spread}, abs=1e-6)
    found = OblrPo(leave_one_out=True).group_advantages(group.advantages, group)
    assert found[0].tolist() == pytest.approx([0.833333, -0.4, -0.857143, 0.714286], abs=1e-6)


def test_a_response_without_rewards_is_left_out():
    """As if it were not there: 1 and 0 with weights 4 and 1."""
    nan = math.nan
    group = made_group([[1.0, 0, nan]], measured={"W": W[:, :3].float()})
    found = OblrPo().group_advantages(group.advantages, group)
    assert found[0].tolist() == pytest.approx([0.2, -0.8, 0], abs=1e-6)


def noise_of(gradients, step=0):
    return GradientNoise(*statistics(gradients), step, Metrics())


def test_rho_is_that_of_smoothed_signal_and_noise():
    """Two steps with d = 0.9: signals 0.786667, 1 and noises 0.033333, 0; each (0.9 * first + second) / 1.9."""
    method = OblrPo()
    assert method.learning_rate(2.0, 0) == 2.0
    first = noise_of(GRADIENTS)
    method.observe_gradients(first)
    assert method.learning_rate(2.0, 0) == pytest.approx(2 * 0.959350, abs=1e-5)
    found = {k: float(v[0] / v[1]) for k, v in first.metrics.totals.items()}
    assert found == pytest.approx({"signal": 0.786667, "noise": 0.033333, "snr": 23.6, "rho": 0.959350}, abs=1e-5)
    method.observe_gradients(noise_of(torch.tensor([[1.0, 0], [1, 0]]).double(), step=1))
    signal, noise = (0.9 * 0.786667 + 1) / 1.9, 0.9 * 0.033333 / 1.9
    assert method.learning_rate(1.0, 1) == pytest.approx(signal / (signal + noise), abs=1e-5)


def test_overflow_leaves_rho():
    method = OblrPo()
    method.observe_gradients(noise_of(GRADIENTS))
    before = dict(method.state)
    method.observe_gradients(GradientNoise(math.inf, math.inf, 4, 1, Metrics()))
    assert method.state == before


# In the trainer

NONE = {"scale_rewards": "none"}
FOUR = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "optim": "sgd", "learning_rate": 0.1}


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_both_off_is_trl(tmp_path, loss_type):
    args = grpo_args(str(tmp_path), loss_type=loss_type, beta=0.1)
    off = {"oblr_po": {"baseline": False, "adapt_lr": False}}
    ours = trl_ext.GRPOTrainer(tiny_path(), letters_reward, trl_ext.GRPOConfig(**args, methods=off), prompts())
    stock = trl.GRPOTrainer(tiny_path(), letters_reward, trl.GRPOConfig(**args), prompts())
    for trainer in (ours, stock):
        trainer.train()
    assert_same(ours, stock)


def measured(trainer_folder, monkeypatch, **kwargs):
    """W (P, G) of each rollout of a run, and the batches that were scored."""
    seen, batches = [], []
    original, generate = OblrPo.group_advantages, trl_ext.GRPOTrainer._generate_and_score_completions
    monkeypatch.setattr(
        OblrPo, "group_advantages", lambda self, a, g: seen.append(g.measured["W"]) or original(self, a, g)
    )
    monkeypatch.setattr(
        trl_ext.GRPOTrainer,
        "_generate_and_score_completions",
        lambda self, inputs: batches.append(generate(self, inputs)) or batches[-1],
    )
    return train(trainer_folder, kwargs.pop("methods"), **NONE | kwargs), seen, batches


@pytest.mark.parametrize("passes", [1, 2])
def test_weights_are_those_of_the_full_distributions(tmp_path, monkeypatch, passes):
    """By an own forward, and in TRL's when a rollout serves two passes: compared with logits of the first weights."""
    model = Qwen3ForCausalLM.from_pretrained(tiny_path()).eval()
    _, seen, batches = measured(
        tmp_path, monkeypatch, methods={"oblr_po": {}}, max_steps=1, num_iterations=passes, temperature=0.7
    )
    batch = batches[0]
    assert ("old_per_token_logps" in batch) == (passes == 2) == ("oblr_po/terms" in batch)
    ids, mask = (torch.cat([batch[f"prompt_{k}"], batch[f"completion_{k}"]], 1) for k in ("ids", "mask"))
    length = batch["completion_ids"].size(1)
    with torch.no_grad():
        p = (model(ids, attention_mask=mask).logits[:, -length - 1 : -1] / 0.7).softmax(-1)
    onehot = torch.nn.functional.one_hot(batch["completion_ids"], p.size(-1))
    expected = ((onehot - p).square().sum(-1) * batch["completion_mask"]).sum(1)
    torch.testing.assert_close(seen[0].flatten(), expected, rtol=1e-4, atol=1e-5)


def test_length_counts_loss_tokens(tmp_path, monkeypatch):
    """No forward at all; truncated responses that TRL masks weigh nothing."""
    monkeypatch.setattr(trl_ext.GRPOTrainer, "_other", lambda *a, **k: pytest.fail("a forward"))
    methods = {"oblr_po": {"weight": "length"}}
    _, seen, batches = measured(tmp_path, monkeypatch, methods=methods, max_steps=1)
    assert torch.equal(seen[0].flatten(), batches[0]["completion_mask"].sum(1).float())
    _, seen, _ = measured(tmp_path, monkeypatch, methods=methods, max_steps=1, mask_truncated_completions=True)
    assert bool((seen[0] == 0).all()), "six tokens end no response of the random model"


def test_equal_lengths_are_trls_baseline(tmp_path):
    """All completions have 6 tokens: equal weights, so training is TRL's without scaling."""
    sgd = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1}
    ours = train(tmp_path, {"oblr_po": {"weight": "length"}}, **sgd, **NONE)
    plain = train(tmp_path, None, **sgd, **NONE)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(ours)[name], value, rtol=1e-4, atol=2e-6)
    assert ours.state.log_history[0]["oblr_po/W_mean"] == 6
    assert ours.state.log_history[0]["oblr_po/baseline_shift"] == pytest.approx(0, abs=1e-6)


def test_learning_rate_of_one_step(tmp_path):
    """SGD without clipping: the first update is rho times the scheduled one, the scheduler goes on as it was."""
    start = weights(make(tmp_path, None))
    runs = {
        on: train(tmp_path, {"oblr_po": {"adapt_lr": on}}, max_steps=1, max_grad_norm=0.0, **FOUR, **NONE)
        for on in (False, True)
    }
    entry = runs[True].state.log_history[0]
    rho = entry["oblr_po/rho"]
    assert 0.1 <= rho < 1
    assert entry["oblr_po/snr"] == pytest.approx(entry["oblr_po/signal"] / entry["oblr_po/noise"], rel=1e-4)
    assert entry["learning_rate"] == runs[False].state.log_history[0]["learning_rate"]
    assert entry["learning_rate_used"] == pytest.approx(rho * entry["learning_rate"], rel=1e-6)
    assert "learning_rate_used" not in runs[False].state.log_history[0]
    for name, value in weights(runs[False]).items():
        torch.testing.assert_close(
            weights(runs[True])[name] - start[name], rho * (value - start[name]), rtol=1e-3, atol=1e-6
        )


def test_rho_is_that_of_the_micro_batches_gradients(tmp_path, monkeypatch):
    """Each micro-batch's loss is differentiated a second time by hand."""
    found = []
    original = trl_ext.GRPOTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        params = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, retain_graph=True)]))
        return loss

    monkeypatch.setattr(trl_ext.GRPOTrainer, "compute_loss", compute_loss)
    trainer = train(tmp_path, {"oblr_po": {}}, max_steps=1, **FOUR, **NONE)
    assert len(found) == 4
    assert trainer.state.log_history[0]["oblr_po/rho"] == pytest.approx(rho_of(torch.stack(found).double()), rel=1e-3)


def test_one_micro_batch_leaves_the_rate(tmp_path):
    with pytest.warns(UserWarning, match="set gradient_accumulation_steps: 2 or more"):
        trainer = train(tmp_path, {"oblr_po": {}}, **NONE)
    plain = train(tmp_path, {"oblr_po": {"adapt_lr": False}}, **NONE)
    assert_equal(weights(trainer), weights(plain))
    assert "oblr_po/rho" not in trainer.state.log_history[0]


def test_every_metric_is_in_the_log(tmp_path):
    log = train(tmp_path, {"oblr_po": {}}, **FOUR, **NONE).state.log_history[:3]
    for name in ("baseline_shift", "W_mean", "W_std", "signal", "noise", "snr", "rho"):
        assert all(math.isfinite(entry[f"oblr_po/{name}"]) for entry in log), name
    assert all(0.1 <= entry["oblr_po/rho"] <= 1 for entry in log)


def test_baseline_does_not_depend_on_micro_batches(tmp_path):
    runs = {}
    for size in (8, 2):
        trainer = train(
            tmp_path,
            {"oblr_po": {"adapt_lr": False}},
            **FOUR | {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size},
            **NONE,
        )
        runs[size] = weights(trainer)
    for name, value in runs[8].items():
        torch.testing.assert_close(runs[2][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stop", [2, 3])
def test_resume_equals_not_stopping(tmp_path, stop):
    """The averages survive, at the end of a generation window and inside one."""
    settings = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 5, **FOUR, **NONE}
    whole = train(tmp_path, {"oblr_po": {}}, **settings)
    resumed = train(tmp_path, {"oblr_po": {}}, resume=str(tmp_path / f"checkpoint-{stop}"), **settings)
    assert_equal(weights(whole), weights(resumed))
    assert whole.plan.methods[0].state == resumed.plan.methods[0].state
    assert whole.plan.methods[0].state["steps"] == 5


def test_needs():
    assert OblrPo().needs() == {GRADIENT_NOISE}
    assert OblrPo(adapt_lr=False).needs() == frozenset()


@pytest.mark.parametrize(
    "settings, kwargs, words",
    [
        ({}, {"scale_rewards": "group"}, "set scale_rewards: none"),
        ({}, NONE | {"multi_objective_aggregation": "normalize_then_sum"}, "sum_then_normalize"),
        ({"weight": "exact"}, NONE, "not one of logit_proxy, length"),
        ({"rho_min": 0}, NONE, "must be > 0"),
        ({"adapt_lr": False, "rho_min": 0.2}, NONE, "rho_min has no effect without adapt_lr"),
        ({"baseline": False, "leave_one_out": True}, {}, "leave_one_out has no effect without baseline"),
    ],
)
def test_clashes_name_the_flag(tmp_path, settings, kwargs, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **kwargs), methods={"oblr_po": settings})


def test_scaled_rewards_go_with_the_learning_rate_alone(tmp_path):
    config = trl_ext.GRPOConfig(
        **grpo_args(str(tmp_path), scale_rewards="group"), methods={"oblr_po": {"baseline": False}}
    )
    assert config.scale_rewards == "group"


def test_recipe():
    recipe = load_recipe("oblr_po_qwen3_4b", ["--use_cpu", "true"])
    (oblr_po,), args = recipe.plan.methods, recipe.training_args
    assert oblr_po == dataclasses.replace(OblrPo())
    assert (args.loss_type, args.scale_rewards, args.gradient_accumulation_steps) == ("dr_grpo", "none", 32)


def test_leave_one_out_keeps_a_small_weight_beside_a_large_one():
    """In float32, where a difference of sums gave 1525.9 and 0 for these."""
    found = optimal_baseline(torch.tensor([[0.5, 1.0]]), torch.tensor([[256.0, 8e-6]]), leave_one_out=True)
    torch.testing.assert_close(found, torch.tensor([[8e-6 / (8e-6 + 1e-8), 0.5]]), atol=1e-5, rtol=1e-5)
