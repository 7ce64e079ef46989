"""A random model that is made to call the calculator as a script says, through TRL's own tool loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM

import trl_ext
from tests.tiny import QUIET
from trl_ext.sandbox import calculator
from trl_ext.sandbox.model import sandbox_tokenizer

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12+3"}}\n</tool_call>'
END = "<|im_end|>"
Script = Callable[[int], Sequence[tuple[int, bool]]]
"""Optimizer step -> for each row, in how many turns it calls, and whether its answer is right."""


def right(completions: list, **kwargs: object) -> list[float]:
    """1 for a last turn that says 15."""
    return [float(c[-1]["content"].strip().endswith("15")) for c in completions]


def spoke(completions: list, **kwargs: object) -> list[float]:
    """A format that every completion has."""
    return [1.0 for _ in completions]


def random_model(words: Any) -> Qwen3ForCausalLM:
    """A two-layer model over this tokenizer's vocabulary, the same each time."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def tool_trainer(
    folder: Path, methods: Any, script: Script, cls: type = trl_ext.GRPOTrainer, per_turn: int = 1, **kwargs: Any
) -> Any:
    """A trainer whose rollouts follow `script`: one prompt over and over, 4 rows per rollout, `per_turn` calls per turn."""
    words = sandbox_tokenizer()
    rewards = kwargs.pop("rewards", [right])
    args = QUIET | {"output_dir": str(folder), "num_generations": 4, "per_device_train_batch_size": 4}
    args |= {"max_completion_length": 256, "max_steps": 2, "loss_type": "grpo", "learning_rate": 1e-2}
    ours = cls is trl_ext.GRPOTrainer
    config_of = trl_ext.GRPOConfig(**args | kwargs, methods=methods) if ours else trl.GRPOConfig(**args | kwargs)
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "What is 12+3?"}]}] * 4)
    trainer = cls(
        random_model(words),
        rewards,
        config_of,
        data,
        processing_class=words,
        tools=[calculator],
    )
    left: list[tuple[int, bool]] = []

    def generate(ids: list, *rest: Any, **more: Any) -> tuple[list[list[int]], None]:
        if not left:
            left.extend(script(trainer.state.global_step))
        assert len(ids) == len(left)
        texts = [CALL * per_turn if calls else "it is 15" if good else "it is 14" for calls, good in left]
        left[:] = [(calls - 1, good) for calls, good in left if calls]
        return [words(text + END)["input_ids"] for text in texts], None

    trainer._generate_single_turn = generate
    return trainer
