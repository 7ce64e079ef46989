"""Own policy terms: GRPO's own, for every loss type, is TRL bit for bit; steps, rollouts and the flags that are refused."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import trl

import trl_ext
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext import checks, ops, surrogates
from trl_ext.method import Method, RunShape, Setup
from trl_ext.methods import METHODS

CONFIG = trl.GRPOConfig(output_dir="unused", report_to=[], use_cpu=True, bf16=False)


@dataclass(frozen=True)
class Own(Method):
    """The policy term of each of TRL's loss types, written again through the surrogate slot."""

    name = "probe"
    title = paper = "none"
    owns = ("surrogate",)

    def surrogate(self, x):
        d = surrogates.log_ratio(x)
        ratio, gain = torch.exp(d), x.advantages.unsqueeze(1)
        if x.loss_type == "cispo":
            return -ratio.clamp(max=0.2).detach() * gain * x.logps
        if x.loss_type == "sapo":
            heat = torch.where(gain > 0, CONFIG.sapo_temperature_pos, CONFIG.sapo_temperature_neg)
            return -torch.sigmoid(heat * (ratio - 1)) * 4 / heat * gain
        if x.loss_type == "vespo":
            shape = {f"{k}_{s}": getattr(CONFIG, f"vespo_{k}_{s}") for k in ("k", "lambda") for s in ("pos", "neg")}
            return -trl.GRPOTrainer.get_gamma_weights(gain, d, x.mask, None, **shape) * gain * x.logps
        return -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ops.LOSS_TYPES)
def test_trls_own_policy_term_through_the_slot_is_trl(tmp_path, monkeypatch, loss_type, beta):
    """Against stock TRL: two micro-batches per step, two passes over each rollout. Bit for bit; with a reference KL to
    the last rounding, since TRL adds it before it aggregates (SGD: Adam would magnify the bit)."""
    settings = {"loss_type": loss_type, "num_iterations": 2, "beta": beta, "max_steps": 4}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    settings |= {"optim": "sgd", "learning_rate": 0.1} if beta else {}
    monkeypatch.setitem(METHODS, "probe", Own)
    args = grpo_args(str(tmp_path), **settings)
    found = []
    for cls, config in (
        (trl_ext.GRPOTrainer, trl_ext.GRPOConfig(**args, methods="probe")),
        (trl.GRPOTrainer, trl.GRPOConfig(**args)),
    ):
        trainer = cls(tiny_path(), letters_reward, config, prompts())
        trainer.train()
        found.append(weights(trainer))
    if beta == 0:
        return assert_equal(*found)
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("per_rollout", "steps", "index", "last"),
    [
        (1.0, 4, [0, 1, 2, 3], [1, 1, 1, 1]),
        (4.0, 10, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 1, 0, 0, 0, 1, 0, 0]),
        (0.5, 3, [0, 1, 2], [1, 1, 1]),  # two rollouts of the same weights make a step
        (1.5, 6, [0, 0, 1, 2, 2, 3], [0, 1, 1, 0, 1, 1]),
        (4 / 3, 8, [0, 0, 1, 2, 3, 3, 4, 5], [0, 1, 1, 1, 0, 1, 1, 1]),
    ],
)
def test_steps_and_rollouts(per_rollout, steps, index, last):
    run = RunShape(steps, 4, per_rollout)
    assert [surrogates.rollout_index(step, run) for step in range(steps)] == index
    assert surrogates.rollout_count(run) == index[-1] + 1
    assert [surrogates.last_of_rollout(step, run) for step in range(steps)] == [bool(x) for x in last]
    assert surrogates.first_of_rollout(0, run)
    firsts = [surrogates.first_of_rollout(step, run) for step in range(1, steps)]
    assert firsts == [bool(x) for x in last[:-1]]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("epsilon", 0.1),
        ("epsilon_high", 0.28),
        ("delta", 4.0),
        ("importance_sampling_level", "sequence"),
        ("off_policy_mask_threshold", 0.5),
        ("top_entropy_quantile", 0.2),
        ("loss_type", "cispo"),
        ("loss_type", "sapo"),
        ("loss_type", "vespo"),
    ],
)
def test_flags_of_the_replaced_term_are_refused(flag, value):
    assert checks.unused_flags(CONFIG) == []
    (message,) = checks.unused_flags(SimpleNamespace(**vars(CONFIG) | {flag: value}))
    assert flag in message and str(value) in message


def test_the_table_holds_trls_defaults():
    assert {name: getattr(CONFIG, name) for name in checks.POLICY_TERM} == checks.POLICY_TERM


def test_vllms_correction_is_refused():
    vllm = SimpleNamespace(use_vllm=True, vllm_importance_sampling_correction=True)
    assert "vllm_importance_sampling_correction: false" in checks.unused_flags(vllm)[0]
    assert checks.unused_flags(SimpleNamespace(use_vllm=False, vllm_importance_sampling_correction=True)) == []


def test_other_methods_of_the_plan():
    """By the hooks that their settings use, in the order of the recipe."""
    names = ["high_entropy", "probe", "trace", "velocity_rank", "capo"]
    built = [SimpleNamespace(name=name) if name == "probe" else METHODS[name]() for name in names]
    setup = Setup(None, methods=names, built=built)
    assert checks.others_that(setup, "probe", "token_weights") == ["high_entropy", "trace"]
    assert checks.others_that(setup, "probe", "group_advantages") == []  # capo has that hook, idle by default
