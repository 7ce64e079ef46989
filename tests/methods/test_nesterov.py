"""Nesterov's anchor: worked numbers, rounds of a small table, the loss from three real models, TRL at alpha 0."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset, load_from_disk
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from tests.tiny import assert_equal, dpo_args, pairs, tiny_path, tiny_tokenizer, weights
from trl_ext import memory
from trl_ext.dpo import F_DIVERGENCES, LOSS_TYPES, DPOConfig, DPOTrainer
from trl_ext.method import PairInput
from trl_ext.methods.dpo import nesterov
from trl_ext.methods.dpo.nesterov import CANCELS_Z, DEPENDS_ON_Z, Nesterov, anchor_logps
from trl_ext.plan import PlanError, make_plan
from trl_ext.recipe import load_recipe

ALPHA = 0.3


def moved(folder, seed, lora=False):
    """The tiny model, or an adapter on it, with other weights: saved, and the folder's name."""
    model = AutoModelForCausalLM.from_pretrained(tiny_path())
    torch.manual_seed(seed)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    else:
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def previous(tmp_path_factory):
    """The policy of the round before."""
    return moved(tmp_path_factory.mktemp("previous"), 7)


def make(folder, cls=DPOTrainer, config=DPOConfig, lora=False, data=None, model=None, callbacks=None, **kwargs):
    return cls(
        model or tiny_path(),
        args=config(**dpo_args(str(folder), **kwargs)),
        train_dataset=pairs() if data is None else data,
        eval_dataset=pairs(4) if "eval_strategy" in kwargs else None,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None,
    )


def run(folder, *args, **kwargs):
    trainer = make(folder, *args, **kwargs)
    trainer.train()
    return trainer


def batch_of(trainer, rows=(0, 1, 2, 3)):
    """These pairs as the trainer collates them."""
    keys = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
    found = [trainer.train_dataset[i] for i in rows]
    return trainer._prepare_inputs(trainer.data_collator([{k: r[k] for k in keys if k in r} for r in found]))


def sums(model, batch):
    """(2B,) log-probs of the completions from full logits, with one loop over rows."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    total = []
    for ids, mask, row in zip(batch["input_ids"], batch["completion_mask"], logits.log_softmax(-1), strict=True):
        total.append(sum(row[i - 1, ids[i]] for i in range(1, len(ids)) if mask[i]))
    return torch.stack(total)


def shaken(trainer):
    """Moves the trained weights off the reference."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trainer


# The maths


@pytest.mark.parametrize(
    ("alpha", "reference", "margin", "loss"),
    [(0.3, (-9.7, -12.15), 0.045, 0.670900), (0.0, (-10.0, -12.0), 0.09, 0.649159)],
)
def test_worked_numbers(alpha, reference, margin, loss):
    found = anchor_logps(torch.tensor([-10.0, -12.0]).double(), torch.tensor([-11.0, -11.5]).double(), alpha)
    assert found.tolist() == pytest.approx(reference, abs=1e-6)
    d = 0.1 * ((-9.5 - found[0]) - (-12.4 - found[1]))
    assert float(d) == pytest.approx(margin, abs=1e-6)
    assert float(-logsigmoid(d)) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("alpha", "last"),
    [
        (0.0, [0.800774, 0.162559, 0.036667]),
        (0.3, [0.883510, 0.103117, 0.013372]),
        (0.5, [0.929692, 0.065223, 0.005084]),
    ],
)
def test_exact_rounds_on_three_arms(alpha, last):
    """pi'_t+1 ~ pi_t exp(r / beta), then the anchor; pi'_0 = pi_0."""
    reward, start = torch.tensor([1.0, 0.5, 0.0]).double(), torch.tensor([0.2, 0.3, 0.5]).double().log()
    before = anchor = start
    changes = []
    for _ in range(4):
        now = (anchor + reward).log_softmax(0)
        changes.append(float((now[0] - now[2]) - (before[0] - before[2])))
        anchor, before = anchor_logps(now, before, alpha).log_softmax(0), now
    assert before.exp().tolist() == pytest.approx(last, abs=1e-6)
    geometric = [sum(alpha**k for k in range(t + 1)) for t in range(4)]  # towards 1 / (1 - alpha)
    assert changes == pytest.approx(geometric, abs=1e-6)
    if alpha == 0.3:
        assert changes == pytest.approx([1, 1.3, 1.39, 1.417], abs=1e-6)


def test_the_anchor_of_equal_policies_is_that_policy():
    logps = torch.randn(2, 5)
    assert torch.equal(anchor_logps(logps, logps.clone(), 0.9), logps)


