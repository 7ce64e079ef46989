"""d3s: the card's worked examples, both stages against slow references, denominators, splits and restart."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import trl

import trl_ext
from tests.methods.spy import spied
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext.method import Method
from trl_ext.methods import METHODS
from trl_ext.methods.grpo.d3s import D3S, linear, max_variance_subset, select_rollouts, select_tokens
from trl_ext.plan import PlanError
from trl_ext.recipe import load_recipe

REWARDS = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
POOL = (REWARDS - REWARDS.mean(1, keepdim=True)) / (REWARDS.std(1, keepdim=True) + 1e-4)


def brute_force(values, size):
    return max(values[list(s)].var(correction=0).item() for s in itertools.combinations(range(len(values)), size))


def best(values, size, seed=0):
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    return max_variance_subset(values, size, order)


# The stages


@pytest.mark.parametrize("size, variance", [(2, 2.249100), (4, 1.249500), (6, 0.916300)])
def test_worked_example_of_the_sample_stage(size, variance):
    keep = select_rollouts(POOL, seed=0, in_pool=size).flatten()
    assert keep.sum() == size
    assert POOL.flatten()[keep].var(correction=0).item() == pytest.approx(variance, abs=1e-4)
    assert brute_force(POOL.flatten(), size) == pytest.approx(variance, abs=1e-4)
    if size == 2:
        assert keep.nonzero().flatten().tolist() == [0, 7]
    if size == 4:
        torch.testing.assert_close(
            POOL.flatten()[keep].sort().values, torch.tensor([-1.4997, -0.4999, 0.4999, 1.4997]), rtol=0, atol=1e-4
        )


def test_the_second_stage_exactly():
    """Var {a, -a} = a^2 with a = 0.75 / (0.5 + 1e-4); four: (a^2 + b^2) / 2 with b = 0.25 / (0.5 + 1e-4)."""
    a, b = 0.75 / 0.5001, 0.25 / 0.5001
    for size, expected in ((2, a * a), (4, (a * a + b * b) / 2)):
        keep = select_rollouts(POOL, seed=3, in_pool=size)
        assert POOL[keep].double().var(correction=0).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("n", [2, 5, 9])
def test_any_size_equals_brute_force(n):
    values = torch.randn(n, generator=torch.Generator().manual_seed(n))
    for size in range(1, n + 1):
        keep = best(values, size)
        assert keep.sum() == size
        assert values[keep].var(correction=0).item() == pytest.approx(brute_force(values, size), abs=1e-5)


def test_odd_sizes_of_the_lemma():
    pool = torch.tensor([1.0, 1.0, -1.0, -1.0])
    found = {size: pool[best(pool, size)].var(correction=0).item() for size in (2, 3)}
    assert found == pytest.approx({2: 1.0, 3: 0.888889}, abs=1e-6)


def test_selection_follows_a_permutation():
    values = torch.randn(12, generator=torch.Generator().manual_seed(1))
    shuffle = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    assert torch.equal(best(values, 5)[shuffle], best(values[shuffle], 5))


def test_ties_are_broken_by_the_seed_and_not_by_place():
    """One of eight equal right answers is kept: over seeds each of them is, and a seed repeats itself."""
    pool = torch.tensor([[1.0] * 8 + [-1.0] * 8])
    kept = [select_rollouts(pool, seed, in_pool=2).flatten() for seed in range(100)]
    assert {int(k[:8].nonzero()) for k in kept} == set(range(8))
    assert torch.equal(kept[5], select_rollouts(pool, 5, in_pool=2).flatten())


def test_rounding_noise_is_a_tie():
    noise = torch.arange(16) * 1e-9
    pool = torch.tensor([1.0] * 8 + [-1.0] * 8, dtype=torch.float64)
    assert all(torch.equal(best(pool, 4, s), best(pool + noise, 4, s)) for s in range(5))


def test_all_equal_keeps_everything():
    assert select_rollouts(torch.zeros(3, 4), 0, in_group=2, in_pool=2).all()


def test_inside_groups_then_across():
    intra = select_rollouts(POOL, seed=0, in_group=2)
    assert intra.sum(1).tolist() == [2, 2, 2, 2]
    assert intra[0, 0] and intra[1, 3], "the odd one out is in the best pair"
    both = select_rollouts(POOL, seed=0, in_group=2, in_pool=3)
    assert both.sum() == 3 and bool((both <= intra).all())
    assert both[0, 0] and both[1, 3]


def test_worked_example_of_the_token_stage():
    entropy = torch.tensor([[0.1, 2.0, 0.5, 9.0], [1.0, 0.2, 0.9, 9.0], [3.0, 1.5, 0.1, 2.5]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    keys = torch.tensor([1.4998, -1.4998, 0.5]).abs().unsqueeze(1) * entropy
    expected = [0.149980, 2.999600, 0.749900, 1.499800, 0.299960, 1.349820, 1.5, 0.75, 0.05, 1.25]
    assert keys[mask].tolist() == pytest.approx(expected, abs=1e-6)
    kept = torch.zeros_like(mask).masked_scatter(mask, select_tokens(keys[mask], 0.4))
    assert kept.int().tolist() == [[0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("share, n, kept", [(0.4, 10, 4), (0.35, 20, 7), (0.01, 5, 1), (0.5, 3, 2), (1.0, 4, 4)])
def test_token_count(share, n, kept):
    keys = torch.rand(n) + 0.1
    keep = select_tokens(keys, linear(0.5, share - 0.15, share + 0.15) if share == 0.35 else share)
    assert keep.sum() == kept
    assert keep.all() or keys[keep].min() >= keys[~keep].max()


def test_tokens_without_advantage_come_last_and_alone_stay():
    keys = torch.tensor([0.0, 0.3, 0.0, 0.2])
    assert select_tokens(keys, 0.5).tolist() == [False, True, False, True]
    assert select_tokens(keys, 0.75).sum() == 3
    assert select_tokens(torch.zeros(4), 0.25).all()
    assert select_tokens(torch.zeros(0), 0.25).shape == (0,)


@pytest.mark.parametrize("progress, expected", [(0, (0.25, 0.2)), (0.5, (0.375, 0.35)), (1, (0.5, 0.5))])
def test_schedule(progress, expected):
    d3s = D3S()
    found = (
        linear(progress, d3s.sample_start, d3s.sample_end),
        linear(progress, d3s.token_start, d3s.token_end),
    )
    assert found == pytest.approx(expected, abs=1e-12)


# In the trainer

NEUTRAL = {"sample_start": 1, "sample_end": 1, "token_start": 1, "token_end": 1}
HALF = {"sample_start": 0.5, "sample_end": 0.5, "token_start": 0.5, "token_end": 0.5}


def train(tmp_path, methods, cls=trl_ext.GRPOTrainer, config=trl_ext.GRPOConfig, resume=None, **kwargs):
    extra = {"methods": methods} if config is trl_ext.GRPOConfig else {}
    trainer = cls(tiny_path(), letters_reward, config(**grpo_args(str(tmp_path), **kwargs), **extra), prompts())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_all_shares_one_is_trl(tmp_path, loss_type):
    ours = train(tmp_path, {"d3s": NEUTRAL}, loss_type=loss_type, beta=0.1)
    stock = train(tmp_path, None, trl.GRPOTrainer, trl.GRPOConfig, loss_type=loss_type, beta=0.1)
    assert_equal(weights(ours), weights(stock))


def kept_of(x, share):
    """Slow reference of the token stage in one micro-batch: sort, cut, no ties."""
    keys = x.advantages.abs().unsqueeze(1) * x.entropy.detach()
    ranked = sorted(keys[x.mask.bool()].tolist(), reverse=True)
    count = max(1, -(-len(ranked) * share // 1))
    return (keys >= ranked[int(count) - 1]) & x.mask.bool()


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("normalizer", ["kept", "original"])
def test_gradient_has_the_denominator(tmp_path, monkeypatch, loss_type, normalizer):
    """On policy d loss / d logp = -A / Z on kept tokens, 0 elsewhere: with the selection as a constant.

    Z: N times the row's kept tokens (grpo), all kept tokens (dapo); original: M times the row's tokens, or all
    that were generated.
    """
    seen = spied(monkeypatch)
    batches = []
    parent = trl.GRPOTrainer._generate_and_score_completions
    monkeypatch.setattr(
        trl.GRPOTrainer,
        "_generate_and_score_completions",
        lambda self, inputs: batches.append(parent(self, inputs)) or dict(batches[-1]),
    )
    train(tmp_path, {"d3s": HALF | {"normalizer": normalizer}}, loss_type=loss_type, max_steps=1)
    (x,), whole = seen, batches[0]
    assert x.logps.size(0) == 4 and whole["advantages"].numel() == 8
    assert bool(torch.isin(x.advantages, whole["advantages"]).all()), "the selection does not change advantages"
    keep = kept_of(x, 0.5)
    per_row = loss_type == "grpo"
    if normalizer == "kept":
        z = 4 * keep.sum(1, keepdim=True).clamp(min=1) if per_row else keep.sum()
    else:
        z = 8 * x.mask.sum(1, keepdim=True) if per_row else whole["completion_mask"].sum()
    expected = torch.where(keep, -x.advantages.unsqueeze(1) / z, 0.0)
    torch.testing.assert_close(x.logps.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalizer", ["kept", "original"])
def test_gradient_of_bnpo_without_the_sample_stage(tmp_path, monkeypatch, normalizer):
    """bnpo divides by the micro-batch's tokens: the kept ones, or all."""
    seen = spied(monkeypatch)
    tokens = {"sample_start": 1, "sample_end": 1, "token_start": 0.5, "token_end": 0.5, "normalizer": normalizer}
    train(tmp_path, {"d3s": tokens}, loss_type="bnpo", max_steps=1)
    (x,) = seen
    keep = kept_of(x, 0.5)
    z = keep.sum() if normalizer == "kept" else x.mask.sum()
    expected = torch.where(keep, -x.advantages.unsqueeze(1) / z, 0.0)
    torch.testing.assert_close(x.logps.grad, expected, rtol=1e-4, atol=1e-6)


