"""real: the card's numbers and bounds, the direct form against the two-pass form, labels, splits, restart, what it costs."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import trl

import trl_ext
from tests.methods.groups import made_group
from tests.methods.spy import spied
from tests.methods.training import make, train
from tests.tiny import assert_equal, grpo_args, prompts, tiny_path, weights
from trl_ext.method import Metrics, RunShape, StepRows
from trl_ext.methods.grpo.real import Real, group_losses, token_mean, two_pass
from trl_ext.plan import PlanError
from trl_ext.recipe import load_recipe

S = torch.tensor([[0.2, -0.1, 0.3, -0.4]])
Y = torch.tensor([[1.0, 1.0, 0.0, 0.0]])


def direct(scores, labels, tau, form="anchored"):
    """L_group of one group as the card writes it, in float64 with gradient; NaN-free only for small |s|."""
    wrong = sum((torch.exp(s / tau) for s, y in zip(scores, labels, strict=True) if y == 0), torch.tensor(0.0))
    right = sum((torch.exp(-s / tau) for s, y in zip(scores, labels, strict=True) if y == 1), torch.tensor(0.0))
    if wrong == 0 or right == 0:
        return 0.0 * sum(scores)
    if form == "product":
        return torch.log(1 + wrong * right)
    if form == "bce":
        terms = [
            torch.nn.functional.binary_cross_entropy_with_logits(s / tau, y.double())
            for s, y in zip(scores, labels, strict=True)
            if y >= 0
        ]
        return sum(terms)
    return torch.log(1 + right) + torch.log(1 + wrong)


# The maths


def test_worked_example():
    parts, slopes = group_losses(S, Y, 0.5)
    assert parts.flatten().tolist() == pytest.approx([1.061852, 1.185233], abs=1e-6)
    assert parts.sum().item() == pytest.approx(2.247085, abs=1e-6)
    assert slopes[0].tolist() == pytest.approx([-0.463613, -0.844758, 1.113953, 0.274697], abs=1e-6)


def test_an_all_correct_group_counts_in_the_mean():
    parts, slopes = group_losses(S.repeat(2, 1), torch.cat([Y, torch.ones(1, 4)]), 0.5)
    assert parts.sum(1).mean().item() == pytest.approx(1.123543, abs=1e-6)
    assert slopes[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("right", [1, 2, 3, 4, 7])
def test_on_policy(right):
    """s = 0: log(1 + n+) + log(1 + n-), and each side's 1 / tau shared with the anchor."""
    labels = (torch.arange(8) < right).float().unsqueeze(0)
    parts, slopes = group_losses(torch.zeros(1, 8), labels, 0.5)
    wrong = 8 - right
    assert parts.sum().item() == pytest.approx(math.log(1 + right) + math.log(1 + wrong), abs=1e-6)
    assert slopes[0, :right].tolist() == pytest.approx([-2 / (1 + right)] * right, abs=1e-6)
    assert slopes[0, right:].tolist() == pytest.approx([2 / (1 + wrong)] * wrong, abs=1e-6)
    if right == 4:
        assert parts.sum().item() == pytest.approx(3.218876, abs=1e-6)


def test_on_policy_of_the_card():
    parts, slopes = group_losses(torch.zeros(1, 4), Y, 0.5)
    assert parts.sum().item() == pytest.approx(2.197225, abs=1e-6)
    assert slopes[0].tolist() == pytest.approx([-0.666667, -0.666667, 0.666667, 0.666667], abs=1e-6)


def test_ablations():
    """BCE 0.679936 is a mean over the 4 rollouts; product style has no anchors."""
    assert group_losses(S, Y, 0.5, "bce")[0].sum().item() / 4 == pytest.approx(0.679936, abs=1e-6)
    assert group_losses(S, Y, 0.5, "product")[0].item() == pytest.approx(1.667131, abs=1e-6)