# In the loss


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_loss_from_three_models(tmp_path, lora, adapter, precompute):
    """-log sigmoid(beta ((w - r_w) - (l - r_l))) with the reference (1 + a) new - a old from full logits."""
    old = moved(tmp_path / "old", 3, lora=adapter)
    methods = {"nesterov": {"alpha": ALPHA, "previous": old}}
    trainer = shaken(make(tmp_path / "run", methods=methods, lora=lora, precompute_ref_log_probs=precompute))
    batch = batch_of(trainer)
    trainer.model.eval()
    found = trainer.compute_loss(trainer.model, batch)
    tiny = AutoModelForCausalLM.from_pretrained(tiny_path())
    new = sums(tiny, batch)
    before = PeftModel.from_pretrained(tiny, old) if adapter else AutoModelForCausalLM.from_pretrained(old)
    reference = (1 + ALPHA) * new - ALPHA * sums(before, batch)
    ratio = sums(trainer.model, batch) - reference
    assert found.item() == pytest.approx(-logsigmoid(0.2 * (ratio[:4] - ratio[4:])).mean().item(), abs=1e-5)
    plain = sums(trainer.model, batch) - new
    assert abs(found.item() + logsigmoid(0.2 * (plain[:4] - plain[4:])).mean().item()) > 0.01  # it does matter


def test_a_loss_that_the_policy_of_the_round_before_has_no_part_in(tmp_path):
    """`previous` equal to where training starts: the anchor is the reference, and the run is TRL's."""
    same = {"nesterov": {"alpha": 0.9, "previous": tiny_path()}}
    ours = run(tmp_path, methods=same)
    assert_equal(weights(ours), weights(run(tmp_path, trl.DPOTrainer, trl.DPOConfig)))


def test_a_base_in_4_bits(tmp_path):
    """The frozen model is packed as the policy's base: equal weights make equal log-probs, and no push."""
    wide = tiny_path(hidden_size=64, intermediate_size=64, head_dim=32, num_key_value_heads=2)
    trainer = DPOTrainer(
        wide,
        args=DPOConfig(**dpo_args(str(tmp_path), methods={"nesterov": {"previous": wide}}, max_steps=1)),
        train_dataset=pairs(),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
    )
    frozen = trainer._frozen._models[wide]
    assert frozen.is_quantized and frozen.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["nesterov/push_chosen"] == log["nesterov/push_rejected"] == 0.0 and log["nesterov/alpha"] > 0


@pytest.mark.parametrize("loss_type", [*CANCELS_Z, *DEPENDS_ON_Z])
def test_a_constant_on_both_logps_of_a_pair_changes_only_the_refused_losses(
    tmp_path, previous, monkeypatch, loss_type
):
    """log Z(x) is such a constant, another one for every prompt. It is put on the first token of each completion."""
    monkeypatch.setattr(nesterov, "DEPENDS_ON_Z", {})
    methods = {"nesterov": {"alpha": ALPHA, "previous": previous}}
    trainer = shaken(make(tmp_path, methods=methods, loss_type=loss_type, label_smoothing=0.1))
    batch = batch_of(trainer)
    trainer.model.eval()
    shift = torch.tensor([0.7, -1.1, 0.4, 2.0]).repeat(2)
    losses = []
    for factor in (0.0, 1.0):
        own = Nesterov.reference_logps

        def shifted(self, logps, x, own=own, factor=factor):
            first = x.mask & (x.mask.cumsum(1) == 1)
            return own(self, logps, x) + factor * shift[:, None] * first

        with monkeypatch.context() as patch:
            patch.setattr(Nesterov, "reference_logps", shifted)
            losses.append(trainer.compute_loss(trainer.model, batch).item())
    if loss_type in CANCELS_Z:
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    else:
        assert abs(losses[0] - losses[1]) > 1e-3


def test_every_loss_of_trl_has_its_place():
    assert {*CANCELS_Z, *DEPENDS_ON_Z, "sft"} == {*LOSS_TYPES}


@pytest.mark.parametrize(
    ("loss_type", "lora"), [*((name, False) for name in LOSS_TYPES), ("sigmoid", True), ("sppo_hard", True)]
)
def test_alpha_0_is_trl(tmp_path, previous, loss_type, lora, monkeypatch):
    """As it is, and on the path that alpha above 0 takes."""
    settings = {"loss_type": loss_type, "label_smoothing": 0.1, "max_steps": 2, "lora": lora}
    stock = run(tmp_path, trl.DPOTrainer, trl.DPOConfig, **settings)
    methods = {"nesterov": {"alpha": 0, "previous": previous}}
    assert_equal(weights(stock), weights(run(tmp_path, methods=methods, **settings)))
    monkeypatch.setattr(Nesterov, "idle", frozenset())
    monkeypatch.setattr(Nesterov, "frozen_models", lambda self: (self.previous,))
    assert_equal(weights(stock), weights(run(tmp_path, methods=methods, **settings)))