def test_dropped_rollouts_are_not_forwarded(tmp_path, monkeypatch):
    seen = spied(monkeypatch)
    settings = {"sample_start": 0.25, "sample_end": 0.25, "token_start": 1, "token_end": 1}
    trainer = train(tmp_path, {"d3s": settings}, max_steps=2)
    assert [x.logps.size(0) for x in seen] == [2, 2]
    assert trainer.state.log_history[0]["rows_forwarded"] == 0.25


def test_fillers_keep_the_shape_and_carry_no_loss(tmp_path, monkeypatch):
    """3 of 8 rows in 2 micro-batches: room for 4, so one filler with no loss tokens and no gradient."""
    seen = spied(monkeypatch)
    settings = {"sample_start": 0.375, "sample_end": 0.375, "token_start": 1, "token_end": 1}
    train(
        tmp_path,
        {"d3s": settings},
        max_steps=1,
        loss_type="grpo",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    assert [x.logps.size(0) for x in seen] == [2, 2]
    filler = torch.cat([x.mask.sum(1) == 0 for x in seen])
    grad, mask = (torch.cat([getattr(x, k) if k == "mask" else x.logps.grad for x in seen]) for k in ("grad", "mask"))
    assert filler.sum() == 1 and bool((grad[filler] == 0).all())
    advantages = torch.cat([x.advantages for x in seen])
    expected = torch.where(mask.bool(), -advantages.unsqueeze(1) / (3 * mask.sum(1, keepdim=True).clamp(min=1)), 0.0)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_generation_batch_scope_does_not_depend_on_the_split(tmp_path, loss_type):
    """One rollout, two passes, a reference KL; ranked per micro-batch the tokens differ, as the card's decision says."""
    runs = {}
    for scope, size in itertools.product(("generation_batch", "micro_batch"), (8, 1)):
        trainer = train(
            tmp_path,
            {"d3s": HALF | {"scope": scope}},
            max_steps=2,
            num_iterations=2,
            loss_type=loss_type,
            beta=0.1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            optim="sgd",
            learning_rate=0.1,
        )
        runs[scope, size] = torch.cat([p.flatten() for p in weights(trainer).values()])
    torch.testing.assert_close(runs["generation_batch", 8], runs["generation_batch", 1], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(runs["micro_batch", 8], runs["micro_batch", 1], rtol=1e-3, atol=1e-5)


def test_metrics(tmp_path, monkeypatch):
    seen = spied(monkeypatch)
    trainer = train(tmp_path, {"d3s": HALF}, max_steps=1)
    entry, (x,) = trainer.state.log_history[0], seen
    pool = torch.tensor(list(trainer._logs["advantages"]))
    keep, mask = kept_of(x, 0.5), x.mask.bool()
    entropy = x.entropy.detach()
    generated = entry["completions/mean_length"] * 8
    expected = {
        "N": 4,
        "K": 0.5,
        "var_before": pool.var(correction=0),
        "var_after": x.advantages.var(correction=0),
        "nonzero_before": (pool != 0).float().mean(),
        "nonzero_kept": (x.advantages != 0).float().mean(),
        "positive_kept": (x.advantages > 0).float().mean(),
        "token_use": keep.sum() / generated,
        "entropy_kept": entropy[keep].mean(),
        "entropy_dropped": entropy[mask & ~keep].mean(),
    }
    for name, value in expected.items():
        assert entry[f"d3s/{name}"] == pytest.approx(float(value), rel=1e-4), name
    assert entry["d3s/var_after"] == pytest.approx(brute_force(pool, 4), rel=1e-4)


def test_the_schedule_runs_with_the_training(tmp_path):
    log = train(tmp_path, {"d3s": {"sample_start": 0.25, "sample_end": 1}}, max_steps=4).state.log_history[:4]
    assert [entry["d3s/N"] for entry in log] == [
        2,
        4,
        5,
        6,
    ]  # 8 (0.25 + 0.75 k / 4) = 2, 3.5, 5, 6.5; round half to even
    assert [entry["d3s/K"] for entry in log] == pytest.approx([0.2, 0.275, 0.35, 0.425])


def test_resume_inside_a_window_equals_not_stopping(tmp_path):
    settings = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    whole = train(tmp_path, {"d3s": HALF}, **settings)
    resumed = train(tmp_path, {"d3s": HALF}, resume=str(tmp_path / "checkpoint-1"), **settings)
    assert_equal(weights(whole), weights(resumed))


def test_the_seed_decides_ties_in_training(tmp_path, monkeypatch):
    """Binary rewards tie; the same seed keeps the same rows, over 3 steps another seed does not."""
    seen = spied(monkeypatch)

    def alternating(completions, **kwargs):
        return [float(i % 2) for i in range(len(completions))]

    rows = {}
    for label, seed in (("first", 0), ("again", 0), ("other", 1)):
        seen.clear()
        args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path)), methods={"d3s": HALF | {"seed": seed}})
        trl_ext.GRPOTrainer(tiny_path(), alternating, args, prompts()).train()
        rows[label] = sorted(tuple(row) for row in seen[0].completion_ids.tolist())
    assert rows["first"] == rows["again"] != rows["other"]


