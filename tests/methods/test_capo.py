"""capo: the card's worked examples, closed forms and limits, slow references, state, and training. Card: capo."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import trl_ext
from tests.methods.spy import spied
from tests.parity.test_grpo import assert_same
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext.data import load_data
from trl_ext.forward import Head
from trl_ext.method import HIDDEN, Method, Setup
from trl_ext.methods import METHODS
from trl_ext.methods.grpo.capo import (
    Capo,
    Moments,
    adam_direction,
    predicted_shifts,
    rejected,
    responses,
    row_means,
    top_k_view,
)
from trl_ext.plan import PlanError, make_plan
from trl_ext.recipe import load_recipe

W = torch.tensor([[0.2, -0.1], [0.0, 0.3], [-0.4, 0.1]], dtype=torch.float64)
H = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
SAMPLED, A = torch.tensor([1]), torch.tensor([1.5], dtype=torch.float64)
M = torch.tensor([[0.05, 0.1], [0.2, 0.4], [-0.1, -0.3]], dtype=torch.float64)
Q = torch.tensor([[0.01, 0.02], [0.04, 0.09], [0.01, 0.05]], dtype=torch.float64)
BETAS, EPS = (0.9, 0.999), 1e-8


def alone(values):
    """`gather` of one process."""
    return values, slice(None)


def head(weight=W, temperature=1.0):
    return Head(weight, None, temperature, None, 1.0, False)


def worked(lr):
    """ids, pi, v sorted by id, and m_H, m_F under SGD."""
    ids, probs, v = top_k_view(head(), H, SAMPLED, 50)
    order = ids.argsort(-1)
    ids, probs, v = (t.gather(1, order) for t in (ids, probs.double(), v.double()))
    u = A.unsqueeze(1) * v * H.square().sum()
    return ids, probs, v, u, *predicted_shifts(v, probs, u, A, lr)


def exact(change, lr):
    """A (pi_new(a) / pi_old(a) - 1) after W += lr * change."""
    old, new = ((weight @ H[0]).softmax(0)[1] for weight in (W, W + lr * change))
    return float(A * (new / old - 1))


# Worked example


def test_worked_example_sgd():
    ids, probs, v, u, m_h, m_f = worked(0.1)
    assert ids.tolist() == [[0, 1, 2]]
    assert probs[0].tolist() == pytest.approx([0.274661, 0.500465, 0.224874], abs=1e-6)
    assert v[0].tolist() == pytest.approx([-0.274661, 0.499535, -0.224874], abs=1e-6)
    assert (v * u).sum().item() == pytest.approx(2.816564, abs=1e-6)
    assert (m_h.item(), m_f.item()) == pytest.approx((0.422244, 0.039665), abs=1e-6)
    second_order = 2 * (m_h.item() - 0.1 * 1.5 * 2.816564) / 0.1**2
    assert second_order == pytest.approx(-0.048027, abs=1e-4)
    m_h, m_f = worked(0.01)[4:]
    assert (m_h.item(), m_f.item()) == pytest.approx((0.042246, 0.000397), abs=1e-6)
    g = A * v[0].unsqueeze(1) * H
    assert exact(g, 0.1) == pytest.approx(0.411412, abs=1e-6) and exact(g, 0.01) == pytest.approx(0.042235, abs=1e-6)


def test_worked_example_adam():
    _, probs, v, *_ = worked(0.1)
    direction = adam_direction(A * v.unsqueeze(-1) * H.unsqueeze(1), M, Q, 3, BETAS, EPS)[0]
    expected = [[0.006930, 0.009719], [0.232729, 0.308647], [-0.226208, -0.276223]]
    assert direction.flatten().tolist() == pytest.approx([x for row in expected for x in row], abs=1e-6)
    u = (direction @ H[0]).unsqueeze(0)
    m_h, m_f = predicted_shifts(v, probs, u, A, 0.1)
    s = float((v * u).sum())
    assert s == pytest.approx(0.592473, abs=1e-6)
    assert (m_h.item(), m_f.item()) == pytest.approx((0.088265, 0.001755), abs=1e-6)
    assert 2 * (m_h.item() - 0.1 * 1.5 * s) / 0.1**2 == pytest.approx(-0.121173, abs=1e-5)
    # the same through the blocked service, which reads the moments by row id
    moments = Moments(torch.tensor([0, 1, 2]), M, Q, 3)
    torch.testing.assert_close(responses(torch.tensor([[0, 1, 2]]), A * v, H, moments, BETAS, EPS), u)


def test_worked_example_moment_update():
    """The card's two tokens have rows of no common h, so each row stands as a token with K = 1."""
    ids = torch.tensor([[7], [3], [3], [9]])
    hidden = torch.tensor([[1.0, 0.0], [0.5, -0.5], [-0.5, 0.5], [2.0, 1.0]])
    rows, means = row_means(ids, torch.ones(4, 1), hidden, alone)
    assert rows.tolist() == [3, 7, 9] and means.tolist() == [[0, 0], [1, 0], [2, 1]]
    moments = Moments.empty(hidden).updated(rows, means, BETAS)
    assert moments.ids.tolist() == [3, 7, 9] and moments.updates == 1
    assert moments.m[2].tolist() == pytest.approx([0.2, 0.1], abs=1e-7)
    assert moments.q[2].tolist() == pytest.approx([0.004, 0.001], abs=1e-7)


