"""Preference pairs and settings for DPO on the tiny model of `tests.tiny`."""

from __future__ import annotations

from datasets import Dataset


def pairs(n: int = 12) -> Dataset:
    """Prompts with a chosen and a rejected text, of different lengths; some are longer than `max_length`."""
    return Dataset.from_dict(
        {
            "prompt": [f"{i} + {i * 7 % 5} = " for i in range(n)],
            "chosen": ["yes" * (1 + i % 3) for i in range(n)],
            "rejected": ["no" * (1 + i % 4) for i in range(n)],
        }
    )


def dpo_args(output_dir: str, **kwargs: object) -> dict:
    """Keyword arguments for TRL's or our DPOConfig: 3 steps of 4 pairs, CPU, quiet."""
    settings = {
        "output_dir": output_dir,
        "per_device_train_batch_size": 4,
        "max_length": 16,
        "max_steps": 3,
        "learning_rate": 3e-3,
        "beta": 0.2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return settings | kwargs