@dataclass(frozen=True)
class EntropyBonus(Method):
    """The mean over kept rows of their mean entropy, with `row_scale` as the contract says."""

    name = "bonus"
    title = paper = "none"

    def aux_loss(self, x):
        mean = ((x.entropy * x.mask).sum(1) / x.mask.sum(1).clamp(min=1)).mean() * x.row_scale
        x.metrics.mean("H", mean)
        return -mean


@pytest.mark.parametrize("size", [4, 1])
def test_a_mean_over_rows_beside_it_averages_over_kept_rows(tmp_path, monkeypatch, size):
    """It does not count fillers: the same loss however the rows are split."""
    monkeypatch.setitem(METHODS, "bonus", EntropyBonus)
    methods = {"d3s": HALF | {"scope": "generation_batch"}, "bonus": {}}
    kwargs = {"max_steps": 1, "loss_type": "grpo", "optim": "sgd", "learning_rate": 0.1}
    one = train(tmp_path, methods, **kwargs)
    kwargs |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    many = train(tmp_path, methods, **kwargs)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(many)[name], value, rtol=1e-3, atol=1e-6)
    found = [trainer.state.log_history[0]["bonus/H"] for trainer in (one, many)]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("sample_stage, kept", [("intra", 4), ("intra+cross", 2)])