# Closed forms, limits, orders


def random_tokens(n=40, vocabulary=30, k=5, width=6):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, width, generator=draw, dtype=torch.float64)
    hidden = torch.randn(n, width, generator=draw, dtype=torch.float64)
    advantages = torch.randn(n, generator=draw, dtype=torch.float64)
    ids, probs, v = top_k_view(head(weight), hidden, torch.randint(0, vocabulary, (n,), generator=draw), k)
    return weight, hidden, advantages, ids, probs.double(), v.double()


def test_sgd_closed_forms():
    _, h, a, ids, probs, v = random_tokens()
    lr, h2, v2 = 0.3, h.square().sum(1), v.square().sum(1)
    u = responses(ids, a.unsqueeze(1) * v, h, Moments.empty(h), BETAS, EPS)  # no update yet: G = g
    m_h, m_f = predicted_shifts(v, probs, u, a, lr)
    fisher = torch.diag_embed(probs) - probs.unsqueeze(2) * probs.unsqueeze(1)
    vfv = torch.einsum("nk,nkl,nl->n", v, fisher, v)
    torch.testing.assert_close(m_f, 0.5 * lr**2 * a**2 * v2**2 * h2**2)
    torch.testing.assert_close(m_h, lr * a**2 * v2 * h2 + 0.5 * lr**2 * a**3 * h2**2 * (v2**2 - vfv))


@pytest.mark.parametrize("model", ["sgd", "adam"])
def test_taylor_error_is_of_third_order(model):
    """Halving lr divides the error of m_H by about 8."""
    _, probs, v, u, *_ = worked(0.1)
    change = A * v[0].unsqueeze(1) * H
    if model == "adam":
        change = adam_direction(change, M, Q, 3, BETAS, EPS)
        u = (change @ H[0]).unsqueeze(0)
    errors = [exact(change, lr) - predicted_shifts(v, probs, u, A, lr)[0].item() for lr in (4e-3, 2e-3)]
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.05)


def test_no_learning_rate_rejects_nothing():
    _, _, a, _, probs, v = random_tokens()
    m_h, m_f = predicted_shifts(v, probs, a.unsqueeze(1) * v * 9.0, a, 0.0)
    assert not m_h.any() and not m_f.any()
    for symmetric in (True, False):
        assert not torch.stack(rejected(m_h, m_f, 1e-9, 1e-9, symmetric)).any()


def test_no_advantage():
    """SGD predicts nothing; Adam's momentum still moves the policy, but not the objective."""
    _, h, _, ids, probs, v = random_tokens()
    zero = torch.zeros(len(h), dtype=torch.float64)
    moments = Moments(torch.arange(30), torch.ones(30, 6).double(), torch.ones(30, 6).double(), 2)
    for known, moves in ((Moments.empty(h), False), (moments, True)):
        u = responses(ids, zero.unsqueeze(1) * v, h, known, BETAS, EPS)
        m_h, m_f = predicted_shifts(v, probs, u, zero, 0.1)
        assert not m_h.any() and bool(m_f.any()) == moves


