"""DNO's loss for pairs: the card's numbers, gradient and limits, and training against TRL's own sigmoid loss."""

from __future__ import annotations

import math

import pytest
import torch
import trl
from peft import LoraConfig
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.test_dpo_methods import shaken
from tests.tiny import assert_equal, dpo_args, pairs, tiny_path, tiny_tokenizer, weights
from trl_ext.dpo import DPOConfig, DPOTrainer, _WithColumns
from trl_ext.methods.dpo.dno import Dno, soft_label, soft_loss
from trl_ext.plan import PlanError, make_plan

REWARDS = torch.tensor([2.3, 1.5, 1.45, 0.75]) / 3
RATIOS = torch.tensor([0.4, 0.1, -0.2, -0.5])  # log(pi / pi_t)
ETA = 0.5
SOFT = {"methods": {"dno": {"variant": "soft"}}, "loss_type": "dno"}
HARD = {"methods": "dno", "loss_type": "dno"}


@pytest.mark.parametrize(
    ("first", "second", "z", "d", "soft", "hard"),
    [
        (0, 3, 0.626368, 0.450000, 0.661383, 0.493249),
        (0, 1, 0.566274, 0.150000, 0.686016, 0.620957),
        (1, 2, 0.504167, 0.150000, 0.695332, None),
    ],
)
def test_worked_pairs(first, second, z, d, soft, hard):
    label = soft_label(REWARDS[first] - REWARDS[second])
    distance = ETA * (RATIOS[first] - RATIOS[second])
    assert label.item() == pytest.approx(z, abs=1e-6)
    assert distance.item() == pytest.approx(d, abs=1e-6)
    assert soft_loss(distance, label).item() == pytest.approx(soft, abs=1e-6)
    if hard is not None:
        assert -logsigmoid(distance).item() == pytest.approx(hard, abs=1e-6)


def test_a_larger_scale_is_the_hard_loss():
    label = soft_label(REWARDS[0] - REWARDS[3], 10.0)
    distance = torch.tensor(10 * ETA * 0.9)
    assert label.item() == pytest.approx(0.994329, abs=1e-6)
    assert distance.item() == pytest.approx(4.5)
    assert soft_loss(distance, label).item() == pytest.approx(0.036568, abs=1e-6)
    gaps = [
        abs(
            float(soft_loss(c * distance / 10, soft_label(REWARDS[0] - REWARDS[3], c)) + logsigmoid(c * distance / 10))
        )
        for c in (10.0, 30.0, 100.0)
    ]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-6


def test_labels_of_win_rates_are_bounded():
    """r_t is in [0, 1], so z with c = 1 is in [sigmoid(-1), sigmoid(1)]."""
    ends = soft_label(torch.tensor([-1.0, 1.0]))
    assert ends.tolist() == pytest.approx([0.268941, 0.731059], abs=1e-6)


def test_gradient_and_symmetry():
    distance = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    margin = torch.linspace(-1, 1, 25, dtype=torch.float64, requires_grad=True)
    label = soft_label(margin)
    loss = soft_loss(distance, label)
    loss.sum().backward()
    torch.testing.assert_close(distance.grad, torch.sigmoid(distance.detach()) - label)
    assert margin.grad is None
    torch.testing.assert_close(soft_loss(-distance, soft_label(-margin)), loss)  # y1 and y2 swapped
    at_target = margin.detach().clone().requires_grad_()
    soft_loss(at_target, label).sum().backward()
    assert at_target.grad.abs().max() < 1e-12  # the minimum is at d = r1 - r2
    zero = torch.zeros(25, dtype=torch.float64)
    torch.testing.assert_close(soft_loss(zero, label), zero + math.log(2))  # pi = pi_t, any label
    equal = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    soft_loss(equal, soft_label(torch.zeros(3))).sum().backward()
    assert [math.copysign(1, g) if g else 0 for g in equal.grad.tolist()] == [-1, 0, 1]  # pulled to 0


def data(margin=None, n=12):
    margins = [((i * 5) % 11 - 5) / 5 for i in range(n)] if margin is None else [margin] * n
    return pairs(n).add_column("win_margin", margins)


def make(folder, cls=DPOTrainer, config=DPOConfig, lora=False, margin=None, callbacks=None, evaluation=None, **kwargs):
    return cls(
        tiny_path(),
        args=config(**dpo_args(str(folder), **kwargs)),
        train_dataset=data(margin),
        eval_dataset=evaluation,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None,
    )