@pytest.mark.parametrize("form", ["anchored", "product", "bce"])
@pytest.mark.parametrize("labels", [[1, 1, 0, 0], [0, 1, 0, 0], [1, -1, 0, 1], [1, 1, 1, 1], [0, 0, -1, 0], [-1] * 4])
def test_derivative_is_that_of_the_written_loss(form, labels):
    s = torch.tensor([0.7, -0.3, 0.1, -1.2], dtype=torch.float64, requires_grad=True)
    loss = direct(list(s), torch.tensor(labels), 0.3, form)
    loss.backward()
    parts, slopes = group_losses(s.detach().float().unsqueeze(0), torch.tensor([labels]), 0.3, form)
    assert parts.sum().item() == pytest.approx(loss.item(), abs=1e-5)
    assert slopes[0].tolist() == pytest.approx(s.grad.tolist(), abs=1e-5)


@pytest.mark.parametrize("form", ["anchored", "product", "bce"])
def test_bounded_and_finite_far_out(form):
    s = torch.tensor([[50.0, -50, 50, -50], [-50, 50, -50, 50]])
    parts, slopes = group_losses(s, Y.repeat(2, 1), 0.5, form)
    assert bool(torch.isfinite(parts).all()) and bool(torch.isfinite(slopes).all())
    assert float(slopes.abs().max()) <= 2.0


def test_weights_are_monotone():
    """A right rollout's pull shrinks as its logit grows; a wrong one's push grows, and stops at 1 / tau."""
    found = []
    for s in torch.linspace(-4, 4, 33):
        _, slopes = group_losses(torch.tensor([[float(s), 0.0, float(s), 0.0]]), Y, 0.5)
        found.append((-slopes[0, 0].item(), slopes[0, 2].item()))
    pulls, pushes = zip(*found, strict=True)
    assert all(a > b for a, b in itertools.pairwise(pulls))
    assert all(a < b for a, b in itertools.pairwise(pushes))
    assert max(pulls) < 2 and max(pushes) < 2 and pushes[-1] == pytest.approx(2, abs=2e-3)


def test_order_does_not_matter_and_the_unlabelled_are_not_there():
    order = torch.tensor([2, 0, 3, 1])
    parts, slopes = group_losses(S, Y, 0.5)
    again, moved = group_losses(S[:, order], Y[:, order], 0.5)
    torch.testing.assert_close(again, parts)
    torch.testing.assert_close(moved, slopes[:, order])
    more, wide = group_losses(torch.cat([S, S], 1), torch.cat([Y, -torch.ones(1, 4)], 1), 0.5)
    torch.testing.assert_close(more, parts)
    torch.testing.assert_close(wide, torch.cat([slopes, torch.zeros(1, 4)], 1))


def test_length_does_not_matter():
    """Equal mean log-ratios of 2 and of 6 tokens are the same logit; a row without tokens has 0, not NaN."""
    values, mask = torch.full((3, 6), 0.3), torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6, [0] * 6])
    assert token_mean(values, mask).tolist() == pytest.approx([0.3, 0.3, 0])


def test_two_pass_has_value_and_gradient():
    s = torch.tensor([0.1, -0.7], requires_grad=True)
    loss = two_pass(torch.tensor([3.0, 5.0]), torch.tensor([2.0, -4.0]), s)
    loss.backward()
    assert loss.item() == 4.0 and s.grad.tolist() == [1.0, -2.0]


# Labels and metrics, by hand


def group(rewards, names=("format", "correct"), weights=(0.5, 1.0)):
    return made_group(rewards, names, weights)


NAN = math.nan


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [[1, 1], [0, -1]]),  # sums 0.5, 1, 0.4 and nothing
        ({"reward": "correct"}, [[0, 1], [-1, -1]]),
        ({"reward": "format", "threshold": 0.9}, [[1, 0], [0, -1]]),
    ],
)
def test_labels(settings, expected):
    """The weighted sum of all, or one reward as it is; what nobody scored is neither right nor wrong."""
    method = Real(**settings)
    method.observe(group([[[1.0, 0.0], [0.0, 1.0]], [[0.8, NAN], [NAN, NAN]]]))
    assert method.state["labels"].tolist() == expected


def rollout(mask):
    return SimpleNamespace(mask=torch.tensor(mask), gather=lambda values: (values, slice(None)))


def test_rollouts_without_loss_tokens_leave_both_sets():
    method = Real(form="bce")
    method.observe(group([[[1.0], [0.0], [0.0]], [[1.0], [1.0], [0.0]]], ("r",), (1.0,)))
    streams = method.streams(rollout([[1, 1], [1, 0], [0, 0], [1, 1], [1, 0], [0, 0]]))
    assert streams["label"].tolist() == [1, 0, -1, 1, 1, -1]
    assert streams["scale"].tolist() == [3.0] * 6  # 6 rows, 2 rollouts in the one group that holds both labels