def test_kept_sets_shrink_with_the_thresholds():
    m_h, m_f = torch.randn(300), torch.rand(300)
    for symmetric in (True, False):
        before = torch.zeros(300, dtype=torch.bool)
        for tau in (math.inf, 1.0, 0.5, 0.1, 1e-3):
            by_h, by_f = rejected(m_h, m_f, tau, tau / 2, symmetric)
            now = by_h | by_f
            assert bool((now | ~before).all())
            before = now
    by_h, by_f = rejected(torch.tensor([-0.2, 0.0, 0.1, 0.5]), torch.zeros(4), 0.5, 0.0, False)
    assert by_h.tolist() == [True, False, False, True] and not by_f.any()
    assert rejected(torch.tensor([-0.2, 0.5]), torch.ones(2), 0.5, 1.0, True)[0].tolist() == [False, True]
    assert rejected(torch.ones(2), torch.tensor([0.5, 1.0]), 0.0, 1.0, True)[1].tolist() == [False, True]


def test_top_k_view_at_a_temperature():
    """pi is the softmax of the K largest logits / temperature; a sampled token outside them has e = 0."""
    weight, hidden, *_ = random_tokens()
    logits = hidden @ weight.T / 0.7
    sampled = logits.argmin(1)
    ids, probs, v = top_k_view(head(weight, 0.7), hidden, sampled, 5, budget=30 * 7)
    largest = logits.sort(descending=True)
    assert torch.equal(ids, largest.indices[:, :5])
    torch.testing.assert_close(probs.double(), largest.values[:, :5].softmax(1), rtol=1e-6, atol=1e-7)
    assert torch.equal(v, -probs)
    ids, probs, v = top_k_view(head(weight), hidden, ids[:, 2], 99)
    assert ids.shape == (40, 30) and bool((v.sum(1).abs() < 1e-6).all())


def test_blocks_and_unseen_rows():
    """Three tokens at a time equal all at once; rows without moments have m = q = 0. Nothing is written."""
    _, h, a, ids, _, v = random_tokens()
    rows = torch.arange(0, 30, 3)
    moments = Moments(rows, torch.randn(10, 6).double(), torch.rand(10, 6).double(), 4)
    kept = moments.m.clone(), moments.q.clone()
    g = (a.unsqueeze(1) * v).unsqueeze(-1) * h.unsqueeze(1)
    m, q = (torch.zeros(30, 6).double().index_copy(0, rows, known)[ids] for known in kept)
    expected = (adam_direction(g, m, q, 4, BETAS, EPS) * h.unsqueeze(1)).sum(-1)
    for budget in (5 * 6 * 3, 10**9):
        found = responses(ids, a.unsqueeze(1) * v, h, moments, BETAS, EPS, budget)
        torch.testing.assert_close(found, expected)
    assert torch.equal(moments.m, kept[0]) and torch.equal(moments.q, kept[1])
    size = (1 - 0.9) / (1 - 0.9**5) * math.sqrt((1 - 0.999**5) / (1 - 0.999))  # card: |G| of a row never seen
    fresh = adam_direction(*torch.tensor([3.0, 0.0, 0.0]).double(), 4, BETAS, EPS)
    assert fresh.item() == pytest.approx(size, rel=1e-6)


def slow_means(ids, weights, hidden):
    """{row: mean over the tokens that have it}."""
    found: dict = {}
    for n in range(len(ids)):
        for k in range(ids.size(1)):
            found.setdefault(int(ids[n, k]), []).append(weights[n, k] * hidden[n])
    return {row: torch.stack(values).mean(0) for row, values in found.items()}


def test_row_means_and_two_processes():
    _, h, a, ids, _, v = random_tokens()
    w = a.unsqueeze(1) * v
    expected = slow_means(ids, w, h)
    rows, means = row_means(ids, w, h, alone)
    assert rows.tolist() == sorted(expected)
    torch.testing.assert_close(means, torch.stack([expected[int(row)] for row in rows]))
    parts = [slice(0, 13), slice(13, 40), slice(40, 40)]  # the third process kept no token
    sent = [[], [], []]
    for part, said in zip(parts, sent, strict=True):
        row_means(ids[part], w[part], h[part], lambda values, said=said: (said.append(values), (values, None))[1])
    joined = [torch.cat(values) for values in zip(*sent, strict=True)]
    for part in parts:
        answers = iter(joined)
        again = row_means(ids[part], w[part], h[part], lambda values, a=answers: (next(a), None))
        assert torch.equal(again[0], rows)
        torch.testing.assert_close(again[1], means)


