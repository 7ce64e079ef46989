"""The GRPO trainer's calls of reward functions: each has its time, and where one fails all processes end together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import is_async_callable

from trl_ext.base import MethodTrainer
from trl_ext.batch import replaced
from trl_ext.rewards.checked import Reward, RewardError, raised
from trl_ext.rewards.time_limit import within, within_async

FAILED = -math.inf
"""What a function that failed gives for its rows, for the other processes to see: TRL gathers rewards, not errors.
Nothing can be learned from rows that are all minus infinity, so no function means it."""


class RewardCalls(MethodTrainer):
    """Mixin right in front of TRL's GRPOTrainer, so that all calls come through it."""

    # Set by TRL's trainer
    reward_func_names: list[str]
    reward_funcs: list[Any]

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Tensor:
        """TRL's. RewardError, on every process, when a function raised or took longer than `reward_seconds`.

        A process whose function failed goes on to TRL's gather before it raises, where the others wait for it.
        """
        failed: list[RewardError] = []
        named = zip(self.reward_funcs, self.reward_func_names, strict=True)
        with replaced(self, reward_funcs=[self._guarded(function, name, failed) for function, name in named]):
            rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # type: ignore[misc]
        if failed:
            raise failed[0]
        if self.accelerator.num_processes > 1:
            self._look_at_others(rewards.view(self.accelerator.num_processes, len(prompts), -1))
        return rewards

    def _guarded(self, function: Any, name: str, failed: list[RewardError]) -> Any:
        """The same function within its time. Of several processes it raises nothing: the error goes to `failed`."""
        if isinstance(function, torch.nn.Module):
            return function
        seconds = getattr(self.args, "reward_seconds", None)  # TRL's own GRPOConfig has none

        def lost(error: Exception, completions: Sequence[Any]) -> list[float]:
            found = error if isinstance(error, RewardError) else raised(name, error, completions)
            if self.accelerator.num_processes == 1:
                raise found from (None if found is error else error)
            failed.append(found)
            return [FAILED] * len(completions)

        def call(completions: Sequence[Any], **kwargs: Any) -> Any:
            try:
                return within(seconds, name, lambda: function(completions=completions, **kwargs))
            except Exception as error:
                return lost(error, completions)

        async def call_async(completions: Sequence[Any], **kwargs: Any) -> Any:
            try:
                return await within_async(seconds, name, function(completions=completions, **kwargs))
            except Exception as error:
                return lost(error, completions)

        guarded: Reward = call_async if is_async_callable(function) else call
        return guarded

    def _look_at_others(self, rewards: Tensor) -> None:
        """`rewards` (world, rows, F). RewardError if a function failed on another process."""
        found = (rewards == FAILED).all(1).nonzero().tolist()
        if found:
            process, function = found[0]
            raise RewardError(
                f"reward '{self.reward_func_names[function]}' failed on process {process}, which says what was wrong"
            )
