"""Warnings while a run goes on: the ways in which a GRPO run learns nothing without failing."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger("trl_ext")

FLAT_LOGS = 3
"""Logs in a row in which no group has any variance before it is said."""
CUT_LOGS = 2
"""Logs in a row in which most completions are cut off before it is said."""


class Watch(TrainerCallback):
    """Says once, with what to change, when all groups are flat or most completions are cut off.

    `warnings` keeps what was said, for the report.
    """

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self._flat = 0
        self._cut = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Reads TRL's metrics of one log."""
        if not state.is_world_process_zero:
            return
        logs = logs or {}
        if "frac_reward_zero_std" in logs:
            self._flat = self._flat + 1 if logs["frac_reward_zero_std"] == 1.0 else 0
            if self._flat == FLAT_LOGS:
                self.say(
                    f"step {state.global_step}: all completions of a prompt got the same reward in {FLAT_LOGS} logs in a "
                    f"row (mean reward {logs.get('reward', float('nan')):.3g}), so there is no policy gradient. Use "
                    "prompts of another difficulty, more completions (num_generations), a higher temperature, or a "
                    "reward with steps in between."
                )
        if "completions/clipped_ratio" in logs:
            self._cut = self._cut + 1 if logs["completions/clipped_ratio"] > 0.5 else 0
            if self._cut == CUT_LOGS:
                self.say(
                    f"step {state.global_step}: {logs['completions/clipped_ratio']:.0%} of the completions are cut off at "
                    f"max_completion_length {args.max_completion_length}, before their answer. Raise it, or check that "
                    "the model ends its turn with the tokenizer's end token."
                )

    def say(self, message: str) -> None:
        """Warns, and remembers it."""
        self.warnings.append(message)
        logger.warning("Warning: %s", message)


def warn_dropped(watch: Watch, dropped: int | None, rows: int | None, limit: int | None) -> None:
    """Says when most prompts are longer than `limit` tokens and were left out. `rows` are those that remain."""
    if dropped and rows is not None and dropped > rows:
        watch.say(
            f"{dropped} of {dropped + rows} prompts are longer than max_prompt_tokens {limit} and are left out. Raise it "
            "if memory allows, or choose data with shorter prompts."
        )