def test_moments_of_absent_rows_do_not_decay():
    first = Moments.empty(torch.zeros(1, 2)).updated(torch.tensor([4]), torch.ones(1, 2), BETAS)
    second = first.updated(torch.tensor([1]), torch.full((1, 2), 3.0), BETAS)
    assert second.ids.tolist() == [1, 4] and second.updates == 2
    assert second.m.flatten().tolist() == pytest.approx([0.3, 0.3, 0.1, 0.1])
    third = second.updated(torch.tensor([4]), torch.zeros(1, 2), BETAS)
    assert third.m.flatten().tolist() == pytest.approx([0.3, 0.3, 0.09, 0.09])


# In the trainer


def make(tmp_path, methods, reward=letters_reward, **kwargs):
    settings = {"loss_type": "grpo"} | kwargs
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **settings), methods=methods)
    return trl_ext.GRPOTrainer(tiny_path(), reward, args, prompts())


def train(tmp_path, methods, **kwargs):
    trainer = make(tmp_path, methods, **kwargs)
    trainer.train()
    return trainer


@pytest.fixture(name="spied")
def _spied(monkeypatch):
    return spied(monkeypatch)


@pytest.mark.parametrize("tau", [0, math.inf])
@pytest.mark.parametrize("lora", [False, True])
def test_neutral_settings_are_trl(tmp_path, tau, lora):
    """Both off computes nothing; both infinite computes and logs everything, and trains the same."""
    settings = {"tau_fisher": tau, "tau_hessian": tau}
    assert Capo(**settings).needs() == (frozenset({HIDDEN}) if tau else frozenset())
    assert_same(tmp_path, lora, {"capo": settings}, loss_type="grpo", beta=0.1)


def test_everything_rejected(tmp_path):
    def alternating(completions, **kwargs):
        return [float(i % 2) for i in range(len(completions))]

    trainer = make(tmp_path, {"capo": {"tau_fisher": 1e-30}}, alternating)
    before = weights(trainer)
    trainer.train()
    assert_equal(before, weights(trainer))
    assert [entry["loss"] for entry in trainer.state.log_history[:3]] == [0, 0, 0]
    assert trainer.state.log_history[0]["capo/rejected"] == 1.0
    assert trainer.plan.methods[0].state == {}
    assert "capo/m_F_kept_p99" not in trainer.state.log_history[0]


def reference(x, model, lr, k, moments=None):
    """m_H, m_F of every valid token, one by one, from a stock model's logits and a dict of moments {row: (m, q)}."""
    found = []
    betas, n = (0.9, 0.999), moments["n"] if moments else 0
    ids = torch.cat([x.streams["prompt_ids"], x.completion_ids], 1)
    attention = torch.cat([x.streams["prompt_mask"], x.streams["completion_mask"]], 1)
    with torch.no_grad():
        out = model(ids, attention_mask=attention, output_hidden_states=True)
    start = x.streams["prompt_ids"].size(1) - 1
    for row in range(len(ids)):
        for t in range(x.completion_ids.size(1)):
            if not x.mask[row, t]:
                continue
            h, logits = out.hidden_states[-1][row, start + t], out.logits[row, start + t]
            top = logits.topk(k)
            pi = top.values.softmax(0)
            v = (top.indices == x.completion_ids[row, t]).float() - pi
            a = x.advantages[row]
            g = a * torch.outer(v, h)
            direction = g
            if n:
                pairs = [moments["rows"].get(int(i), (torch.zeros_like(h),) * 2) for i in top.indices]
                m, q = (torch.stack(z) for z in zip(*pairs, strict=True))
                m, q = betas[0] * m + (1 - betas[0]) * g, betas[1] * q + (1 - betas[1]) * g**2
                direction = (m / (1 - betas[0] ** (n + 1))) / ((q / (1 - betas[1] ** (n + 1))).sqrt() + 1e-8)
            u = direction @ h
            s, fisher = v @ u, torch.diag(pi) - torch.outer(pi, pi)
            m_h = lr * (g * direction).sum() + 0.5 * lr**2 * a * (s**2 - u @ fisher @ u)
            found.append((float(m_h), float(0.5 * lr**2 * s**2), top.indices, g))
    return found