def test_no_gradient_reaches_the_reference(tmp_path, previous):
    trainer = make(tmp_path, methods={"nesterov": {"previous": previous}})
    seen = []

    def watch(self, x: PairInput) -> None:
        seen.append(x)

    trainer.model.train()
    before = {n: p.clone() for n, p in trainer._frozen._models[previous].named_parameters()}
    hook, Nesterov.observe_pairs = Nesterov.observe_pairs, watch
    try:
        trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
    finally:
        Nesterov.observe_pairs = hook
    assert (
        seen[0].chosen.requires_grad and not seen[0].ref_chosen.requires_grad and not seen[0].ref_logps.requires_grad
    )
    frozen = trainer._frozen._models[previous]
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert_equal(before, dict(frozen.named_parameters()))


def test_own_losses_see_the_anchor_too(tmp_path, previous):
    """DNO with hard labels is TRL's sigmoid, with the anchor as its reference as well."""
    shared = {"nesterov": {"previous": previous}}
    theirs = run(tmp_path, methods=shared)
    own = run(tmp_path, methods={**shared, "dno": {}}, loss_type="dno")
    for name, value in weights(theirs).items():
        torch.testing.assert_close(value, weights(own)[name], atol=1e-5, rtol=1e-5)


# Over a run


def test_log_and_evaluation(tmp_path, previous):
    """The push by hand, and the anchor in `eval_loss`: that of the first evaluation is the loss at the start."""
    methods = {"nesterov": {"alpha": ALPHA, "previous": previous}}
    extra = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "max_steps": 1}
    trainer = make(tmp_path, methods=methods, per_device_train_batch_size=12, per_device_eval_batch_size=4, **extra)
    batch = batch_of(trainer, range(12))
    new, old = (
        sums(AutoModelForCausalLM.from_pretrained(folder), batch).chunk(2) for folder in (tiny_path(), previous)
    )
    push = [ALPHA * (now - then) for now, then in zip(new, old, strict=True)]
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["nesterov/alpha"] == pytest.approx(ALPHA)
    assert log["nesterov/push_chosen"] == pytest.approx(float(push[0].mean()), abs=1e-4)
    assert log["nesterov/push_rejected"] == pytest.approx(float(push[1].mean()), abs=1e-4)
    assert log["nesterov/push_margin"] == pytest.approx(float((push[0] - push[1]).mean()), abs=1e-4)
    first = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    d = 0.2 * -(push[0] - push[1])[:4]  # the policy is pi'_t+1 itself
    assert first["eval_loss"] == pytest.approx(float(-logsigmoid(d).mean()), abs=1e-4)
    assert not any(key.startswith("eval_nesterov") for entry in trainer.state.log_history for key in entry)


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


@pytest.mark.parametrize(("lora", "precompute"), [(False, False), (True, False), (False, True)])
def test_resume_is_exact(tmp_path, previous, lora, precompute):
    settings = {"methods": {"nesterov": {"previous": previous}}, "max_steps": 4, "lora": lora}
    settings |= {"save_strategy": "steps", "save_steps": 2, "precompute_ref_log_probs": precompute}
    whole = run(tmp_path / "whole", **settings)
    run(tmp_path / "part", callbacks=[StopAt()], **settings)
    again = make(tmp_path / "part", **settings)
    again.train(resume_from_checkpoint=True)
    assert_equal(weights(whole), weights(again))


def test_precomputed_columns_are_those_of_this_anchor(tmp_path, previous):
    """One data set on disk, whose cache TRL keeps from run to run: alpha and the weights of `previous` renew it."""
    pairs().save_to_disk(tmp_path / "data")
    old = tmp_path / "old"
    shutil.copytree(previous, old)

    def columns(alpha, data=None):
        methods = {"nesterov": {"alpha": alpha, "previous": str(old)}} if alpha is not None else None
        data = load_from_disk(tmp_path / "data") if data is None else data
        trainer = make(tmp_path / "run", methods=methods, data=data, precompute_ref_log_probs=True)
        assert trainer._frozen is None, "the frozen model leaves memory before training"
        return trainer.train_dataset

    def chosen(data: Dataset):
        return torch.tensor(data["ref_chosen_logps"])

    plain, pushed, further = columns(None), columns(0.3), columns(0.6)
    push = chosen(pushed) - chosen(plain)
    assert push.abs().max() > 0.1
    torch.testing.assert_close(chosen(further) - chosen(plain), 2 * push, atol=1e-4, rtol=1e-4)
    assert torch.equal(chosen(columns(0.3)), chosen(pushed))
    again = columns(0.6, data=pushed)  # last round's columns are still in the data
    assert torch.equal(chosen(again), chosen(further))
    moved(old, 11)
    assert not torch.allclose(chosen(columns(0.3)), chosen(pushed), atol=1e-2)