def step_rows(scores, labels, scale=4.0):
    return StepRows(
        mask=torch.ones(8, 1),
        drift=lambda: torch.tensor(scores).view(8, 1),
        logps=lambda: None,
        ref_logps=None,
        streams={"label": torch.tensor(labels), "scale": torch.full((8,), scale)},
        by_group=lambda values: values.view(2, 4),
        own=lambda table: table.flatten(),
        step=0,
        run=RunShape(10, 4, 1.0),
        metrics=Metrics(),
    )


def test_metrics_on_the_worked_example():
    """Group 2 has no wrong rollout: it shows in the share of valid groups only."""
    rows = step_rows([0.2, -0.1, 0.3, -0.4, 3.0, 3, 3, 3], [1.0, 1, 0, 0, 1, 1, 1, 1])
    found = Real().coupled(rows)
    assert found["value"].tolist() == pytest.approx([2.247085] * 4 + [0] * 4, abs=1e-6)
    assert found["slope"][2].item() == pytest.approx(4 * 1.113953, abs=1e-5)
    logged = {key: float(total[0] / total[1]) for key, total in rows.metrics.totals.items()}
    assert logged == pytest.approx(
        {
            "valid_group_fraction": 0.5,
            "s_positive": 0.05,
            "s_negative": -0.05,
            "margin": 0.1,
            "weight_min": 0.274697,
            "weight_max": 1.113953,
            "loss_positive": 1.061852,
            "loss_negative": 1.185233,
        },
        abs=1e-6,
    )


def test_no_valid_group():
    rows = step_rows([0.3] * 8, [1.0] * 4 + [-1.0] * 4)
    found = Real().coupled(rows)
    assert found["value"].tolist() == [0.0] * 8 and found["slope"].tolist() == [0.0] * 8
    assert all(bool(torch.isfinite(total).all()) for total in rows.metrics.totals.values())


# In the trainer


def parity(completions, **kwargs):
    """0 or 1 at random, as a verifier's verdict on a random model's text."""
    return [float(sum(map(ord, c[0]["content"])) % 2) for c in completions]


def reference(x, tau=0.5, form="anchored"):
    """The loss of a micro-batch of whole groups in its direct form, with gradient to x.logps."""
    logps = x.logps.detach().clone().requires_grad_()
    old = logps.detach() if x.old_logps is None else x.old_logps
    s = ((logps - old) * x.mask).sum(1) / x.mask.sum(1).clamp(min=1)
    ids, labels = x.streams["groups/id"], x.streams["real/label"]
    losses = [direct(list(s[ids == i]), labels[ids == i], tau, form) for i in ids.unique()]
    if form == "bce":
        counted = sum(len(labels[ids == i]) for i in ids.unique() if {0.0, 1.0} <= set(labels[ids == i].tolist()))
        loss = sum(losses) / max(1, counted)
    else:
        loss = sum(losses) / len(losses)
    loss.backward()
    return loss.detach(), logps.grad


@pytest.mark.parametrize("form", ["anchored", "product", "bce"])
def test_two_pass_is_the_direct_form(tmp_path, monkeypatch, form):
    """On policy, and on the second pass over a rollout, where s is not 0."""
    seen = spied(monkeypatch)
    trainer = train(tmp_path, {"real": {"form": form}}, rewards=parity, num_iterations=2, max_steps=4)
    logged = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    drifted = 0
    for x, loss in zip(seen, logged, strict=True):
        expected, gradient = reference(x, form=form)
        assert loss == pytest.approx(float(expected), abs=2e-4)  # TRL rounds to 4 digits
        torch.testing.assert_close(x.logps.grad, gradient, rtol=1e-4, atol=1e-6)
        drifted += bool((x.logps.detach() - x.old_logps).abs().max() > 1e-3) and bool(gradient.abs().max() > 1e-3)
    assert drifted


def test_labels_reach_their_rows(tmp_path, monkeypatch):
    seen = spied(monkeypatch)
    trainer = train(tmp_path, "real", rewards=parity, max_steps=2)
    for x in seen:
        texts = trainer.processing_class.batch_decode(x.completion_ids, skip_special_tokens=True)
        assert x.streams["real/label"].tolist() == parity([[{"content": text}] for text in texts])


