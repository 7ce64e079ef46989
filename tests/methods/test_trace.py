"""TRACE: the card's worked examples, schedule, masks, gradients and composition. Card: trace."""

from __future__ import annotations

import pytest
import torch

import trl_ext
from tests.methods.spy import spied
from tests.tiny import annotate_first, assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext import ops
from trl_ext.forward import Head, per_position
from trl_ext.method import TEACHER
from trl_ext.methods.grpo.trace import ERROR, KEY, Trace, routed_kl, schedule
from trl_ext.plan import PlanError

STUDENT, TEACHER_LOGITS = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.0, 1.0, -1.0]])


def kl_and_grad(kind, student=STUDENT, teacher=TEACHER_LOGITS, **settings):
    logits = student.clone().requires_grad_()
    kl, clipped, agrees = routed_kl(logits.log_softmax(-1), teacher.log_softmax(-1), kind, **settings)
    kl.sum().backward()
    return kl.item(), logits.grad[0].tolist(), clipped.item(), agrees.item()


# Worked example 1


@pytest.mark.parametrize(
    "kind, clip, value, gradient",
    [
        (ERROR, None, 0.811154, [0.359968, -0.293869, -0.066098]),
        (KEY, None, 0.938024, [0.599066, -0.551046, -0.048021]),
        (ERROR, 0.05, -0.183261, [0.065019, -0.078245, 0.013225]),
        (KEY, 0.05, -0.202915, [-0.038228, 0.027947, 0.010281]),
    ],
)
def test_worked_example_1(kind, clip, value, gradient):
    kl, grad, *_ = kl_and_grad(kind, clip=clip)
    assert kl == pytest.approx(value, abs=1e-6)
    assert grad == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize("kind, value", [(ERROR, 0.828725), (KEY, 1.006842)])
def test_worked_example_1_top_2_of_the_student(kind, value):
    """The card's numbers take the student's support for both; for RKL that is the rule (the student's own top-K)."""
    if kind == ERROR:
        kl, *_ = kl_and_grad(kind, top_k=2)
    else:  # both tokens of the student's top 2 are also the teacher's top 2 here
        assert set(STUDENT[0].topk(2).indices.tolist()) == set(TEACHER_LOGITS[0].topk(2).indices.tolist())
        kl, *_ = kl_and_grad(kind, top_k=2)
    assert kl == pytest.approx(value, abs=1e-6)


def test_clip_can_reverse_the_gradient_and_is_reported():
    """Card, provenance: student [0.5, 0.2, 0.1, -0.3], teacher [0.5, 0.9, 0.1, -0.3]."""
    student, teacher = torch.tensor([[0.5, 0.2, 0.1, -0.3]]), torch.tensor([[0.5, 0.9, 0.1, -0.3]])
    _, clipped, _, agrees = kl_and_grad(ERROR, student, teacher, clip=0.05)
    assert clipped == pytest.approx([-0.115987, 0.052148, -0.077748, 0.141587], abs=1e-6)
    _, full, share, _ = kl_and_grad(ERROR, student, teacher)
    assert full == pytest.approx([0.063378, -0.134338, 0.042483, 0.028477], abs=1e-6)
    assert agrees == 0.0 and share == 0.0
    assert kl_and_grad(KEY, clip=0.05)[3] == 0.0  # worked example 1: reversed
    assert kl_and_grad(ERROR, clip=0.05)[3] == 1.0


def test_position_clip_keeps_the_direction():
    kl, grad, share, agrees = kl_and_grad(ERROR, clip=0.05, clip_mode="position")
    _, full, *_ = kl_and_grad(ERROR)
    assert kl == pytest.approx(0.05, abs=1e-6) and share == 1.0 and agrees == 1.0
    assert grad == pytest.approx([g * 0.05 / 0.811154 for g in full], abs=1e-6)
    assert kl_and_grad(ERROR, clip=9.0, clip_mode="position")[0] == pytest.approx(0.811154, abs=1e-6)


def test_no_clip_mode_and_wide_top_k_are_the_full_kl():
    assert kl_and_grad(ERROR, clip=0.05, clip_mode="none", top_k=3)[0] == pytest.approx(0.811154, abs=1e-6)


def test_kl_of_equal_distributions_is_zero():
    for kind in (ERROR, KEY):
        kl, grad, *_ = kl_and_grad(kind, STUDENT, STUDENT)
        assert kl == pytest.approx(0, abs=1e-7) and grad == pytest.approx([0, 0, 0], abs=1e-7)


# Worked example 2, through the aggregation that the method uses


