"""riskpo: the card's worked example, the shape of its advantages, credits, tracking, and bundles in real training."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import trl_ext
from tests.methods.groups import logged, made_group
from tests.methods.spy import spied
from tests.methods.training import train
from tests.tiny import assert_equal, grpo_args, weights
from trl_ext.methods.grpo.riskpo import (
    RiskPO,
    bundle_of,
    bundle_scores,
    code_advantages,
    credited,
    middle,
    own_quantiles,
    pairing,
    paper_advantages,
    tracked,
)
from trl_ext.plan import PlanError
from trl_ext.recipe import load_recipe

LEVELS = (0.2, 0.8)
R = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.float64)
ONE = bundle_of(3, 3)
SCORES = bundle_scores(R, ONE, 3)
LOW, HIGH = own_quantiles(SCORES, LEVELS)


# The card's numbers


def test_worked_example():
    assert SCORES.tolist() == [[2, 1, 2, 0]]
    assert (float(LOW), float(HIGH)) == pytest.approx((0.6, 2.0), abs=1e-6)
    assert middle(SCORES, LOW, HIGH)[0].tolist() == pytest.approx([0, -1, 0, -1.4], abs=1e-6)
    assert paper_advantages(SCORES, LOW, HIGH, 0.5)[0].tolist() == pytest.approx([0, -1, 0, -2.3], abs=1e-6)
    bare = paper_advantages(SCORES, LOW, HIGH, 0.5, natural_baseline=False)
    assert bare[0].tolist() == pytest.approx([1.4, 0.4, 1.4, -0.9], abs=1e-6)


def loop_of_the_code(natural_baseline, eps):
    """The card's lines for the released variant, one bundle at a time; `eps` beside the probability masses."""
    scores, found = [2, 1, 2, 0], []
    std = math.sqrt(sum((z - 1.25) ** 2 for z in scores) / 3)
    for z in scores:
        g = max(z - 0.6, 0) - max(z - 2, 0) + (0.6 - 2 if natural_baseline else 0)
        a = (1.5 * -max(0.6 - z, 0) / (0.2 + eps) + g / (0.6 + eps)) / 2.5
        found.append(a / (std + 1e-6))
    return found


@pytest.mark.parametrize(
    "natural_baseline, card",
    [(True, [0, -0.696310, 0, -2.854871]), (False, [0.974834, 0.278524, 0.974834, -1.880037])],
)
def test_worked_example_of_the_released_variant(natural_baseline, card):
    """The card's numbers leave out the 1e-6 beside the masses, which moves the fifth digit; its formula has it."""
    assert loop_of_the_code(natural_baseline, 0) == pytest.approx(card, abs=1e-6)
    found = code_advantages(SCORES, LOW, HIGH, LEVELS, 1.5, natural_baseline)[0].tolist()
    assert found == pytest.approx(loop_of_the_code(natural_baseline, 1e-6), abs=1e-6)
    assert found == pytest.approx(card, abs=2e-5)


def test_worked_sum_mean_credits():
    bundle = torch.tensor([[0.974834, 0.278524, 0.974834, -1.880037]], dtype=torch.float64)
    found = credited(bundle, R, ONE, "sum-mean")
    expected = [
        [0.649889, 0.649889, -0.324945],
        [0.557048, -0.557048, 0.278524],
        [0.649889, -0.649889, 0.974834],
        [-0.752015, -0.752015, -0.376007],
    ]
    torch.testing.assert_close(found.T, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1.1e-6)
    torch.testing.assert_close(found.sum(0, keepdim=True), bundle)


def test_worked_tracking():
    found = tracked(torch.tensor([1.0, 2.0], dtype=torch.float64), SCORES, LEVELS, 0.1)
    assert found.tolist() == pytest.approx([0.995, 2.030], abs=1e-9)


# Shape of the advantages


@pytest.mark.parametrize("omega", [0.5, 0.0, 2.0, -1.0])
def test_paper_advantage_has_three_slopes(omega):
    z = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    low, high = torch.tensor([[2.0]]), torch.tensor([[4.0]])
    found = paper_advantages(z, low, high, omega)
    assert found.diff()[0].tolist() == pytest.approx([1 + omega] * 2 + [1] * 2 + [0] * 2)
    assert bool((found <= 0).all()) and found[0, 4:].tolist() == [0, 0, 0]
    bare = paper_advantages(z, low, high, omega, natural_baseline=False)
    assert (found - bare)[0].tolist() == pytest.approx([-2.0] * 7), "they differ by Qa - Qb alone"
    assert middle(z, low, high).diff()[0].tolist() == pytest.approx([0, 0, 1, 1, 0, 0])