def test_masks_metrics_and_state_against_a_slow_reference(tmp_path, spied):
    """Two steps of real training: shifts of each token, what is kept, the log, and the moments after both."""
    settings = {"tau_fisher": 2e-5, "tau_hessian": 5e-2, "top_k": 8}
    (model,) = [AutoModelForCausalLM.from_pretrained(tiny_path())]
    states, weights_then = [], []
    trainer = make(tmp_path, {"capo": settings}, max_steps=2)
    original = trainer.training_step

    def step(*args, **kwargs):
        weights_then.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
        out = original(*args, **kwargs)
        states.append({k: v.clone() for k, v in trainer.plan.methods[0].state.items()})
        return out

    trainer.training_step = step
    trainer.train()
    moments, rates = {"rows": {}, "n": 0}, [0.01, 0.005]  # linear decay over two steps
    for i, x in enumerate(spied):
        model.load_state_dict(weights_then[i])
        assert x.optimizer.learning_rate == pytest.approx(rates[i])
        tokens = reference(x, model, rates[i], 8, moments)
        m_h, m_f = (torch.tensor([token[j] for token in tokens]) for j in (0, 1))
        keep = (m_f < 2e-5) & (m_h.abs() < 5e-2)
        assert 0 < keep.sum() < len(keep)
        assert torch.equal(x.scratch["capo"]["keep"], keep)
        entry = trainer.state.log_history[i]
        found = {
            "rejected": (~keep).float().mean(),
            "rejected_by_m_F": (m_f >= 2e-5).float().mean(),
            "rejected_by_m_H": (m_h.abs() >= 5e-2).float().mean(),
        }
        for name, values in (("m_F", m_f), ("m_H", m_h.abs())):
            for label, some in ((name, values), (f"{name}_kept", values[keep])):
                found |= {f"{label}_mean": some.mean(), f"{label}_max": some.max()}
                found |= {f"{label}_p90": some.quantile(0.9), f"{label}_p99": some.quantile(0.99)}
        for name, value in found.items():
            assert entry[f"capo/{name}"] == pytest.approx(float(value), rel=2e-3, abs=1e-9), name
        batch: dict = {}
        for (_, _, ids, g), kept in zip(tokens, keep, strict=True):
            for row, gradient in zip(ids.tolist(), g, strict=True) if kept else ():
                batch.setdefault(row, []).append(gradient)
        for row, gradients in batch.items():
            mean = torch.stack(gradients).mean(0)
            m, q = moments["rows"].get(row, (torch.zeros(16),) * 2)
            moments["rows"][row] = (0.9 * m + 0.1 * mean, 0.999 * q + 0.001 * mean**2)
        moments["n"] += 1
        assert states[i]["ids"].tolist() == sorted(moments["rows"]) and int(states[i]["updates"]) == i + 1
        for j, key in enumerate(("m", "q")):
            expected = torch.stack([moments["rows"][int(row)][j] for row in states[i]["ids"]])
            torch.testing.assert_close(states[i][key], expected, rtol=1e-3, atol=1e-6)


def test_the_loss_and_its_gradient_are_those_of_the_kept_tokens(tmp_path, spied):
    """d loss / d log-prob = -A / (kept tokens of the row * rows) where kept, 0 elsewhere: the mask is a constant."""
    trainer = train(tmp_path, {"capo": {"tau_fisher": 2e-5, "tau_hessian": 0, "top_k": 8}}, max_steps=1)
    x = spied[0]
    keep = torch.zeros_like(x.mask).masked_scatter(x.mask.bool(), x.scratch["capo"]["keep"].long())
    per_row = keep.sum(1, keepdim=True)
    assert 0 < keep.sum() < x.mask.sum()
    expected = -x.advantages.unsqueeze(1) * keep / (per_row.clamp(min=1) * len(keep))
    torch.testing.assert_close(x.logps.grad, expected, rtol=1e-4, atol=1e-7)
    loss = float((expected * 1.0).sum())  # ratio 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=2e-4)


def test_dr_capo_divides_by_the_length_limit(tmp_path, spied):
    settings = {"preset": "dr_capo", "tau_fisher": 2e-5, "top_k": 8, "tau_hessian": 0}
    train(tmp_path, {"capo": settings}, max_steps=1, loss_type="dr_grpo", scale_rewards="none")
    x = spied[0]
    keep = torch.zeros_like(x.mask).masked_scatter(x.mask.bool(), x.scratch["capo"]["keep"].long())
    expected = -x.advantages.unsqueeze(1) * keep / (6 * len(keep))
    torch.testing.assert_close(x.logps.grad, expected, rtol=1e-4, atol=1e-7)


