"""paced: the card's worked example, the three uses, live and static pass rates, splits, restart, and TRACE's KL."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import trl

import trl_ext
from tests.methods.spy import spied
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext.method import Draw, Metrics
from trl_ext.methods.grpo.paced import Paced, effective_size, kernel, log_weights, normalise, pass_rate
from trl_ext.plan import PlanError, make_plan

P = torch.tensor([0, 0.125, 0.5, 0.875, 1], dtype=torch.float64)
LOSSES = torch.tensor([0.9, 0.8, 0.5, 0.2, 0.05], dtype=torch.float64)

# The maths


@pytest.mark.parametrize(
    "a, b, expected",
    [
        (1, 1, [0, 0.109375, 0.25, 0.109375, 0]),
        (0.5, 0.5, [0, 0.330719, 0.5, 0.330719, 0]),
        (2, 1, [0, 0.013672, 0.125, 0.095703, 0]),
        (0, 0, [1, 1, 1, 1, 1]),
        (1, 0, [0, 0.125, 0.5, 0.875, 1]),
    ],
)
def test_worked_weights(a, b, expected):
    assert kernel(P, a, b).tolist() == pytest.approx(expected, abs=1e-6)


def test_worked_losses():
    w = kernel(P)
    assert normalise(w).tolist() == pytest.approx([0, 1.166667, 2.666667, 1.166667, 0], abs=1e-6)
    assert normalise(w, "max").tolist() == pytest.approx([0, 0.4375, 1, 0.4375, 0], abs=1e-6)
    means = [(normalise(w, how) * LOSSES).mean().item() for how in ("batch", "none")]
    assert means == pytest.approx([0.5, 0.046875], abs=1e-6)
    assert (normalise(kernel(P, 0, 0)) * LOSSES).mean().item() == pytest.approx(0.49, abs=1e-6)


def test_shape_of_the_kernel():
    """Zero at the ends, symmetric for a = b, never negative, largest at a / (a + b), without gradient."""
    grid = torch.linspace(0, 1, 3001, dtype=torch.float64)
    for a, b in ((1, 1), (2, 1), (0.5, 1.5)):
        w = kernel(grid, a, b)
        assert w[0] == w[-1] == 0 and w.min() >= 0
        assert grid[w.argmax()].item() == pytest.approx(a / (a + b), abs=1e-3)
    torch.testing.assert_close(kernel(grid, 0.7, 0.7), kernel(1 - grid, 0.7, 0.7))
    assert not kernel(grid.clone().requires_grad_()).requires_grad


def test_batch_normalisation_conserves_mass_and_ignores_scale():
    w = kernel(torch.rand(7))
    assert normalise(w).mean().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(normalise(w), normalise(17 * w))
    for how in ("batch", "max", "none"):
        assert normalise(torch.zeros(4), how).tolist() == [0, 0, 0, 0]
    known = normalise(torch.tensor([1.0, torch.nan, 3.0]))
    assert known[[0, 2]].tolist() == [0.5, 1.5] and known[1].isnan()


def test_pass_rate():
    """(s + c) / (K + 2c) over verdicts; no verdict, no rate."""
    nan = math.nan
    solved = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, nan, nan, 0], [nan, nan, nan, nan]])
    assert pass_rate(solved)[:3].tolist() == [0.5, 0, 0.5] and pass_rate(solved)[3].isnan()
    smooth = pass_rate(solved, 0.5)
    assert smooth[:3].tolist() == pytest.approx([2.5 / 5, 0.5 / 5, 1.5 / 3]) and smooth[3].isnan()


def test_a_wrong_estimate_costs_second_order():
    """Efficiency (sum w g)^2 / sum w^2 v of weights w against the best ones, g / v: halving delta quarters the loss."""
    p = torch.linspace(0.1, 0.9, 33, dtype=torch.float64)
    best = kernel(p)
    noise = torch.sin(40 * p)

    def lost(delta):
        w = kernel(p + delta * noise)
        return 1 - ((w * best).sum() ** 2 / (w.square().sum() * best.square().sum())).item()

    assert lost(0.02) / lost(0.01) == pytest.approx(4, rel=0.02) and lost(0.01) > 0


def test_metrics_by_hand():
    """p = 0, 0.5, 0.5, 1: bins, weights 0, 1/4, 1/4, 0, effective size (1/2)^2 / (2/16) = 2."""
    metrics, p = Metrics(), torch.tensor([0.0, 0.5, 0.5, 1.0])
    log_weights(metrics, p, kernel(p))
    found = {name: float(t[0] / t[1]) for name, t in metrics.totals.items()}
    expected = {"p_0.0": 0.25, "p_0.2": 0, "p_0.4": 0.5, "p_0.6": 0, "p_0.8": 0.25}
    expected |= {"p_mean": 0.5, "w_mean": 0.125, "zero_weight": 0.5, "effective_prompts": 2}
    assert found == pytest.approx(expected)
    assert effective_size(torch.zeros(3)) == 0 and effective_size(torch.ones(3)).item() == pytest.approx(3)


# In the trainer

TRACE = {"action": "both", "annotator": "tests.tiny.annotate_first", "clip": None, "coverage": 0.5}


def verdicts(completions, **kwargs):
    """Rows 0 to 3 (the first prompt): one of four solved; the second prompt: half. With a little from the text."""
    right = [1, 0, 0, 0, 1, 1, 0, 0] * (len(completions) // 8)
    return [r + 0.01 * (len(set(str(c))) % 7) for r, c in zip(right, completions, strict=True)]


def one_sided(completions, **kwargs):
    """Always solved, never solved: both weights are 0."""
    return [float(i % 8 < 4) for i in range(len(completions))]


def make(folder, methods, rewards=verdicts, data=None, cls=trl_ext.GRPOTrainer, config=trl_ext.GRPOConfig, **kwargs):
    extra = {"methods": methods} if config is trl_ext.GRPOConfig else {}
    args = config(**grpo_args(str(folder), **{"loss_type": "grpo"} | kwargs), **extra)
    return cls(tiny_path(), rewards, args, prompts() if data is None else data)


def train(folder, methods, resume=None, **kwargs):
    trainer = make(folder, methods, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def log_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("lora", [{}, {"beta": 0.1}])
def test_neutral_advantages_are_trl(tmp_path, lora):
    ours = train(tmp_path, {"paced": {"use": "advantages", "a": 0, "b": 0}}, **lora)
    stock = train(tmp_path, None, cls=trl.GRPOTrainer, config=trl.GRPOConfig, **lora)
    assert_equal(weights(ours), weights(stock))


def test_neutral_distillation_is_trace(tmp_path):
    both = train(tmp_path, {"trace": TRACE, "paced": {"a": 0, "b": 0}})
    alone = train(tmp_path, {"trace": TRACE})
    assert_equal(weights(both), weights(alone))


def kl_gradients(tmp_path, monkeypatch, methods, **kwargs):
    """Gradient of the KL on the hidden states: all advantages are 0 (rewards of TRL weigh nothing)."""
    with monkeypatch.context() as patch:
        seen = spied(patch)
        trainer = make(tmp_path, methods, max_steps=1, reward_weights=[0.0], **kwargs)
        trainer.train()
    return seen[0], trainer


def test_the_weight_multiplies_the_rows_kl(tmp_path, monkeypatch):
    """p = 1/4 and 1/2: w = 3/16 and 1/4, over their mean 7/32: 6/7 and 8/7."""
    plain, _ = kl_gradients(tmp_path, monkeypatch, {"trace": TRACE})
    paced, trainer = kl_gradients(tmp_path, monkeypatch, {"trace": TRACE, "paced": {}})
    assert torch.equal(plain.completion_ids, paced.completion_ids)
    weight = paced.streams["paced/weight"]
    assert sorted(weight.tolist()) == pytest.approx([6 / 7] * 4 + [8 / 7] * 4, abs=1e-6)
    expected = plain.policy.hidden.grad * weight.view(-1, 1, 1)
    assert plain.policy.hidden.grad.abs().sum() > 0
    torch.testing.assert_close(paced.policy.hidden.grad, expected, rtol=1e-5, atol=1e-9)
    (entry,) = log_of(trainer)
    assert (entry["paced/p_mean"], entry["paced/w_mean"]) == pytest.approx((0.375, 7 / 32))
    assert entry["paced/effective_prompts"] == pytest.approx((7 / 16) ** 2 / (9 / 256 + 16 / 256))


def test_rows_of_weight_0_need_no_teacher(tmp_path, monkeypatch):
    asked = []
    original = trl_ext.GRPOTrainer._other
    monkeypatch.setattr(
        trl_ext.GRPOTrainer, "_other", lambda self, *args, **kw: asked.append(args[2]) or original(self, *args, **kw)
    )

    def first_prompt_half(completions, **kwargs):
        return [float(i % 8 in (0, 1)) for i in range(len(completions))]

    kl_gradients(tmp_path, monkeypatch, {"trace": TRACE, "paced": {}}, rewards=first_prompt_half)
    assert [len(rows) for rows in asked] == [4]


def test_all_weights_0_is_no_loss(tmp_path, monkeypatch):
    """Distillation and advantages: gradient 0, no NaN."""
    x, trainer = kl_gradients(tmp_path, monkeypatch, {"trace": TRACE, "paced": {}}, rewards=one_sided)
    assert x.distill_weights is None or not x.streams["paced/weight"].any()
    assert log_of(trainer)[0]["loss"] == 0 and log_of(trainer)[0]["grad_norm"] == 0
    entry = log_of(train(tmp_path, {"paced": {"use": "advantages"}}, rewards=one_sided, max_steps=1))[0]
    assert entry["grad_norm"] == 0 and entry["paced/zero_weight"] == 1 and entry["paced/effective_prompts"] == 0


@pytest.mark.parametrize("how, scale", [("batch", 7 / 32), ("max", 1 / 4), ("none", 1)])
def test_advantages(tmp_path, monkeypatch, how, scale):
    seen = spied(monkeypatch)
    train(tmp_path, None, max_steps=1)
    assert not seen  # plain TRL makes no loss input
    stock = train(tmp_path, {"paced": {"use": "advantages", "a": 0, "b": 0}, "epo": {}}, max_steps=1)
    ours = train(tmp_path, {"paced": {"use": "advantages", "normalize": how}, "epo": {}}, max_steps=1)
    before, after = (x.advantages.flatten() for x in seen)
    assert stock.state.global_step == ours.state.global_step == 1
    found = sorted((after / before).tolist())
    assert found == pytest.approx(sorted([3 / 16 / scale] * 4 + [1 / 4 / scale] * 4), rel=1e-4)


def test_static_pass_rates_come_from_the_column(tmp_path):
    """Whatever the rewards say: all rows 0.2, so w = 0.16."""
    data = prompts().add_column("rate", [0.2] * 16)
    for methods in ({"paced": {"use": "advantages", "column": "rate"}}, {"trace": TRACE, "paced": {"column": "rate"}}):
        (entry,) = log_of(train(tmp_path, methods, data=data, max_steps=1))
        assert (entry["paced/p_mean"], entry["paced/w_mean"]) == pytest.approx((0.2, 0.16))
    with pytest.raises(ValueError, match="column 'rate' must hold a pass rate"):
        train(tmp_path, {"paced": {"use": "advantages", "column": "rate"}}, max_steps=1)


def test_verifier_threshold_and_missing_verdicts(tmp_path):
    """Rewards 1, 0.5, 0.2, None: 2 of 3 right; the value itself: 1.7 / 3; a prompt without verdicts keeps weight 1."""

    def graded(completions, **kwargs):
        return [*[1.0, 0.5, 0.2, None], *[None] * 4] * (len(completions) // 8)

    def entry(**settings):
        methods = {"paced": {"use": "advantages", "verifier": "graded"} | settings}
        return log_of(train(tmp_path, methods, rewards=[letters_reward, graded], max_steps=1))[0]

    assert entry()["paced/p_mean"] == pytest.approx(2 / 3)
    assert entry(threshold=None)["paced/p_mean"] == pytest.approx(1.7 / 3)
    assert entry(smoothing=1)["paced/p_mean"] == pytest.approx(3 / 5)
    assert Paced()._weights(torch.tensor([0.5, torch.nan]), Metrics()).tolist() == [1, 1]
    assert Paced(normalize="none")._weights(torch.tensor([0.5, torch.nan]), Metrics()).tolist() == [0.25, 1]


@pytest.mark.parametrize("methods", [{"trace": TRACE, "paced": {}}, {"paced": {"use": "advantages"}}])
def test_accumulation_does_not_matter(tmp_path, methods):
    runs = []
    for size in (8, 2):
        extra = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        runs.append(weights(train(tmp_path, methods, optim="sgd", learning_rate=0.1, max_steps=2, **extra)))
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-3, atol=1e-5)


# As a sampler


def draw_of(count, size, rates=None, step=0):
    rows = [{"rate": r} for r in rates or [0.0] * size]
    return Draw(count=count, size=size, seed=3, step=step, metrics=Metrics(), row=rows.__getitem__)


def test_static_sampler_draws_in_proportion_to_w():
    """Rates 0, 1/8, 1/2, 7/8, 1: first draws 7 : 16 : 7, never the ends."""
    rates = P.tolist()
    method = Paced(use="sampler", column="rate")
    counts = torch.zeros(5)
    for _ in range(3000):
        counts[method.choose_prompts(draw_of(1, 5, rates))] += 1
    assert counts[[0, 4]].tolist() == [0, 0]
    share = torch.tensor([0, 7, 16, 7, 0]) / 30
    assert (counts / 3000).tolist() == pytest.approx(share.tolist(), abs=4 * math.sqrt(0.25 / 3000))
    with_floor = Paced(use="sampler", column="rate", floor=0.05)
    assert len(set(with_floor.choose_prompts(draw_of(5, 5, rates)).tolist())) == 5
    assert with_floor._table(5).weights.tolist() == pytest.approx([0.05, 0.109375, 0.25, 0.109375, 0.05])


def test_too_few_prompts_with_a_weight_are_filled_up():
    method = Paced(use="sampler", column="rate")
    draw = draw_of(4, 5, P.tolist())
    drawn = method.choose_prompts(draw).tolist()
    assert {1, 2, 3} < set(drawn) and len(set(drawn)) == 4
    assert (draw.metrics.totals["filled"][0] / draw.metrics.totals["filled"][1]).item() == 0.25


@dataclasses.dataclass
class FakeGroup:
    drawn: torch.Tensor
    outcomes: torch.Tensor
    metrics: Metrics = dataclasses.field(default_factory=Metrics)
    discarded_drawn: torch.Tensor | None = None
    discarded_rewards: torch.Tensor | None = None
    reward_names: tuple = ("right",)


def test_live_table():
    """memory 1/2 from 1/2: 3 of 4 gives 5/8, none gives 1/4, then 1/8 and 1/16; discarded groups count; no verdict changes
    nothing."""
    method = Paced(use="sampler", memory=0.5)
    method.choose_prompts(draw_of(2, 6))
    nan = math.nan
    seen = torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 0], [nan] * 4])
    discarded = torch.tensor([[[1.0], [1], [1], [0.5]]])
    method.observe(FakeGroup(torch.tensor([4, 1, 2]), seen[..., None], Metrics(), torch.tensor([5]), discarded))
    assert method.state["rates"].tolist() == [0.5, 0.25, 0.5, 0.5, 0.625, 0.75]
    assert method.state["visits"].tolist() == [0, 1, 0, 0, 1, 1] and method.state["draws"] == 1
    for _ in range(2):
        method.observe(FakeGroup(torch.tensor([1]), torch.zeros(1, 4, 1)))
    assert method.state["rates"][1] == 0.0625
    assert method.summary(str) == [
        "prompts drawn for 1 rollouts out of 6; 3 different ones came, 1 with a pass rate below 0.1, 0 above 0.9"
    ]


def test_sampler_in_the_trainer_follows_the_table(tmp_path):
    """Prompts that are always or never solved do not come again while others are left."""

    def by_prompt(completions, prompts, **kwargs):
        first = [int(p[0]["content"].split()[0]) for p in prompts]
        return [float(n % 4 == 0 or (n % 4 == 1 and i % 2)) for i, n in enumerate(first)]

    trainer = train(tmp_path, {"paced": {"use": "sampler"}}, rewards=by_prompt, max_steps=10)
    (method,) = trainer.plan.methods
    rates, visits = method.state["rates"], method.state["visits"]
    assert int(visits.sum()) == 20
    for i in range(16):
        if i % 4 == 1:
            assert rates[i] == 0.5
        else:
            assert visits[i] <= 1 and rates[i].item() in ((0.5,) if visits[i] == 0 else (float(i % 4 == 0),))
    assert visits[1::4].sum() > 4
    log = log_of(trainer)
    assert [e["paced/visited"] for e in log] == sorted(e["paced/visited"] for e in log)
    assert log[0]["paced/effective_table"] == pytest.approx(16)


def test_resume_inside_a_window_equals_not_stopping(tmp_path):
    settings = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    methods = {"paced": {"use": "sampler", "memory": 0.5, "smoothing": 0.5}}
    whole = train(tmp_path, methods, **settings)
    resumed = train(tmp_path, methods, resume=str(tmp_path / "checkpoint-3"), **settings)
    assert_equal(weights(whole), weights(resumed))
    first, second = (t.plan.methods[0].state for t in (whole, resumed))
    assert torch.equal(first["rates"], second["rates"]) and first["draws"] == second["draws"] == 3


# What is refused


@pytest.mark.parametrize(
    "methods, words",
    [
        ({"paced": {}}, "add it, or set use: advantages"),
        ({"paced": {"use": "advantages", "floor": 0.1}}, "floor has no effect without use: sampler"),
        ({"paced": {"use": "sampler", "normalize": "none"}}, "leave it out"),
        (
            {"paced": {"use": "sampler", "column": "rate", "memory": 0.5}},
            "memory has no effect without live pass rates",
        ),
        (
            {"paced": {"use": "advantages", "column": "rate", "smoothing": 1}},
            "smoothing has no effect without live pass rates",
        ),
        ({"paced": {"use": "advantages"}, "oblr_po": {}}, "name oblr_po before paced"),
        ({"paced": {"use": "advantages"}, "capo": {"preset": "rein_capo"}}, "name capo before paced"),
        ({"real": {}, "paced": {"use": "advantages"}}, "set use: sampler"),
        ({"riskpo": {}, "paced": {"use": "advantages"}}, "riskpo bundles questions of different pass rates"),
        ({"fg_expo": {}, "paced": {"use": "sampler"}}, "both replace the sampler"),
        ({"fg_expo": {}, "trace": TRACE, "paced": {}}, "would count twice"),
        ({"paced": {"use": "sampler", "memory": 1}}, "must be < 1"),
    ],
)
def test_bad_company_and_settings(tmp_path, methods, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), beta=0.1), methods=methods)


def test_several_rewards_need_a_verifier(tmp_path):
    methods = {"paced": {"use": "advantages"}}
    with pytest.raises(PlanError, match="verdicts, letters_reward"):
        make(tmp_path, methods, rewards=[verdicts, letters_reward])
    with pytest.raises(PlanError, match="not a reward of this run"):
        make(tmp_path, {"paced": {"use": "advantages", "verifier": "right"}})


def test_the_slot_is_owned_in_one_use_only():
    uses = {
        use: make_plan({"trace": TRACE, "paced": {"use": use}}).methods[1].owns for use in ("distill", "advantages")
    }
    assert uses == {"distill": (), "advantages": ()} and Paced(use="sampler").owns == ("sampler",) and Paced.owns == ()