# Errors for people


@pytest.mark.parametrize(
    ("settings", "kwargs", "message"),
    [
        *(({}, {"loss_type": name}, f"loss_type {name} .*log Z.*one of sigmoid") for name in DEPENDS_ON_Z),
        ({}, {"loss_type": ["sigmoid", "ipo"]}, "loss_type ipo divides"),
        ({}, {"loss_type": "sft"}, "sft reads no reference"),
        *(({}, {"f_divergence_type": name}, f"{name} bends") for name in F_DIVERGENCES[1:]),
        ({}, {"sync_ref_model": True}, "set sync_ref_model: false"),
        ({"previous": None}, {}, "previous: name the policy of the round before"),
        ({"alpha": 1.0}, {}, "alpha: 1.0 must be < 1"),
        ({"alpha": -0.1}, {}, "alpha: -0.1 must be >= 0"),
    ],
)
def test_refused(tmp_path, settings, kwargs, message):
    methods = {"nesterov": {"alpha": ALPHA, "previous": "a/b", **settings}}
    with pytest.raises(PlanError, match=message):
        DPOConfig(**dpo_args(str(tmp_path), methods=methods, **kwargs))


def test_sft_beside_a_loss_that_reads_the_reference(tmp_path):
    methods = {"nesterov": {"previous": "a/b"}}
    assert DPOConfig(**dpo_args(str(tmp_path), methods=methods, loss_type=["sigmoid", "sft"])).loss_type


@pytest.mark.parametrize(
    ("spec", "trainer", "message"),
    [
        ({"nesterov": {"previous": "a/b"}, "bco": {}}, "dpo", "nesterov and bco do not go together: .*log Z"),
        ({"nesterov": {"previous": "a/b"}}, "kto", "nesterov: runs in the dpo trainer"),
        ({"nesterov": {"previous": "a/b"}}, "grpo", "nesterov: runs in the dpo trainer"),
    ],
)
def test_other_trainers_and_bco(spec, trainer, message):
    with pytest.raises(PlanError, match=message):
        make_plan(spec, trainer)


def test_frozen_models_that_do_not_fit(tmp_path):
    with pytest.raises(PlanError, match=r"cannot load the frozen model '.*nowhere'"):
        make(tmp_path, methods={"nesterov": {"previous": str(tmp_path / "nowhere")}})
    other = tiny_path(vocab_size=300)
    with pytest.raises(PlanError, match="has a vocabulary of 300, the policy of 259"):
        make(tmp_path, methods={"nesterov": {"previous": other}})
    model = AutoModelForCausalLM.from_pretrained(tiny_path())
    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"])).save_pretrained(tmp_path / "head")
    with pytest.raises(PlanError, match="adapts lm_head"):
        make(tmp_path, methods={"nesterov": {"previous": str(tmp_path / "head")}})


def test_the_plan_counts_the_second_model():
    """As large as the base; with precomputed log-probs it is gone before training."""
    recipe = [str(Path(__file__).parents[2] / "recipes" / "sandbox_dpo.yaml"), ["--methods.nesterov.previous", "a/b"]]
    lines = {line.name: line.bytes for line in memory.predict(load_recipe(*recipe)).lines}
    assert lines["frozen model"] == lines["base weights"] > 0
    recipe[1] = [*recipe[1], "--precompute_ref_log_probs", "true"]
    assert "frozen model" not in {line.name for line in memory.predict(load_recipe(*recipe)).lines}


def test_what_it_needs():
    on, off = Nesterov(previous="a/b"), Nesterov(alpha=0.0, previous="a/b")
    assert on.needs() == {"frozen"} and on.frozen_models() == ("a/b",) and "one more frozen model" in on.cost()
    assert off.needs() == frozenset() and off.frozen_models() == () and off.cost() == "no extra forward"
    assert math.isclose(Nesterov().alpha, 0.3)