def test_rein_capo_trains_on_the_reward(tmp_path, spied):
    trainer = train(tmp_path, {"capo": {"preset": "rein_capo"}}, max_steps=1, scale_rewards="none")
    assert sorted(spied[0].advantages.tolist()) == pytest.approx(sorted(trainer._logs["rewards"]["letters_reward"]))


@dataclass(frozen=True)
class Ramp(Method):
    """Token advantages 1, 2, 3, ... times A."""

    name = "ramp"
    title = paper = "none"

    def token_advantages(self, advantages, x):
        return advantages.unsqueeze(1) * torch.arange(1.0, x.mask.size(1) + 1)


def test_token_advantages_of_another_method_are_used(tmp_path, spied, monkeypatch):
    """Named before or after it: the loss has those of both."""
    monkeypatch.setitem(METHODS, "ramp", Ramp)
    sgd = {"optim_model": "sgd", "tau_fisher": math.inf}
    for methods in ({"ramp": {}, "capo": sgd}, {"capo": sgd, "ramp": {}}, {"capo": sgd}):
        train(tmp_path, methods, max_steps=1)
    before, after, alone = (x.scratch["capo"]["weights"] for x in spied)
    position = (torch.arange(1.0, 7.0) * torch.ones(8, 1))[spied[0].mask.bool()].unsqueeze(1)
    torch.testing.assert_close(before, alone * position)
    assert torch.equal(before, after)


@pytest.mark.parametrize("kwargs", [{}, {"steps_per_generation": 2, "num_iterations": 2}], ids=str)
def test_resume_is_exact(tmp_path, kwargs):
    methods = {"capo": {"tau_fisher": 5e-3, "tau_hessian": 0, "top_k": 8}}
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3} | kwargs
    whole = train(tmp_path / "whole", methods, **saving)
    again = make(tmp_path / "again", methods, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))
    assert_equal(weights(whole), weights(again))
    first, second = (trainer.plan.methods[0].state for trainer in (whole, again))
    assert first.keys() == second.keys() == {"ids", "m", "q", "updates"}
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert int(first["updates"]) == 3 and whole.plan.methods[0].summary(str)[0].startswith("moments of ")


def test_accumulation_does_not_matter_without_state(tmp_path):
    """The sgd model has none; Adam's moments move once per loss call (card: decision), so there it does."""
    runs = {}
    for model in ("sgd", "adam"):
        for size in (8, 2):
            split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
            methods = {"capo": {"optim_model": model, "tau_fisher": 2e-3, "tau_hessian": 0, "top_k": 8}}
            trainer = train(tmp_path, methods, max_steps=2, **split)
            runs[model, size] = torch.cat([p.flatten() for p in weights(trainer).values()])
    torch.testing.assert_close(runs["sgd", 8], runs["sgd", 2], rtol=1e-3, atol=2e-5)
    assert int(trainer.plan.methods[0].state["updates"]) == 8  # two steps of four calls
    assert not torch.allclose(runs["adam", 8], runs["adam", 2], rtol=1e-3, atol=2e-5)


def test_rows_without_tokens(tmp_path):
    """Truncated completions are masked; the tiny model hardly ever ends one, so whole micro-batches are empty."""
    trainer = train(
        tmp_path,
        {"capo": {}},
        mask_truncated_completions=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
    )
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history[:3])


@pytest.mark.parametrize(
    "methods, kwargs, words",
    [
        ({}, {"loss_type": "dapo"}, "set loss_type: grpo"),
        ({}, {"loss_type": "grpo", "optim": "sgd"}, "set optim_model: sgd"),
        ({"preset": "dr_capo"}, {"loss_type": "grpo", "scale_rewards": "none"}, "set loss_type: dr_grpo"),
        ({"preset": "dr_capo"}, {"loss_type": "dr_grpo"}, "set scale_rewards: none"),
        ({"preset": "rein_capo"}, {"loss_type": "grpo"}, "set scale_rewards: none"),
        ({"preset": "rein_capo"}, {"loss_type": "grpo", "reward_weights": [2.0]}, "leave reward_weights unset"),
        ({"preset": "dr_capo", "optim_model": "sgd"}, {"loss_type": "dr_grpo"}, "set optim_model: adam"),
        ({"preset": "drcapo"}, {"loss_type": "grpo"}, "did you mean 'dr_capo'"),
        ({"tau_fisher": -1}, {"loss_type": "grpo"}, "must be >= 0"),
    ],
)
def test_bad_settings_name_the_way_out(tmp_path, methods, kwargs, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **kwargs), methods={"capo": methods})