def test_lower_tail_at_level_zero_is_empty():
    """alpha 0: Qa is the lowest score, so omega has no effect and a clipped reward is left."""
    z = torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    low, high = own_quantiles(z, (0.0, 0.5))
    assert (float(low), float(high)) == (0.0, 1.5)
    for omega in (0.0, 3.0):
        assert paper_advantages(z, low, high, omega)[0].tolist() == [-1.5, -0.5, 0, 0]


def test_risk_seeking_weighs_the_upper_tail():
    """Above Qb: (w / (1 - beta) + 0) / (w + 1) per unit; below Qa: nothing."""
    z = torch.tensor([[0.0, 1.0, 3.0, 5.0]], dtype=torch.float64)
    low, high = torch.tensor([[1.0]]).double(), torch.tensor([[3.0]]).double()
    found = code_advantages(z, low, high, LEVELS, 1.5, seeking=True) * z.std()
    rvar = [-2 / 0.6, -2 / 0.6, 0, 0]
    expected = [(1.5 * up / 0.2 + mid) / 2.5 for up, mid in zip([0, 0, 0, 2], rvar, strict=True)]
    assert found[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_one_bundle_has_no_deviation():
    alone = torch.tensor([[1.0]])
    found = code_advantages(alone, torch.tensor([[2.0]]), torch.tensor([[3.0]]), LEVELS, 1.5)
    assert float(found) == pytest.approx((1.5 * -1 / 0.2 - 1 / 0.6) / 2.5, rel=1e-4)


# Bundles


def test_every_response_is_in_one_bundle():
    order = pairing(7, 5, seed=3, count=2)
    assert order.sort(1).values.tolist() == [[0, 1, 2, 3, 4]] * 7
    assert torch.equal(order, pairing(7, 5, seed=3, count=2))
    assert not torch.equal(order, pairing(7, 5, seed=3, count=3))
    assert not torch.equal(order, pairing(7, 5, seed=4, count=2))
    assert len({tuple(row) for row in order.tolist()}) > 1, "each prompt has a permutation of its own"


def test_pairing_does_not_prefer_a_response():
    first = torch.cat([pairing(200, 4, seed=0, count=n)[:, 0] for n in range(20)])
    assert first.bincount().tolist() == pytest.approx([1000] * 4, abs=110)  # four standard deviations


def test_smaller_last_bundle():
    """7 prompts by 3: two whole groups and one of a single prompt, whose score counts threefold."""
    values = torch.arange(14.0).view(7, 2)
    owner = bundle_of(7, 3)
    assert owner.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert bundle_scores(values, owner, 3).tolist() == [[0 + 2 + 4, 1 + 3 + 5], [6 + 8 + 10, 7 + 9 + 11], [36, 39]]


def test_uniform_and_std_credit():
    bundle = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    rewards = torch.tensor([[0.0, 2.0], [1.0, 1.0], [5.0, 6.0]])
    owner = bundle_of(3, 2)
    assert credited(bundle, rewards, owner, "uniform").tolist() == [[1, -2], [1, -2], [3, 4]]
    two, half = math.sqrt(2), math.sqrt(0.5)  # unbiased; the second question has no spread and keeps a[j]
    expected = torch.tensor([[1 / two, -2 / two], [1, -2], [3 / half, 4 / half]])
    torch.testing.assert_close(credited(bundle, rewards, owner, "std"), expected)


def test_sum_mean_falls_back_to_equal_shares():
    """Bundle 1 has d = (0.5, -0.5): no sum. An all-equal question beside a mixed one gets nothing."""
    bundle = torch.tensor([[1.0, -2.0]])
    found = credited(bundle, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), bundle_of(2, 2), "sum-mean")
    assert found.tolist() == [[0.5, -1], [0.5, -1]]
    found = credited(bundle, torch.tensor([[0.0, 0.0], [0.0, 1.0]]), bundle_of(2, 2), "sum-mean")
    assert found.tolist() == [[0, 0], [1, -2]]