@pytest.mark.parametrize("step, expected", [(0, 0.732506), (25, 0.716253), (41, 0.7)])
def test_worked_example_2(step, expected):
    """T = 5, ratio 1, A = -0.7, token 2 in E with RKL 1.725058: l_t = 0.7 everywhere."""
    method = Trace(action="rkl_error")
    strength = schedule(step, method.weight, method.hold_steps, method.decay_steps)
    kinds = torch.tensor([[0, 0, ERROR, 0, 0]])
    weight = torch.where(kinds > 0, 1 - strength / 0.5, 1.0)
    per_token = 0.7 * weight + strength * 1.725058 * (kinds == ERROR)
    loss = ops.aggregate(
        per_token, torch.ones(1, 5), "grpo", num_items=5, steps_per_generation=1, max_completion_length=5
    )
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_schedule():
    values = [schedule(k, 0.5, 10, 30) for k in range(60)]
    assert [values[k] for k in (0, 9, 10, 25, 40, 41)] == pytest.approx([0.5, 0.5, 0.5, 0.25, 0, 0], abs=1e-9)
    assert values[39] == pytest.approx(0.016667, abs=1e-6)
    assert sum(values) == pytest.approx(12.75, abs=1e-6)
    assert sum(v * v for v in values) == pytest.approx(5.126389, abs=1e-6)
    assert schedule(3, 0.5, 3, 0) == 0 and schedule(2, 0.5, 3, 0) == 0.5


def test_blocks_give_the_same_value_and_gradient():
    """Twelve positions in blocks of two equal one block: values, gradient on hidden states and on the head."""
    weight, hidden = torch.randn(7, 4), torch.randn(12, 4)
    results = []
    for budget in (7 * 2, 10**6):
        w, h = weight.clone().requires_grad_(), hidden.clone().requires_grad_()
        student = (Head(w, None, 0.7, None, 1.0, False), h)
        teacher = (Head(weight.flip(0), None, 0.7, None, 1.0, False), hidden)
        kl = per_position(lambda p, q: routed_kl(p, q, ERROR, 5, 0.05), student, teacher, budget)[0]
        kl.sum().backward()
        results.append((kl.detach(), w.grad, h.grad))
    for small, large in zip(*results, strict=True):
        torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-6)


# In the trainer

SETTINGS = {"action": "both", "annotator": "tests.tiny.annotate_first", "clip": None, "coverage": 0.5}


def half_right(completions, **kwargs):
    """Alternating verdicts, with a little text-dependence so that every group has variance."""
    return [float(i % 2) + 0.01 * len(set(str(c))) for i, c in enumerate(completions)]


def make(tmp_path, methods, reward=half_right, lora=False, **kwargs):
    from peft import LoraConfig

    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), loss_type="grpo", **kwargs), methods=methods)
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None
    return trl_ext.GRPOTrainer(tiny_path(), reward, args, prompts(), peft_config=peft_config)


def test_span_tokens_have_no_policy_gradient_at_full_weight(tmp_path, monkeypatch):
    seen = spied(monkeypatch)
    make(tmp_path, {"trace": SETTINGS}, max_steps=1).train()
    kinds, grad = seen[0].streams["trace/kind"], seen[0].logps.grad
    assert (kinds > 0).any() and bool((grad[kinds > 0] == 0).all()) and bool((grad[kinds == 0] != 0).all())


def test_the_kl_reaches_span_positions_only(tmp_path, monkeypatch):
    """With all advantages 0 the gradient on the hidden states is the KL's alone: not 0 in spans, 0 elsewhere.

    This is the all-correct group of the card, whose dead zone the method keeps alive.
    """
    seen = spied(monkeypatch)
    trainer = make(
        tmp_path, {"trace": SETTINGS}, reward=lambda completions, **kw: [1.0] * len(completions), max_steps=1
    )
    trainer.train()
    kinds, grad = seen[0].streams["trace/kind"], seen[0].policy.hidden.grad
    assert kinds.unique().tolist() == [0, KEY]
    assert bool((grad[kinds == 0] == 0).all()) and bool((grad[kinds > 0].abs().sum(-1) > 0).all())


def test_verdict_decides_the_kind_and_coverage_caps_it(tmp_path, monkeypatch):
    seen = spied(monkeypatch)
    make(tmp_path, {"trace": SETTINGS | {"coverage": 0.25}}, max_steps=1).train()
    kinds, mask = seen[0].streams["trace/kind"], seen[0].mask
    assert bool(((kinds > 0).sum(1) <= (0.25 * mask.sum(1)).floor()).all())
    assert kinds.amax(1).unique().tolist() == [ERROR, KEY]
    assert bool((kinds[mask == 0] == 0).all())