def test_one_step_is_reinforce(tmp_path, monkeypatch):
    """Weights (1/tau) / (1 + n) on length-normalised log-probs, averaged over groups; TRL's advantages are not in it."""
    seen = spied(monkeypatch)
    train(tmp_path, {"real": {"tau": 2.0}}, rewards=parity, max_steps=1)
    (x,) = seen
    ids, labels, mask = x.streams["groups/id"], x.streams["real/label"], x.mask.float()
    same = (ids.unsqueeze(1) == ids) & (labels.unsqueeze(1) == labels)
    other = (ids.unsqueeze(1) == ids) & (labels.unsqueeze(1) != labels)
    advantage = (2 * labels - 1) * 0.5 / (1 + same.sum(1)) * other.any(1)
    assert bool(advantage.any())
    torch.testing.assert_close(x.logps.grad, -advantage.unsqueeze(1) * mask / mask.sum(1, keepdim=True) / 2)


def test_scaling_and_shifting_rewards_does_not_matter(tmp_path):
    def scaled(completions, **kwargs):
        return [7 * r - 5 for r in parity(completions)]

    one = train(tmp_path, "real", rewards=parity)
    other = train(tmp_path, {"real": {"threshold": 1.9}}, rewards=scaled)
    assert_equal(weights(one), weights(other))


def test_groups_of_one_label_leave_the_kl_term(tmp_path):
    """All right: TRL with advantages of 0 and its KL term."""

    def praise(completions, **kwargs):
        return [1.0] * len(completions)

    kwargs = {"beta": 0.1, "num_iterations": 2, "loss_type": "grpo"}
    ours = train(tmp_path, "real", rewards=praise, **kwargs)
    stock = trl.GRPOTrainer(tiny_path(), praise, trl.GRPOConfig(**grpo_args(str(tmp_path), **kwargs)), prompts())
    stock.train()
    assert_equal(weights(ours), weights(stock))
    assert all("real/margin" not in entry for entry in ours.state.log_history)
    assert ours.state.log_history[0]["real/valid_group_fraction"] == 0


SPLITS = {
    "groups in micro-batches": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "groups in steps": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
}


@pytest.mark.parametrize("form", ["anchored", "bce"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=list(SPLITS))
def test_micro_batches_do_not_matter(tmp_path, split, form):
    kwargs = {"optim": "sgd", "learning_rate": 0.5, "num_iterations": 3, "max_steps": 6, "rewards": parity}
    whole = train(tmp_path, {"real": {"form": form}}, **kwargs)
    cut = train(tmp_path, {"real": {"form": form}}, **kwargs, **split)
    start = weights(make(tmp_path, "real"))
    assert max(float((value - start[name]).abs().max()) for name, value in weights(whole).items()) > 1e-3
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], value, rtol=1e-3, atol=2e-5)
    for one, other in zip(whole.state.log_history, cut.state.log_history, strict=True):
        for key in (k for k in one if k.startswith("real/")):
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key


def test_torn_groups_have_the_slopes_of_whole_ones(tmp_path, monkeypatch):
    """Two rows per optimizer step: at the last of them the logits are those of the current weights, for all rows."""
    seen = spied(monkeypatch)
    kwargs = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "steps_per_generation": 4}
    trainer = make(tmp_path, "real", rewards=parity, max_steps=4, **kwargs)
    found = []
    original = Real.coupled

    def spy(self, rows):
        found.append((rows.by_group(rows.streams["label"]), rows.by_group(token_mean(rows.drift(), rows.mask))))
        return original(self, rows)

    monkeypatch.setattr(Real, "coupled", spy)
    trainer.train()
    assert len(found) == 4
    for (labels, scores), x in zip(found, seen, strict=True):
        own = token_mean(x.logps.detach() - x.old_logps, x.mask)
        places = x.streams["groups/id"], x.streams["groups/place"]
        torch.testing.assert_close(scores[places], own, rtol=1e-3, atol=1e-5)
        _, slopes = group_losses(scores, labels, 0.5)
        torch.testing.assert_close(x.streams["real/slope"], 4 * slopes[places], rtol=1e-3, atol=1e-5)
    assert not bool(found[0][1].any()) and bool(found[3][1].any())


