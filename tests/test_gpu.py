"""The same promises on a CUDA device, where TRL scores through Triton kernels and only the labelled positions.

Run on a machine with a GPU: `python -m pytest tests/test_gpu.py -m gpu`.
"""

from __future__ import annotations

import pytest
import torch
import trl
from peft import LoraConfig
from transformers import BitsAndBytesConfig

import trl_ext
from tests.parity.test_grpo import Neutral
from tests.test_services import SEEN, FullDistribution
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext.methods import METHODS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TRACE = {"action": "both", "annotator": "tests.tiny.annotate_first", "coverage": 0.5}


def train(folder, cls=trl_ext.GRPOTrainer, config=trl_ext.GRPOConfig, resume=None, quantization=None, **kwargs):
    """LoRA: its backward has no atomics, so that equal means equal. Heads of 16 suit every attention kernel."""
    args = config(**grpo_args(str(folder), use_cpu=False, **kwargs))
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    path = tiny_path(head_dim=16, hidden_size=32)
    trainer = cls(path, letters_reward, args, prompts(), peft_config=lora, quantization_config=quantization)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(autouse=True)
def _methods(monkeypatch):
    monkeypatch.setitem(METHODS, "neutral", Neutral)
    monkeypatch.setitem(METHODS, "probe", FullDistribution)
    SEEN.clear()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("methods", [None, "neutral", {"high_entropy": {"quantile": 0}}, {"trace": {"weight": 0}}])
def test_neutral_is_trl(tmp_path, methods, loss_type, bf16):
    settings = {"loss_type": loss_type, "beta": 0.1, "bf16": bf16, "num_iterations": 2}
    stock = weights(train(tmp_path, trl.GRPOTrainer, trl.GRPOConfig, **settings))
    assert_equal(stock, weights(train(tmp_path, methods=methods, **settings)))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full_distribution_agrees_with_trls_kernel(tmp_path, temperature):
    train(tmp_path, methods="probe", max_steps=1, temperature=temperature)
    sampled, logps, entropy, trl_entropy, _ = SEEN[0]
    torch.testing.assert_close(sampled, logps, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(entropy, trl_entropy, rtol=1e-3, atol=1e-4)


NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("quantization", [None, NF4], ids=["bf16", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_methods_train_together(tmp_path, quantization, checkpointing):
    if quantization is not None:
        pytest.importorskip("bitsandbytes")
    methods = {"trace": TRACE, "high_entropy": {}}
    trainer = train(
        tmp_path, methods=methods, quantization=quantization, bf16=True, gradient_checkpointing=checkpointing
    )
    entry = trainer.state.log_history[0]
    assert entry["trace/rows_with_span"] == 1.0 and 0 < entry["high_entropy/kept_fraction"] < 0.3
    assert all(bool(torch.isfinite(p).all()) for p in weights(trainer).values())
    assert entry["grad_norm"] > 0


def test_resume_is_exact_inside_a_window(tmp_path):
    settings = {"methods": {"trace": TRACE}, "steps_per_generation": 2, "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    whole = weights(train(tmp_path / "whole", **settings))
    assert_equal(whole, weights(train(tmp_path / "again", resume=str(tmp_path / "whole/checkpoint-3"), **settings)))