# The method on groups


def reference(totals, method, order):
    """Slow: bundles of method.bundle_size prompts, paired by `order`, their own quantiles, the paper's formula."""
    prompts, generations = totals.shape
    found = torch.zeros(prompts, generations)
    for start in range(0, prompts, method.bundle_size):
        members = range(start, min(start + method.bundle_size, prompts))
        scale = method.bundle_size / len(members)
        scores = [scale * sum(float(totals[i, order[i, j]]) for i in members) for j in range(generations)]
        low, high = (float(torch.quantile(torch.tensor(scores), level)) for level in method.levels)
        for j, z in enumerate(scores):
            value = max(z - low, 0) - max(z - high, 0) + low - high - (1 + method.omega) * max(low - z, 0)
            for i in members:
                found[i, order[i, j]] = value
    return found


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("quantiles", ["batch", "track", "mix"])
def test_first_rollout_takes_each_groups_own_quantiles(size, quantiles):
    torch.manual_seed(1)
    group = made_group(torch.rand(5, 4), seed=7)
    method = RiskPO(bundle_size=size, quantiles=quantiles)
    found = method.group_advantages(group.advantages, group)
    torch.testing.assert_close(found, reference(group.total, method, pairing(5, 4, 7, 0)))
    assert method.state == {}, "only observe changes it"


def test_tracking_over_rollouts():
    """After the first rollout the quantiles of all its scores, then steps; both with the pairing of their rollout."""
    torch.manual_seed(2)
    groups = [made_group(torch.rand(4, 8), seed=5) for _ in range(3)]
    method, expected = RiskPO(bundle_size=2), None
    for count, group in enumerate(groups):
        scores = bundle_scores(group.total.gather(1, pairing(4, 8, 5, count)), bundle_of(4, 2), 2)
        found = method.group_advantages(group.advantages, group)
        if expected is None:
            expected = torch.quantile(scores.flatten(), torch.tensor(LEVELS))
        else:
            low, high = expected
            spread = torch.zeros(4, 8).scatter(
                1, pairing(4, 8, 5, count), paper_advantages(scores, low, high, 0.5).repeat_interleave(2, 0)
            )
            torch.testing.assert_close(found, spread)
            assert (logged(group.metrics)["Qa"], logged(group.metrics)["Qb"]) == pytest.approx(
                (float(low), float(high))
            )
            expected = tracked(expected, scores, LEVELS, 0.1)
        method.observe(group)
        torch.testing.assert_close(method.state["quantiles"], expected)
        assert method.state["rollouts"] == count + 1


def test_modes_after_the_first_rollout():
    """Qa, Qb tracked at (0, 10); the group's own are (2, 2): track 0, 10; mix 1, 6; batch 2, 2."""
    seen = {}
    for mode in ("track", "mix", "batch"):
        method = RiskPO(bundle_size=2, quantiles=mode)
        if mode != "batch":
            method.state.update(rollouts=1, quantiles=torch.tensor([0.0, 10.0]))
        group = made_group(torch.ones(2, 4))
        method.group_advantages(group.advantages, group)
        seen[mode] = (logged(group.metrics)["Qa"], logged(group.metrics)["Qb"])
        method.observe(group)
        assert ("quantiles" in method.state) == (mode != "batch")
    assert seen == {"track": (0, 10), "mix": (1, 6), "batch": (2, 2)}


def test_tracking_finds_the_quantiles():
    """Uniform scores: 0.2 and 0.8, from far away. Steps are lr^2-noisy: within 0.05."""
    draw = torch.Generator().manual_seed(0)
    quantiles = torch.tensor([3.0, 3.0])
    for _ in range(1500):
        quantiles = tracked(quantiles, torch.rand(4, 16, generator=draw), LEVELS, 0.02)
    assert quantiles.tolist() == pytest.approx([0.2, 0.8], abs=0.05)


def test_tracking_is_a_step_against_the_pinball_loss():
    """L_q(Q) = mean (R - Q)(q - 1{R < Q}), differentiated by autograd."""
    scores, start = torch.rand(3, 5), torch.tensor([0.3, 0.6], requires_grad=True)
    gap = scores.flatten() - start.unsqueeze(1)
    loss = (gap * (torch.tensor(LEVELS).unsqueeze(1) - (gap < 0).float())).mean(1).sum()
    loss.backward()
    torch.testing.assert_close(tracked(start.detach(), scores, LEVELS, 0.1), start.detach() - 0.1 * start.grad)