@pytest.mark.parametrize("action, kind", [("rkl_error", ERROR), ("fkl_key", KEY)])
def test_only_the_active_class_is_annotated_or_masked(tmp_path, monkeypatch, action, kind):
    asked = []
    monkeypatch.setattr(
        "tests.tiny.annotate_first", lambda requests: asked.extend(requests) or annotate_first(requests)
    )
    seen = spied(monkeypatch)
    make(tmp_path, {"trace": SETTINGS | {"action": action}}, max_steps=1).train()
    assert set(seen[0].streams["trace/kind"].unique().tolist()) == {0, kind}
    assert {request.correct for request in asked} == {kind == KEY}


def test_mask_inactive_is_the_literal_formula(tmp_path, monkeypatch):
    """Spans of the class without KL lose their policy gradient too, and get no KL."""
    seen = spied(monkeypatch)
    settings = SETTINGS | {"action": "rkl_error", "mask_inactive": True}
    trainer = make(tmp_path, {"trace": settings}, max_steps=1)
    trainer.train()
    kinds, grad = seen[0].streams["trace/kind"], seen[0].logps.grad
    assert (kinds == KEY).any() and bool((grad[kinds == KEY] == 0).all())
    assert "trace/fkl_on_spans" not in trainer.state.log_history[0]


def test_after_the_window_it_asks_nobody(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "tests.tiny.annotate_first", lambda requests: asked.append(len(requests)) or annotate_first(requests)
    )
    trainer = make(tmp_path, {"trace": SETTINGS | {"hold_steps": 1, "decay_steps": 1}}, max_steps=4)
    trainer.train()
    assert len(asked) == 2  # steps 0 and 1: lambda(2) = 0
    assert [entry.get("trace/lambda") for entry in trainer.state.log_history[:4]] == [0.5, 0.5, 0.0, 0.0]


def test_window_end_equals_plain_grpo_from_there(tmp_path):
    """Same weights in, one step after the window: bit-equal to no method."""
    settings = SETTINGS | {"hold_steps": 0, "decay_steps": 0}
    with_trace = make(tmp_path, {"trace": settings})
    with_trace.train()
    without = make(tmp_path, None)  # building a trainer sets the seed, so each is trained right away
    without.train()
    assert_equal(weights(with_trace), weights(without))


@pytest.mark.parametrize("lora", [False, True])
def test_teacher_is_refreshed_and_gets_no_gradient(tmp_path, lora):
    trainer = make(tmp_path, {"trace": SETTINGS | {"sync_every": 2}}, lora=lora, max_steps=3)
    before = weights(trainer)
    trainer.train()
    saved, now = trainer._teacher.values, weights(trainer)
    assert saved.keys() == now.keys() and not any(v.requires_grad for v in saved.values())
    moved = [k for k in now if not torch.equal(saved[k], now[k])]
    assert moved, "the snapshot of step 2 must not follow step 3"
    assert any(not torch.equal(saved[k], before[k]) for k in saved), "it must have been refreshed at step 2"


def test_same_prompt_and_weights_give_zero_kl(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ext.methods.grpo.trace.teacher_messages", lambda prompt, note: prompt)
    trainer = make(tmp_path, {"trace": SETTINGS | {"sync_every": 1}}, max_steps=2)
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        assert entry["trace/rkl_on_spans"] == pytest.approx(0, abs=1e-5)


def test_teacher_prompt_knows_the_label_only(tmp_path, monkeypatch):
    """Rows of one prompt and verdict get the same teacher prompt although their completions differ."""
    seen = spied(monkeypatch)
    make(tmp_path, {"trace": SETTINGS}, max_steps=1).train()
    x = seen[0]
    kinds = x.streams["trace/kind"].amax(1)
    texts = {(int(kind), tuple(row.tolist())) for kind, row in zip(kinds, x.streams["trace/prompt_ids"], strict=True)}
    assert len({tuple(row.tolist()) for row in x.completion_ids}) == 8 and len(texts) == 4  # 2 prompts x 2 verdicts


def test_all_and_random_spans(tmp_path, monkeypatch):
    seen = spied(monkeypatch)
    make(tmp_path, {"trace": SETTINGS | {"spans": "all"}}, max_steps=1).train()
    make(tmp_path, {"trace": SETTINGS | {"spans": "random"}}, max_steps=1).train()
    make(tmp_path, {"trace": SETTINGS}, max_steps=1).train()
    every, random, annotated = (x.streams["trace/kind"] > 0 for x in seen)
    assert bool((every == seen[0].mask.bool()).all())
    assert bool((random.sum(1) == annotated.sum(1)).all()) and not bool((random == annotated).all())


def test_chat_prompt_and_plain_prompt(tmp_path):
    plain = prompts().map(lambda row: {"prompt": row["prompt"][0]["content"]})
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), max_steps=1), methods={"trace": SETTINGS})
    trainer = trl_ext.GRPOTrainer(tiny_path(), half_right, args, plain)
    trainer.train()
    assert trainer.state.log_history[0]["trace/rows_with_span"] == 1.0


