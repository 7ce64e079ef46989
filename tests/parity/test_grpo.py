"""No method, or methods that change nothing: TRL bit for bit. DESIGN.md, invariant 1."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import trl
from peft import LoraConfig

import trl_ext
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext import ops
from trl_ext.method import HIDDEN, Method
from trl_ext.methods import METHODS


@dataclass(frozen=True)
class Neutral(Method):
    """Overrides every hook of the loss and of the rollout without changing a value: forces our path."""

    name = "neutral"
    title = paper = "none"

    def needs(self):
        return frozenset({HIDDEN})

    def edit_prompts(self, rows):
        return rows

    def shape_rewards(self, rewards, group):
        return rewards

    def group_advantages(self, advantages, group):
        return advantages

    def streams(self, rollout):
        return {"row": rollout.advantages}

    def token_weights(self, weights, x):
        assert x.streams["row"].shape == x.advantages.shape
        return weights

    def loss_mask(self, mask, x):
        return mask

    def aux_loss(self, x):
        return None

    def kl_coef(self, beta, step):
        return beta


@pytest.fixture(autouse=True)
def _neutral(monkeypatch):
    monkeypatch.setitem(METHODS, "neutral", Neutral)


def train(cls, config, folder, lora, **kwargs):
    args = config(**grpo_args(str(folder), **kwargs))
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None
    evaluation = prompts(4) if "eval_steps" in kwargs else None
    trainer = cls(tiny_path(), [letters_reward], args, prompts(), evaluation, peft_config=peft_config)
    trainer.train()
    return trainer


def assert_same(tmp_path, lora=False, methods=None, **kwargs):
    """Trains stock TRL and ours with the same settings; weights and logged numbers must be the same."""
    stock = train(trl.GRPOTrainer, trl.GRPOConfig, tmp_path, lora, **kwargs)
    ours = train(trl_ext.GRPOTrainer, trl_ext.GRPOConfig, tmp_path, lora, methods=methods, **kwargs)
    assert bool(ours.plan.in_loss) == (methods is not None)
    assert_equal(weights(stock), weights(ours))
    for theirs, mine in zip(stock.state.log_history, ours.state.log_history, strict=True):
        for key, value in theirs.items():
            if "time" not in key and "per_second" not in key and "runtime" not in key:
                same = value == mine[key] or (value != value and math.isnan(mine[key]))
                assert same, f"{key}: TRL logs {value}, ours {mine[key]}"


@pytest.mark.parametrize(
    "loss_type, beta, lora, iterations", itertools.product(ops.LOSS_TYPES, (0.0, 0.1), (False, True), (1, 2))
)
def test_forced_path_is_trl(tmp_path, loss_type, beta, lora, iterations):
    assert_same(tmp_path, lora, "neutral", loss_type=loss_type, beta=beta, num_iterations=iterations)


@pytest.mark.parametrize("lora", [False, True])
def test_no_method_is_trl(tmp_path, lora):
    assert_same(tmp_path, lora, None)


@pytest.mark.parametrize(
    "methods",
    [
        {"high_entropy": {"quantile": 0}},
        {"trace": {"action": "none"}},
        {"trace": {"weight": 0}},
        {"trace": {"hold_steps": 0, "decay_steps": 0, "annotator": "tests.tiny.annotate_first"}},
        {"trace": {"annotator": "tests.tiny.annotate_nothing"}},
    ],
)
@pytest.mark.parametrize("lora", [False, True])
def test_neutral_settings_are_trl(tmp_path, methods, lora):
    assert_same(tmp_path, lora, methods, loss_type="grpo", beta=0.1)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "extra",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"steps_per_generation": 2, "num_iterations": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"scale_rewards": "batch", "entropy_coef": 0.01},
        {"top_entropy_quantile": 0.5, "mask_truncated_completions": True},
        {"delta": 1.5, "epsilon_high": 0.28, "off_policy_mask_threshold": 0.1, "steps_per_generation": 2},
        {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
    ],
)
def test_options_are_trl(tmp_path, extra, level):
    assert_same(tmp_path, methods="neutral", importance_sampling_level=level, **extra)


def test_plain_trl_config_is_accepted(tmp_path):
    args = trl.GRPOConfig(**grpo_args(str(tmp_path), max_steps=1))
    trainer = trl_ext.GRPOTrainer(tiny_path(), letters_reward, args, prompts())
    trainer.train()
    assert trainer.plan.methods == ()


def test_trainer_without_init_has_defaults():
    """TRL's own tests build trainers with object.__new__."""
    trainer = object.__new__(trl_ext.GRPOTrainer)
    assert trainer.plan.methods == () and trainer._remembered is None