def test_tracked_quantiles_do_not_cross():
    """All mass between two near quantiles pushes them over each other: the upper one stops at the lower one."""
    found = tracked(torch.tensor([1.0, 1.001]), torch.full((1, 4), 1.0005), LEVELS, 0.1)
    assert found.tolist() == pytest.approx([1.02, 1.02])


@pytest.mark.parametrize("credit, gets", [("uniform", True), ("std", True), ("sum-mean", False)])
def test_all_wrong_question(credit, gets):
    """It gets a signal from its bundle, where GRPO has none; not with sum-mean, where its d is 0."""
    totals = torch.tensor([[0.0, 0, 0, 0], [1, 1, 0, 0.5]])
    group = made_group(totals)
    found = RiskPO(bundle_size=2, credit=credit).group_advantages(group.advantages, group)
    assert bool((found[0] != 0).any()) == gets
    assert logged(group.metrics)["flat_prompts"] == 0.5
    assert logged(group.metrics)["flat_with_signal"] == float(gets)


def test_metrics_of_the_worked_example():
    """B = 1 and one prompt make the scores (2, 1, 2, 0) again: up to Qa 0.6 only 0; between, 1 and both 2 (= Qb)."""
    group = made_group([[2.0, 1, 2, 0]])
    RiskPO(bundle_size=1, quantiles="batch").group_advantages(group.advantages, group)
    spread = math.sqrt(((2 - 1.25) ** 2 * 2 + 0.25**2 + 1.25**2) / 4)
    expected = {"Qa": 0.6, "Qb": 2, "score_mean": 1.25, "score_std": spread, "cvar": 0, "rvar": 5 / 3, "above": 0}
    assert {k: v for k, v in logged(group.metrics).items() if k in expected} == pytest.approx(expected, abs=1e-6)
    assert logged(group.metrics)["flat_prompts"] == 0 and "flat_with_signal" not in logged(group.metrics)


def test_unscored_responses_and_reward_weights():
    """The second reward counts double; a response that neither function scored has advantage 0 and adds 0."""
    nan = math.nan
    rewards = torch.tensor([[[1.0, 1], [0, 1], [nan, nan], [1, nan]]])
    group = made_group(rewards, ["a", "b"], (1.0, 2.0))
    method = RiskPO(bundle_size=1, quantiles="batch")
    found = method.group_advantages(group.advantages, group)
    expected = reference(torch.tensor([[3.0, 2, 0, 1]]), method, pairing(1, 4, 0, 0))
    expected[0, 2] = 0
    torch.testing.assert_close(found, expected)
    assert expected[0, [1, 3]].ne(0).all()


# In the trainer

NONE = {"scale_rewards": "none"}
BUNDLED = {"riskpo": {"bundle_size": 2}}


def test_advantages_reach_the_loss(tmp_path, monkeypatch):
    """Rows are shuffled on the way; the completions table holds what the loss gets."""
    made, seen = [], spied(monkeypatch)
    original = RiskPO.group_advantages
    monkeypatch.setattr(
        RiskPO, "group_advantages", lambda self, a, g: made.append((g, original(self, a, g))) or made[-1][1]
    )
    trainer = train(tmp_path, BUNDLED | {"epo": {}}, max_steps=2, **NONE)  # epo looks into the loss
    for count, (group, found) in enumerate(made):
        order = pairing(2, 4, trainer.args.seed, count)
        assert group.total.shape == (2, 4)
        assert torch.equal(found.gather(1, order)[0], found.gather(1, order)[1]), "two prompts, one bundle group"
        assert found.unique().numel() > 1
        assert torch.equal(seen[count].advantages.sort().values, found.flatten().sort().values)
    assert list(trainer._logs["advantages"])[-8:] == pytest.approx(made[-1][1].flatten().tolist())


def test_every_metric_is_in_the_log(tmp_path):
    log = train(tmp_path, BUNDLED, **NONE).state.log_history[:3]
    for name in ("Qa", "Qb", "score_mean", "score_std", "cvar", "rvar", "above", "flat_prompts"):
        assert any(math.isfinite(entry.get(f"riskpo/{name}", math.nan)) for entry in log), name


def test_score_mean_in_the_log_is_bundled_reward(tmp_path):
    log = train(tmp_path, BUNDLED, **NONE).state.log_history
    for entry in log[:3]:
        assert entry["riskpo/score_mean"] == pytest.approx(2 * entry["reward"], rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"quantiles": "mix", "credit": "sum-mean"}, {"variant": "code", "risk": "seeking"}]
)
def test_micro_batches_do_not_matter(tmp_path, settings):
    runs = {}
    for size in (8, 2):
        trainer = train(
            tmp_path,
            {"riskpo": {"bundle_size": 2} | settings},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            optim="sgd",
            learning_rate=0.1,
            **NONE,
        )
        runs[size] = weights(trainer)
    for name, value in runs[8].items():
        torch.testing.assert_close(runs[2][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stop", [2, 3])
def test_resume_equals_not_stopping(tmp_path, stop):
    """At the end of a generation window, and inside one."""
    settings = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 5, **NONE}
    whole = train(tmp_path, BUNDLED, **settings)
    resumed = train(tmp_path, BUNDLED, resume=str(tmp_path / f"checkpoint-{stop}"), **settings)
    assert_equal(weights(whole), weights(resumed))
    first, second = (t.plan.methods[0].state for t in (whole, resumed))
    assert first["rollouts"] == second["rollouts"] == 3
    assert torch.equal(first["quantiles"], second["quantiles"])


def test_sequence_level_ratio_is_trls(tmp_path):
    """The paper's surrogate: TRL's sequence-level ratio runs with it."""
    trainer = train(tmp_path, BUNDLED, importance_sampling_level="sequence", num_iterations=2, **NONE)
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    assert trainer.importance_sampling_level == "sequence"


@pytest.mark.parametrize(
    "settings, kwargs, words",
    [
        ({}, {"scale_rewards": "group"}, "set scale_rewards: none"),
        ({}, {"scale_rewards": True}, "set scale_rewards: none"),
        ({}, {"multi_objective_aggregation": "normalize_then_sum"}, "sum_then_normalize"),
        ({"bundle_size": 3}, {}, "a rollout has 2 prompts, fewer than bundle_size 3"),
        ({"quantile_down": 0.8}, {}, "must be below quantile_up"),
        ({"risk": "seeking"}, {}, "set variant: code"),
        ({"variant": "code", "quantile_down": 0}, {}, "set it above 0"),
        ({"variant": "code", "risk": "seeking", "quantile_up": 1}, {}, "quantile_up below 1"),
        ({"credit": "summean"}, {}, "did you mean 'sum-mean'"),
        ({"omega": -1.5}, {}, "must be >= -1"),
        ({"quantiles": "batch", "quantile_lr": 0.2}, {}, "quantile_lr moves tracked quantiles"),
    ],
)
def test_clashes_name_the_flag(tmp_path, settings, kwargs, words):
    args = grpo_args(str(tmp_path), **NONE | kwargs)
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**args, methods={"riskpo": {"bundle_size": 2} | settings})


def test_two_baselines_are_refused():
    with pytest.raises(PlanError, match="both replace the baseline"):
        trl_ext.plan.make_plan({"riskpo": {}, "oblr_po": {}})


def test_recipe_has_the_papers_numbers():
    recipe = load_recipe("riskpo_qwen2.5_1.5b", ["--use_cpu", "true"])
    (riskpo,), args = recipe.plan.methods, recipe.training_args
    assert riskpo == dataclasses.replace(RiskPO(), quantile_lr=0.01)
    assert (riskpo.levels, riskpo.omega, riskpo.bundle_size) == ((0.2, 0.8), 0.5, 5)
    assert (args.num_generations, args.max_completion_length, args.max_steps) == (5, 1024, 200)
    assert (args.importance_sampling_level, args.epsilon, args.beta) == ("sequence", 0.2, 0.0)
    prompts = args.generation_batch_size // args.num_generations
    assert prompts == 100 and prompts % riskpo.bundle_size == 0
    assert riskpo.quantile_lr * 1024 == pytest.approx(0.1 * prompts, rel=0.03)