def test_stages_inside_groups(tmp_path, sample_stage, kept):
    settings = {"sample_stage": sample_stage, "group_keep": 2, "sample_start": 0.25, "sample_end": 0.25}
    assert train(tmp_path, {"d3s": settings}, max_steps=1).state.log_history[0]["d3s/N"] == kept


RAMP = torch.tensor([1.0, 9.0, 1.0, 9.0, 1.0, 9.0])


@dataclass(frozen=True)
class Advantages(Method):
    name = "advantages"
    title = paper = "none"

    def token_advantages(self, advantages, x):
        return advantages.unsqueeze(1) * RAMP[: x.mask.size(1)] + 0.1


@dataclass(frozen=True)
class Weights(Method):
    name = "weights"
    title = paper = "none"

    def token_weights(self, weights, x):
        return weights * RAMP[: x.mask.size(1)]


@pytest.mark.parametrize(
    "order", [("advantages", "d3s"), ("d3s", "advantages"), ("weights", "d3s"), ("d3s", "weights")], ids="+".join
)
@pytest.mark.parametrize("normalizer", ["kept", "original"])
def test_ranks_by_final_advantages_and_by_weights_before_it(tmp_path, monkeypatch, order, normalizer):
    """No order puts loss back on a dropped token; weights of a method named after it only scale the kept ones."""
    seen = spied(monkeypatch)
    for cls in (Advantages, Weights):
        monkeypatch.setitem(METHODS, cls.name, cls)
    d3s = NEUTRAL | {"token_start": 0.5, "token_end": 0.5, "normalizer": normalizer}
    train(tmp_path, {name: d3s if name == "d3s" else {} for name in order}, max_steps=1, loss_type="grpo")
    (x,) = seen
    ramp = RAMP[: x.mask.size(1)]
    final = x.advantages.unsqueeze(1) * ramp + (0.1 if "advantages" in order else 0.0)
    ranked = x.advantages.unsqueeze(1).expand_as(final) if order == ("d3s", "weights") else final
    keys = (ranked.abs() * x.entropy.detach()).masked_fill(x.mask == 0, -1)
    count = -(-int(x.mask.sum()) // 2)
    keep = keys >= keys.flatten().sort(descending=True).values[count - 1]
    assert int(keep.sum()) == count
    kept = (keep if normalizer == "kept" else x.mask).sum(1, keepdim=True).clamp(min=1)
    expected = torch.where(keep, -final / (8 * kept), 0.0)
    torch.testing.assert_close(x.logps.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings, kwargs, words",
    [
        ({}, {"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ({}, {"loss_type": "dr_grpo"}, "normalizer: original"),
        ({"sample_stage": "intra+cross"}, {}, "group_keep"),
        ({}, {"loss_type": "bnpo"}, "loss_type: grpo or dapo"),
        ({}, {"entropy_coef": 0.01}, "leave entropy_coef at 0"),
        ({"group_keep": 2}, {}, "sample_stage: intra"),
        ({"sample_stage": "intra", "group_keep": 5}, {}, "more than num_generations 4"),
    ],
)
def test_clashes_name_the_flag(tmp_path, settings, kwargs, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **kwargs), methods={"d3s": settings})


def test_without_the_sample_stage_there_are_no_fillers_to_refuse(tmp_path):
    tokens = {"d3s": {"sample_start": 1, "sample_end": 1}}
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), loss_type="bnpo", entropy_coef=0.01), methods=tokens)
    assert args.methods == tokens


def test_sequence_ratio_is_allowed(tmp_path):
    trainer = train(tmp_path, {"d3s": HALF}, max_steps=1, importance_sampling_level="sequence", loss_type="grpo")
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_recipe_has_the_cards_recommendation_and_one_pool_per_step():
    recipe = load_recipe("d3s_qwen2.5_math_1.5b", ["--use_cpu", "true"])
    (d3s,), args = recipe.plan.methods, recipe.training_args
    assert (d3s.sample_start, d3s.sample_end, d3s.token_start, d3s.token_end) == (0.25, 0.5, 0.2, 0.5)
    assert args.steps_per_generation == args.gradient_accumulation_steps and args.per_device_train_batch_size >= 4