def trained(*args, **kwargs):
    trainer = make(*args, **kwargs)
    trainer.train()
    return trainer


EXTRA = pytest.mark.parametrize("extra", [{}, {"lora": True}, {"precompute_ref_log_probs": True}], ids=str)


@EXTRA
def test_hard_labels_are_sigmoid_bit_for_bit(tmp_path, extra):
    ours = trained(tmp_path / "ours", **HARD, **extra)
    theirs = trained(tmp_path / "theirs", trl.DPOTrainer, trl.DPOConfig, loss_type="sigmoid", **extra)
    assert_equal(weights(ours), weights(theirs))
    for mine, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        timing = ("runtime", "per_second")
        assert {k: v for k, v in mine.items() if not any(t in k for t in timing)} == {
            k: v for k, v in other.items() if not any(t in k for t in timing)
        }


def test_sure_labels_are_sigmoid():
    """At z = 1, which no margin reaches with c = 1: the hard loss and its gradient, bit for bit."""
    ours = torch.linspace(-8, 8, 33, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    soft, hard = soft_loss(ours, torch.ones(33)), -logsigmoid(theirs)
    soft.sum().backward(), hard.sum().backward()
    assert torch.equal(soft, hard) and torch.equal(ours.grad, theirs.grad)


@EXTRA
def test_soft_labels_reach_the_loss(tmp_path, extra):
    """The logged loss of the second step is the loss by hand on that step's batch."""
    seen = []

    class Look(DPOTrainer):
        def _own_loss(self, name, x):
            loss = super()._own_loss(name, x)
            seen.append((x, loss.detach()))
            return loss

    trainer = trained(
        tmp_path, Look, **{**SOFT, "methods": {"dno": {"variant": "soft", "reward_scale": 3.0}}}, **extra
    )
    x, loss = seen[1]
    assert len(set(x.columns["win_margin"].tolist())) > 1
    assert set(x.columns["win_margin"].tolist()) <= set(torch.tensor(data()["win_margin"]).tolist())
    gaps = ((x.chosen - x.ref_chosen) - (x.rejected - x.ref_rejected)).tolist()
    expected, errors = [], []
    for i in range(4):
        z, d = 1 / (1 + math.exp(-3 * float(x.columns["win_margin"][i]))), 3 * 0.2 * gaps[i]
        assert abs(d) > 1e-6
        expected.append(-z * math.log(1 / (1 + math.exp(-d))) - (1 - z) * math.log(1 / (1 + math.exp(d))))
        errors.append(1 / (1 + math.exp(-d)) - z)
    assert loss.tolist() == pytest.approx(expected, abs=1e-5)
    log = [entry for entry in trainer.state.log_history if "loss" in entry][1]
    assert log["dno/error"] == pytest.approx(sum(errors) / 4, abs=1e-5)
    assert log["dno/win_margin"] == pytest.approx(float(x.columns["win_margin"].mean()), abs=1e-6)
    assert {"dno/label", "dno/accuracy"} <= set(log)


def test_columns_follow_their_rows(tmp_path):
    """A pair and its margin stay together through shuffling and collation."""
    trainer = make(tmp_path, **SOFT)
    margin_of = {tuple((r["prompt_ids"] + r["chosen_ids"])[:16]): r["win_margin"] for r in trainer.train_dataset}
    assert len(margin_of) == 12
    order = []
    for batch in trainer.get_train_dataloader():
        chosen, mask = batch["input_ids"][:4], batch["attention_mask"][:4].bool()
        order += [margin_of[tuple(ids[own].tolist())] for ids, own in zip(chosen, mask, strict=True)]
        assert batch["win_margin"].tolist() == pytest.approx(order[-4:])
    assert sorted(order) == sorted(margin_of.values()) and order != list(margin_of.values())


def test_accumulation(tmp_path):
    def run(**kwargs):
        return weights(trained(tmp_path, optim="sgd", learning_rate=1e-2, max_steps=2, **SOFT, **kwargs))

    small = run(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for name, value in run(per_device_train_batch_size=4).items():
        torch.testing.assert_close(value, small[name], atol=1e-5, rtol=1e-5)


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


def test_resume_is_exact(tmp_path):
    settings = {**SOFT, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "whole", **settings)
    trained(tmp_path / "part", callbacks=[StopAt()], **settings)
    again = make(tmp_path / "part", **settings)
    again.train(resume_from_checkpoint=True)
    assert_equal(weights(whole), weights(again))


def test_evaluation_has_the_column_too(tmp_path):
    """eval_loss by hand: one pair with its margin at a time, through the model alone."""
    margins = [0.8, -0.4]
    rows = pairs(2).add_column("win_margin", margins)
    trainer = shaken(make(tmp_path, evaluation=rows, **SOFT))
    found = trainer.evaluate()["eval_loss"]
    stock = AutoModelForCausalLM.from_pretrained(tiny_path())

    def log_prob(model, row, side):
        ids = (row["prompt_ids"] + row[f"{side}_ids"])[:16]  # max_length
        logps = model(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
        return sum(float(logps[t - 1, ids[t]]) for t in range(len(row["prompt_ids"]), len(ids)))

    losses = []
    for row, margin in zip(trainer.eval_dataset, margins, strict=True):
        good, bad = (log_prob(trainer.model, row, s) - log_prob(stock, row, s) for s in ("chosen", "rejected"))
        z, d = 1 / (1 + math.exp(-margin)), 0.2 * (good - bad)
        losses.append(z * math.log1p(math.exp(-d)) + (1 - z) * math.log1p(math.exp(d)))
    assert abs(losses[0] - losses[1]) > 1e-3 and found == pytest.approx(sum(losses) / 2, abs=1e-5)


def test_evaluation_on_other_data_names_its_missing_column(tmp_path):
    with pytest.raises(
        PlanError, match="dno: reads the column 'win_margin', the data set has: prompt, chosen, rejected"
    ):
        make(tmp_path, **SOFT).evaluate(pairs(4))


@pytest.mark.parametrize("value", [1.5, -40.0, math.nan, None])
@pytest.mark.parametrize("stream", [False, True])
def test_margins_out_of_range_are_named(tmp_path, stream, value):
    """By the row of the data set, before the model is loaded; of a stream when the row comes in."""
    margins = [0.0, 1.0, value, -1.0]
    rows = pairs(4).add_column("win_margin", margins)
    message = r"dno: column 'win_margin', row 2 \(from 0\): .* is not a finite number in \[-1, 1\]; mend or leave out"
    if stream:
        collate = _WithColumns(dict, ("win_margin",), make_plan(SOFT["methods"], "dpo"))
        with pytest.raises(PlanError, match=message):
            collate(list(rows))
        return
    with pytest.raises(PlanError, match=message):
        DPOTrainer("no such model", args=DPOConfig(**dpo_args(str(tmp_path), **SOFT)), train_dataset=rows)


@pytest.mark.parametrize(
    ("key", "value", "reader"), [("label_smoothing", 0.1, "robust"), ("discopop_tau", 0.2, "discopop")]
)
def test_settings_that_no_loss_reads_are_refused(tmp_path, key, value, reader):
    def config(*losses):
        return DPOConfig(**dpo_args(str(tmp_path), methods="dno", loss_type=list(losses), **{key: value}))

    for losses in (["dno"], ["dno", "sigmoid"]):
        with pytest.raises(PlanError, match=f"dno: {key}: {value} reaches none of loss_type; leave it at .*{reader}"):
            config(*losses)
    assert getattr(config("dno", reader), key) == value


@pytest.mark.parametrize("what", ["train", "evaluation"])
def test_a_missing_column_is_named(tmp_path, what):
    good, bad = data(), pairs().add_column("win_margins", [0.0] * 12)
    with pytest.raises(PlanError, match=r"dno: reads the column 'win_margin'.* did you mean 'win_margins'"):
        DPOTrainer(
            "no such model: it must not be loaded",
            args=DPOConfig(**dpo_args(str(tmp_path), **SOFT)),
            train_dataset=bad if what == "train" else good,
            eval_dataset={"a": bad} if what == "evaluation" else None,
        )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({**HARD, "methods": {"dno": {"reward_scale": 2}}}, "reward_scale has no effect without variant: soft"),
        ({**SOFT, "sync_ref_model": True}, "set sync_ref_model: false"),
        ({"methods": "dno", "loss_type": "sigmoid"}, r"dno: .*name it: `loss_type: \[dno\]`"),
        ({**SOFT, "methods": {"dno": {"variant": "soft", "reward_scale": 0.5}}}, "must be >= 1"),
    ],
)
def test_settings_that_cannot_run(tmp_path, kwargs, message):
    with pytest.raises(PlanError, match=message):
        DPOConfig(**dpo_args(str(tmp_path), **kwargs))


def test_defaults_are_the_experiments():
    assert (Dno().variant, Dno().reward_scale, Dno().pair_columns()) == ("prct", 1.0, ())
