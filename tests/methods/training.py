"""A short training of the tiny model with methods, as most tests of a method need it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

import trl_ext
from tests.tiny import grpo_args, letters_reward, prompts, tiny_path


def make(
    folder: Path,
    methods: Mapping[str, Any] | str | None,
    lora: bool = False,
    rewards: Callable[..., list[float]] = letters_reward,
    **kwargs: Any,
) -> trl_ext.GRPOTrainer:
    """The trainer; loss_type grpo unless `kwargs`, which go to the config, say otherwise."""
    args = trl_ext.GRPOConfig(**grpo_args(str(folder), **{"loss_type": "grpo"} | kwargs), methods=methods)
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None
    return trl_ext.GRPOTrainer(tiny_path(), rewards, args, prompts(), peft_config=peft_config)


def train(
    folder: Path, methods: Mapping[str, Any] | str | None, resume: str | None = None, **kwargs: Any
) -> trl_ext.GRPOTrainer:
    """`make`, trained; `resume`: a checkpoint's folder."""
    trainer = make(folder, methods, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer
