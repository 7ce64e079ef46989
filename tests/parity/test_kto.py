"""No method, or methods that change nothing: TRL's KTO bit for bit. DESIGN.md, invariant 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny import assert_equal, dpo_args, labelled, pairs, tiny_path, tiny_tokenizer, weights
from trl_ext.kto import LOSS_TYPES, KTOConfig, KTOTrainer
from trl_ext.method import Method
from trl_ext.methods import METHODS


@dataclass(frozen=True)
class Watching(Method):
    """Sees every micro-batch and changes nothing: forces our path in training."""

    name = "watching"
    title = paper = "none"
    trainer = "kto"

    def observe_labels(self, x):
        assert x.logps.requires_grad and not x.ref_logps.requires_grad
        self.state["batches"] = self.state.get("batches", 0) + 1


@dataclass(frozen=True)
class Unpaired(Method):
    """TRL's apo_zero_unpaired in its place: forces our path in evaluation too."""

    name = "unpaired"
    title = paper = "none"
    trainer = "kto"

    def label_loss(self, x):
        logits = x.beta * (x.logps - x.ref_logps)
        return torch.where(x.label, 1 - torch.sigmoid(logits), torch.sigmoid(logits))


@pytest.fixture(autouse=True)
def _methods(monkeypatch):
    monkeypatch.setitem(METHODS, "watching", Watching)
    monkeypatch.setitem(METHODS, "unpaired", Unpaired)


def adapter(**kwargs):
    """A new one for each model: PEFT writes the model's name into it."""
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **kwargs)


def train(cls, config, folder, lora=False, model=None, ref_model=None, data=None, compute_metrics=None, **kwargs):
    trainer = cls(
        tiny_path() if model is None else model(),
        None if ref_model is None else ref_model(),
        config(**dpo_args(str(folder), **kwargs)),
        train_dataset=data or labelled(),
        eval_dataset=labelled(5) if "eval_strategy" in kwargs else None,
        processing_class=tiny_tokenizer(),
        compute_metrics=compute_metrics,
        peft_config=adapter() if lora else None,
    )
    trainer.train()
    return trainer


def assert_same(tmp_path, methods="watching", **kwargs):
    """Trains stock TRL and ours with the same settings; weights and logged numbers must be the same."""
    stock = train(trl.KTOTrainer, trl.KTOConfig, tmp_path, **kwargs)
    ours = train(KTOTrainer, KTOConfig, tmp_path, methods=methods, **kwargs)
    assert [m.name for m in ours.plan.methods] == ([methods] if methods else [])
    if methods:
        assert ours.plan.methods[0].state["batches"] == ours.state.max_steps * ours.args.gradient_accumulation_steps
    assert_equal(weights(stock), weights(ours))
    assert_same_log(stock, ours)


def assert_same_log(stock, ours, tolerance=None):
    for theirs, mine in zip(stock.state.log_history, ours.state.log_history, strict=True):
        for key, value in theirs.items():
            if "time" not in key and "per_second" not in key:
                same = value == mine[key] or (value != value and math.isnan(mine[key]))
                same = same or (tolerance is not None and value == pytest.approx(mine[key], abs=tolerance))
                assert same, f"{key}: TRL logs {value}, ours {mine[key]}"


@pytest.mark.parametrize("methods", [None, "watching"])
@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types_are_trl(tmp_path, loss_type, lora, precompute, methods):
    weighted = {"desirable_weight": 0.7, "undesirable_weight": 1.3}
    assert_same(tmp_path, methods, loss_type=loss_type, lora=lora, precompute_ref_log_probs=precompute, **weighted)


OPTIONS = [
    {"gradient_checkpointing": True},
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "bf16": True},
    {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
    {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random", "per_device_train_batch_size": 1},
    {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
]


@pytest.mark.parametrize("extra", OPTIONS, ids=str)
def test_options_are_trl(tmp_path, extra):
    assert_same(tmp_path, **extra)


def base():
    return AutoModelForCausalLM.from_pretrained(tiny_path())


def adapted():
    """A model whose adapter has been trained before: TRL keeps a copy of it under the name "ref"."""
    torch.manual_seed(0)
    return get_peft_model(base(), adapter(init_lora_weights=False))


def test_reference_models_and_pairs_are_trl(tmp_path):
    assert_same(tmp_path, model=adapted)
    assert_same(tmp_path, model=base, ref_model=base)
    assert_same(tmp_path, lora=True, ref_model=base)
    assert_same(tmp_path, data=pairs(6))


def mean_logit(prediction):
    """What `compute_metrics` gets from `return_outputs=True`."""
    return {"mean_logit": float(prediction.predictions.mean())}


@pytest.mark.parametrize("extra", [{}, {"lora": True}, {"precompute_ref_log_probs": True}], ids=str)
def test_a_loss_in_place_of_trls_trains_as_trls(tmp_path, extra):
    """The same formula as a method's own: no KL batch, TRL's weights of the classes, TRL's metrics, evaluation."""
    weighted = {"desirable_weight": 0.7, "undesirable_weight": 1.3, "eval_strategy": "steps", "eval_steps": 1}
    same = weighted | extra | {"compute_metrics": mean_logit}
    stock = train(trl.KTOTrainer, trl.KTOConfig, tmp_path, loss_type="apo_zero_unpaired", **same)
    ours = train(KTOTrainer, KTOConfig, tmp_path, loss_type="unpaired", methods="unpaired", **same)
    assert not ours.calculate_KL and "KL_completion_ids" not in ours.train_dataset.column_names
    assert ours.args.loss_type == "unpaired"
    for name, value in weights(stock).items():
        torch.testing.assert_close(value, weights(ours)[name], atol=2e-5, rtol=1e-4)
    # TRL's constant 0, which was not measured; beside an own loss it is left out
    for entry in stock.state.log_history:
        assert entry.pop("kl", 0) == entry.pop("eval_kl", 0) == 0
    assert not any(key in entry for entry in ours.state.log_history for key in ("kl", "eval_kl"))
    assert_same_log(stock, ours, tolerance=2e-3)


def test_plain_trl_config_is_accepted(tmp_path):
    assert train(KTOTrainer, trl.KTOConfig, tmp_path, max_steps=1).plan.methods == ()


def test_names_of_losses_are_those_of_trl():
    assert tuple(trl.KTOConfig.__dataclass_fields__["loss_type"].metadata["choices"]) == LOSS_TYPES
