"""No method, or methods that change nothing: TRL's DPO bit for bit. DESIGN.md, invariant 1."""

from __future__ import annotations

import functools
import math
import re
import tempfile
from dataclasses import dataclass

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.tiny import assert_equal, dpo_args, pairs, tiny_path, tiny_tokenizer, weights
from trl_ext.dpo import F_DIVERGENCES, LOSS_TYPES, DPOConfig, DPOTrainer
from trl_ext.method import HIDDEN, Method
from trl_ext.methods import METHODS


@dataclass(frozen=True)
class Neutral(Method):
    """Overrides the hooks beside the losses without adding anything: forces our path in training."""

    name = "neutral"
    title = paper = "none"
    trainer = "dpo"

    def needs(self):
        return frozenset({HIDDEN})

    def pair_aux_loss(self, x):
        assert x.policy.hidden.shape[:2] == x.logps.shape == x.mask.shape
        assert x.chosen.requires_grad and not x.ref_chosen.requires_grad
        return None

    def observe_pairs(self, x):
        self.state["batches"] = self.state.get("batches", 0) + 1


@dataclass(frozen=True)
class Zero(Method):
    """A loss that is 0 for every pair: forces our path in evaluation too."""

    name = "zero"
    title = paper = "none"
    trainer = "dpo"

    def pair_loss(self, x):
        return torch.zeros_like(x.chosen)


@pytest.fixture(autouse=True)
def _neutral(monkeypatch):
    monkeypatch.setitem(METHODS, "neutral", Neutral)
    monkeypatch.setitem(METHODS, "zero", Zero)


def adapter(**kwargs):
    """A new one for each model: PEFT writes the model's name into it."""
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **kwargs)


def train(cls, config, folder, lora, model=None, ref_model=None, compute_metrics=None, four_bit=False, **kwargs):
    args = config(**dpo_args(str(folder), **kwargs))
    trainer = cls(
        tiny_path() if model is None else model(),
        None if ref_model is None else ref_model(),
        args,
        train_dataset=pairs(),
        eval_dataset=pairs(5) if "eval_strategy" in kwargs else None,
        processing_class=tiny_tokenizer(),
        compute_metrics=compute_metrics,
        peft_config=adapter() if lora else None,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True) if four_bit else None,
    )
    trainer.train()
    return trainer


def assert_same(tmp_path, lora=False, methods="neutral", **kwargs):
    """Trains stock TRL and ours with the same settings; weights and logged numbers must be the same."""
    stock = train(trl.DPOTrainer, trl.DPOConfig, tmp_path, lora, **kwargs)
    if methods == "zero":
        kwargs = kwargs | {"loss_type": ["zero", "sigmoid"], "loss_weights": [2.0, 1.0]}
    ours = train(DPOTrainer, DPOConfig, tmp_path, lora, methods=methods, **kwargs)
    assert [m.name for m in ours.plan.methods] == ([methods] if methods else [])
    if methods == "neutral":  # our path was taken for every micro-batch
        assert ours.plan.methods[0].state["batches"] == ours.state.max_steps * ours.args.gradient_accumulation_steps
    assert_equal(weights(stock), weights(ours))
    for theirs, mine in zip(stock.state.log_history, ours.state.log_history, strict=True):
        for key, value in theirs.items():
            if "time" not in key and "per_second" not in key:
                same = value == mine[key] or (value != value and math.isnan(mine[key]))
                assert same, f"{key}: TRL logs {value}, ours {mine[key]}"


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types_are_trl(tmp_path, loss_type, lora):
    assert_same(tmp_path, lora, loss_type=loss_type, label_smoothing=0.1)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("methods", [None, "zero"])
def test_no_method_and_a_zero_loss_are_trl(tmp_path, methods, lora):
    assert_same(tmp_path, lora, methods)


OPTIONS = [
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"ld_alpha": 0.5},
    {"ld_alpha": 0.0, "precompute_ref_log_probs": True},
    {"use_weighting": True},
    *({"f_divergence_type": name} for name in F_DIVERGENCES[1:]),
    {"precompute_ref_log_probs": True},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"gradient_checkpointing": True, "precompute_ref_log_probs": True},
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "bf16": True},
]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("extra", OPTIONS, ids=str)
def test_options_are_trl(tmp_path, extra, lora):
    assert_same(tmp_path, lora, **extra)


def wide():
    """Folder of a model whose matrices are large enough for bitsandbytes' blocks."""
    return tiny_path(hidden_size=64, intermediate_size=64, head_dim=32, num_key_value_heads=2)


@pytest.mark.parametrize("methods", ["neutral", "zero"])
def test_four_bit_is_trl(tmp_path, methods):
    assert_same(tmp_path, True, methods, model=wide, four_bit=True, gradient_checkpointing=True)


def test_moving_reference_is_trl(tmp_path):
    assert_same(tmp_path, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5)


def mean_logit(prediction):
    """What `compute_metrics` gets from `return_outputs=True`."""
    return {"mean_logit": float(prediction.predictions.mean())}


@pytest.mark.parametrize("methods", ["neutral", "zero"])
@pytest.mark.parametrize("lora", [False, True])
def test_evaluation_is_trl(tmp_path, lora, methods):
    extra = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    assert_same(tmp_path, lora, methods, **extra)
    assert_same(tmp_path, lora, methods, max_steps=1, compute_metrics=mean_logit, **extra)


def base():
    return AutoModelForCausalLM.from_pretrained(tiny_path())


def adapted():
    """A model whose adapter has been trained before: TRL keeps a copy of it under the name "ref"."""
    torch.manual_seed(0)
    return get_peft_model(base(), adapter(init_lora_weights=False))


@pytest.mark.parametrize("methods", ["neutral", "zero"])
def test_reference_models_are_trl(tmp_path, methods):
    assert_same(tmp_path, methods=methods, model=adapted)
    assert_same(tmp_path, methods=methods, model=base, ref_model=base)
    assert_same(tmp_path, methods=methods, lora=True, ref_model=base)


@functools.cache
def tiny_moe():
    """Folder of a two-expert model that asks for its load-balancing loss."""
    folder = tempfile.mkdtemp(prefix="tiny-moe-")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
        initializer_range=0.5,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("methods", ["neutral", "zero"])
def test_mixture_of_experts_is_trl(tmp_path, methods):
    assert_same(tmp_path, methods=methods, model=tiny_moe)


def test_plain_trl_config_is_accepted(tmp_path):
    assert train(DPOTrainer, trl.DPOConfig, tmp_path, lora=False, max_steps=1).plan.methods == ()


def test_names_of_losses_are_those_of_trl(tmp_path):
    """TRL names what it knows when it meets an unknown loss; a release with another list must fail here."""
    with pytest.raises(ValueError) as error:
        train(trl.DPOTrainer, trl.DPOConfig, tmp_path, lora=False, loss_type="nope")
    assert set(re.findall(r"'(\w+)'", str(error.value))) == set(LOSS_TYPES)


def test_names_of_divergences_are_those_of_trl(tmp_path):
    with pytest.raises(ValueError, match="Unknown f_divergence_type"):
        train(trl.DPOTrainer, trl.DPOConfig, tmp_path, lora=False, f_divergence_type="kl")