def test_policy_annotates_itself(tmp_path):
    """A random model cannot answer: every parse fails, the run goes on as plain GRPO and says so."""
    settings = {"action": "both", "annotator": "policy", "max_annotation_tokens": 4}
    trainer = make(tmp_path, {"trace": settings}, max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["trace/parse_failure_rate"] == 1.0 and entry["trace/span_coverage"] == 0.0


def test_rows_without_a_verdict_are_left_to_grpo(tmp_path, monkeypatch):
    seen = spied(monkeypatch)
    make(
        tmp_path,
        {"trace": SETTINGS},
        reward=lambda completions, **kw: [None, *half_right(completions)[1:]],
        max_steps=1,
    ).train()
    assert (seen[0].streams["trace/kind"].amax(1) > 0).sum() == 7


def test_composes_with_high_entropy(tmp_path, monkeypatch):
    """high_entropy acts on l_t only: the KL at span tokens that it drops stays, their policy gradient is 0."""
    seen = spied(monkeypatch)
    methods = {"trace": SETTINGS | {"hold_steps": 0, "decay_steps": 2}, "high_entropy": {"quantile": 0.5}}
    make(tmp_path, methods, max_steps=2).train()
    x = seen[1]  # step 1: lambda = w0 / 2, so spans keep half of their policy gradient
    kinds, keep = x.streams["trace/kind"] > 0, x.scratch["high_entropy"]["keep"].bool()
    assert bool((x.logps.grad[~keep] == 0).all()) and bool((x.logps.grad[kinds & keep] != 0).all())
    assert bool((x.policy.hidden.grad[kinds & ~keep].abs().sum(-1) > 0).all())


def test_accumulation_does_not_matter(tmp_path):
    one = make(tmp_path, {"trace": SETTINGS}, max_steps=2)
    one.train()
    eight = make(
        tmp_path, {"trace": SETTINGS}, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    eight.train()
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(eight)[name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    "methods, kwargs, words",
    [
        ({"trace": {"action": "rkl_eror"}}, {}, "did you mean 'rkl_error'"),
        ({"trace": {"weigth": 1}}, {}, "did you mean 'weight'"),
        ({"trace": {"coverage": 1.5}}, {}, "must be <= 1"),
        ({"trace": {"sync_every": 0.5}}, {}, "expected int"),
        ({"trace": {"annotator": "nowhere"}}, {}, "module.function"),
        ({"trace": {"annotator": "no.such.module"}}, {}, "annotator"),
        ({"trace": {"annotator": {"url": "x"}}}, {}, "unknown endpoint field"),
        ({"trace": {}}, {"importance_sampling_level": "sequence"}, "importance_sampling_level: token"),
    ],
)
def test_bad_settings_are_refused_with_a_way_out(tmp_path, methods, kwargs, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **kwargs), methods=methods)


def test_several_rewards_need_a_verifier(tmp_path):
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path)), methods={"trace": SETTINGS})
    with pytest.raises(PlanError, match="half_right, letters_reward"):
        trl_ext.GRPOTrainer(tiny_path(), [half_right, letters_reward], args, prompts())
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path)), methods={"trace": SETTINGS | {"verifier": "half"}})
    with pytest.raises(PlanError, match="not a reward of this run"):
        trl_ext.GRPOTrainer(tiny_path(), [half_right, letters_reward], args, prompts())


def test_what_it_needs():
    assert Trace(action="none").needs() == frozenset() == Trace(weight=0).needs()
    assert TEACHER in Trace().needs() and TEACHER not in Trace(sync_every=1).needs()
    assert [Trace().sync_teacher(k, None) for k in (0, 1, 10, 30, 40)] == [True, False, True, True, False]


def test_text_values_are_cast():
    from trl_ext.plan import make_plan

    (method,) = make_plan(
        {"trace": {"weight": "2e-1", "clip": "none", "hold_steps": "3", "mask_inactive": "true"}}
    ).methods
    assert (method.weight, method.clip, method.hold_steps, method.mask_inactive) == (0.2, None, 3, True)


def test_two_owners_of_the_teacher_are_refused(monkeypatch):
    from trl_ext.methods import METHODS
    from trl_ext.plan import make_plan

    class Other(Trace):
        name = "other"

    monkeypatch.setitem(METHODS, "other", Other)
    with pytest.raises(PlanError, match="trace and other both replace the teacher"):
        make_plan(["trace", "other"])