@pytest.mark.parametrize(
    "settings, kwargs",
    [
        ({"tau_fisher": 0, "tau_hessian": 0}, {"loss_type": "dapo", "optim": "sgd"}),
        ({"preset": "dr_capo", "tau_fisher": 0, "tau_hessian": 0}, {"loss_type": "dapo"}),
        ({"tau_fisher": math.inf, "tau_hessian": math.inf}, {"loss_type": "dapo"}),
        ({"tau_fisher": math.inf, "tau_hessian": 0}, {"loss_type": "dapo"}),
    ],
)
def test_what_rejects_nothing_is_not_refused(tmp_path, settings, kwargs):
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **kwargs), methods={"capo": settings})
    assert Capo(**settings).check(Setup(args)) == []


@dataclass(frozen=True)
class Baseline(Method):
    name = "baseline"
    title = paper = "none"

    def group_advantages(self, advantages, group):
        return advantages - 1


@pytest.mark.parametrize("order", [("capo", "baseline"), ("baseline", "capo")], ids="+".join)
def test_rein_capo_comes_before_others_that_change_advantages(monkeypatch, order):
    """Its advantage is the reward itself, so what was done before it would be lost."""
    monkeypatch.setitem(METHODS, "baseline", Baseline)
    assert len(make_plan({name: {} for name in order}).methods) == 2
    rein = {name: {"preset": "rein_capo"} if name == "capo" else {} for name in order}
    if order[0] == "capo":
        assert len(make_plan(rein).methods) == 2
    else:
        with pytest.raises(PlanError, match="name capo before baseline"):
            make_plan(rein)
    with pytest.raises(PlanError, match="both replace the baseline"):
        make_plan({"capo": {"preset": "rein_capo"}, "riskpo": {}})


def test_thresholds_of_the_presets():
    assert [Capo(preset=p).taus for p in ("capo", "dr_capo", "rein_capo")] == [(1e-4, 1e-2), (1e-3, 5e-4), (1e-5, 0.1)]
    (method,) = make_plan({"capo": {"tau_fisher": ".0", "tau_hessian": "inf"}}).methods
    assert method.taus == (0.0, math.inf) and Capo().check(Setup(None)) == []


def test_the_recipe_for_a_real_model(tmp_path):
    """The card's values, a whole batch per step, and the data set's columns (our own text in them)."""
    path = tmp_path / "math.jsonl"
    row = {"problem": "What is 1 + 1?", "level": "Level 1", "type": "Algebra", "solution": "So $\\boxed{2}$."}
    Dataset.from_list([row, row | {"problem": "word " * 600}]).to_json(path)
    device = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    recipe = load_recipe("capo_qwen2.5_math_7b", [*device, "--dataset_name", str(path)])
    args, (method,) = recipe.training_args, recipe.plan.methods
    card = {"epsilon": 0.2, "beta": 0.0, "num_iterations": 1, "num_generations": 8, "max_steps": 100} | {
        "warmup_steps": 10,
        "lr_scheduler_type": "cosine",
        "max_completion_length": 1024,
        "loss_type": "grpo",
    }
    assert {key: getattr(args, key) for key in card} == card
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 96
    assert args.gradient_accumulation_steps == args.steps_per_generation  # one rollout per step
    assert method.taus == pytest.approx((1e-4 * 5**2, 1e-2 * 5)) and (method.top_k, method.optim_model) == (50, "adam")
    data = load_data(recipe, count_tokens=lambda prompt: len(prompt[0]["content"].split()))
    assert (data.rows, data.dropped) == (1, 1)
    replies = [[{"role": "assistant", "content": f"so it is \\boxed{{{n}}}"}] for n in (2, 3)]
    (reward,) = recipe.rewards
    prompt = [data.train[0]["prompt"]] * 2
    assert reward(prompts=prompt, completions=replies, answer=[data.train[0]["answer"]] * 2) == [1.0, 0.0]