@pytest.mark.parametrize("size", [8, 2])
def test_resume_inside_a_window_equals_not_stopping(tmp_path, size):
    settings = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 6, "rewards": parity}
    settings |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    whole = train(tmp_path, "real", **settings)
    resumed = train(tmp_path, "real", resume=str(tmp_path / "checkpoint-3"), **settings)
    assert_equal(weights(whole), weights(resumed))


def truncating(tmp_path, methods):
    """A trainer whose completions are fixed: of the second prompt's four, two never end."""
    trainer = make(tmp_path, methods, rewards=parity, max_steps=1, mask_truncated_completions=True)
    end = trainer.processing_class.eos_token_id
    texts = ["a", "b", "aa", "ab", "a", "bbbbbb", "c", "abbbbb"]
    ids = [trainer.processing_class(text)["input_ids"] for text in texts]
    trainer._generate_single_turn = lambda *a, **k: ([row + [end] * (len(row) < 6) for row in ids], None)
    return trainer


def test_truncated_rollouts_are_in_neither_set(tmp_path, monkeypatch):
    """Parities 1 0 0 1 | 1 (0) 1 (1): without the truncated ones the second group has one label only."""
    seen = spied(monkeypatch)
    trainer = truncating(tmp_path, "real")
    trainer.train()
    (x,) = seen
    table = torch.zeros(2, 4)
    table[x.streams["groups/id"], x.streams["groups/place"]] = x.streams["real/label"]
    assert table.tolist() == [[1, 0, 0, 1], [1, -1, 1, -1]]
    assert trainer.state.log_history[0]["real/valid_group_fraction"] == 0.5
    assert trainer.state.log_history[0]["loss"] == pytest.approx(2 * math.log(3) / 2, abs=1e-4)


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({}, 3),  # the loss's own
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 12),  # torn, but drift is 0
        ({"num_iterations": 3}, 1 + 3),  # TRL's old log-probs, once
        # Two later passes over torn groups: four micro-batches each
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_iterations": 3}, 1 + 12 + 8),
    ],
)
def test_forwards(tmp_path, monkeypatch, kwargs, expected):
    """Three optimizer steps cost what `cost` says."""
    count, original = [], trl.GRPOTrainer._get_per_token_logps_and_entropies
    monkeypatch.setattr(
        trl.GRPOTrainer,
        "_get_per_token_logps_and_entropies",
        lambda *a, **k: count.append(1) or original(*a, **k),
    )
    train(tmp_path, "real", rewards=parity, **kwargs)
    assert len(count) == expected


# Settings


@pytest.mark.parametrize(
    "settings, kwargs, words",
    [
        ({}, {"epsilon": 0.1}, "leave it at 0.2"),
        ({}, {"epsilon_high": 0.28}, "epsilon_high"),
        ({}, {"importance_sampling_level": "sequence"}, "leave it at token"),
        ({}, {"loss_type": "cispo"}, "set loss_type: dapo"),
        ({}, {"scale_rewards": "none"}, "leave it at group"),
        ({}, {"multi_objective_aggregation": "normalize_then_sum"}, "leave it at sum_then_normalize"),
        ({}, {"top_entropy_quantile": 0.5}, "leave it at 1.0"),
        ({"tau": 0}, {}, "tau: 0.0 must be > 0"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, settings, kwargs, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **kwargs), methods={"real": settings})


def test_an_unknown_reward_is_refused(tmp_path):
    with pytest.raises(PlanError, match="did you mean 'parity'"):
        make(tmp_path, {"real": {"reward": "partiy"}}, rewards=parity)


def test_recipe_has_the_papers_numbers():
    """128 prompts x 8 in four updates of 32 prompts, one pass."""
    recipe = load_recipe("real_r1_distill_1.5b", [] if torch.cuda.is_available() else ["--use_cpu", "true"])
    args = recipe.training_args
    assert recipe.plan.methods == (Real(),)
    assert (args.num_generations, args.temperature, args.beta, args.num_iterations) == (8, 0.6, 0.0, 1)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32 * 8
    assert args.per_device_train_batch_size % args.num_generations == 0  # groups fit a micro-batch: nothing extra
