"""Every pair of methods for preference data trains together or names its conflict, in every trainer that runs both.

Each method also trains beside each of TRL's losses, and with precomputed reference and LoRA on and off.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
from peft import LoraConfig

import trl_ext
from tests.tiny import dpo_args, labelled, pairs, tiny_path, tiny_tokenizer
from trl_ext.dpo import LOSS_TYPES, READ_BY
from trl_ext.method import Method, overrides
from trl_ext.methods import METHODS
from trl_ext.plan import PlanError

SETTINGS: dict[str, dict[str, Any]] = {
    "bco": {"shift": "running_mean"},
    "dno": {"variant": "soft", "reward_scale": 3.0},
    "nesterov": {"previous": tiny_path(initializer_range=0.4)},
}
"""On the tiny model, so that each method does something; the others run with their defaults."""
REFUSED_BESIDE: dict[str, tuple[str, ...]] = {
    "nesterov": (
        *("ipo", "nca_pair", "bco_pair", "sppo_hard", "aot_unpaired"),
        *("apo_zero", "apo_down", "sft", "sigmoid_norm"),
    ),
}
"""Method -> TRL's losses beside which it is refused; it trains beside all others."""
TRAINERS = {"dpo": "pair_loss", "kto": "label_loss"}
"""Trainer -> the hook of a method with a loss of its own."""
IN = {t: [name for name, cls in METHODS.items() if t in (cls.trainer, *cls.also_in)] for t in TRAINERS}


@functools.cache
def method(name: str) -> Method:
    return METHODS[name](**SETTINGS.get(name, {}))


def make(folder: object, trainer: str, names: tuple[str, ...], lora: bool = False, **kwargs: Any) -> Any:
    own = [name for name in names if overrides(method(name), TRAINERS[trainer])]
    if own and "loss_type" not in kwargs:
        kwargs["loss_type"] = own if trainer == "dpo" else own[0]
    args = dpo_args(str(folder), max_steps=2, methods={name: SETTINGS.get(name, {}) for name in names}, **kwargs)
    return getattr(trl_ext, f"{trainer.upper()}Trainer")(
        tiny_path(),
        args=getattr(trl_ext, f"{trainer.upper()}Config")(**args),
        train_dataset=pairs().add_column("win_margin", [0.5] * 12) if trainer == "dpo" else labelled(),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None,
    )


def trains(trainer: Any) -> None:
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(math.isfinite(entry["loss"]) for entry in logged)


PAIRS = [(t, pair) for t in TRAINERS for pair in itertools.combinations(IN[t], 2)]


@pytest.mark.parametrize(
    ("trainer", "pair"), PAIRS, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_pair(tmp_path: object, trainer: str, pair: tuple[str, str]) -> None:
    first, second = map(method, pair)
    apart = first.conflicts.get(second.name) or second.conflicts.get(first.name) or {*first.owns} & {*second.owns}
    both_replace = trainer == "kto" and all(overrides(m, "label_loss") for m in (first, second))
    for order in (pair, pair[::-1]):
        if apart or both_replace:
            with pytest.raises(PlanError) as refused:
                make(tmp_path, trainer, order)
            assert all(name in str(refused.value) for name in pair)
        else:
            trains(make(tmp_path, trainer, order))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("name", IN["dpo"])
def test_beside_every_loss_of_trl(tmp_path: object, name: str, loss_type: str) -> None:
    """A method with a loss of its own is added to TRL's; one without goes along with it, or is refused with words."""
    own = [name] if overrides(method(name), "pair_loss") else []
    smoothing = {"label_smoothing": 0.1} if loss_type in READ_BY["label_smoothing"] else {}
    if loss_type in REFUSED_BESIDE.get(name, ()):
        with pytest.raises(PlanError) as refused:
            make(tmp_path, "dpo", (name,), loss_type=[loss_type, *own], **smoothing)
        assert name in str(refused.value) and loss_type in str(refused.value)
    else:
        trains(make(tmp_path, "dpo", (name,), loss_type=[loss_type, *own], **smoothing))


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("trainer", "name"), [(t, name) for t in TRAINERS for name in IN[t]])
def test_with_adapter_and_precomputed_reference(
    tmp_path: object, trainer: str, name: str, lora: bool, precompute: bool
) -> None:
    trains(make(tmp_path, trainer, (name,), lora, precompute_ref_log_probs=precompute))
