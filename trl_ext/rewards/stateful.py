"""Reward functions with a memory: it is kept in checkpoints, and nothing is learned in an evaluation.

To TRL a reward is a function of its arguments. One that learns from what it scores, such as `reward_ensemble` with
`normalize: running_z`, also has the three functions of `StatefulReward`, which `trl_ext.GRPOTrainer` calls: a resumed run
then equals one that was not stopped, and the rewards of training do not depend on whether, and when, there was an
evaluation. Stock TRL calls none of them: its checkpoints do not hold the memory, and its evaluations move it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from trl_ext.rewards.checked import Reward


@runtime_checkable
class StatefulReward(Protocol):
    """Attributes of a reward function, or methods of a callable object; all three, or it counts as without state."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, text, and containers of them; every process keeps its own."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave; ValueError if that was of another function or other settings."""

    def train(self, mode: bool = True) -> None:
        """Whether calls from now on may change the state; False around an evaluation."""


def stateful(rewards: Iterable[Reward | str | torch.nn.Module]) -> list[tuple[str, StatefulReward]]:
    """Names and functions of those with a state, looked for beneath `functools.wraps`.

    A module is a reward model: its functions of these names are about weights, and it learns nothing.
    """
    found = []
    for reward in rewards:
        inner = inspect.unwrap(reward) if callable(reward) else reward
        if isinstance(inner, StatefulReward) and not isinstance(inner, torch.nn.Module):
            found.append((getattr(reward, "__name__", type(reward).__name__), inner))
    return found


def states_of(rewards: Iterable[Any]) -> list[dict[str, Any]]:
    """[{"name", "state"}] of the `stateful` ones, in order."""
    return [{"name": name, "state": reward.state_dict()} for name, reward in stateful(rewards)]


def load_states(rewards: Iterable[Any], saved: Sequence[dict[str, Any]]) -> None:
    """Puts back what `states_of` gave. ValueError if that was of other rewards or other settings."""
    found = stateful(rewards)
    before, now = [entry["name"] for entry in saved], [name for name, _ in found]
    if before != now:
        raise ValueError(f"it holds the state of rewards {before or 'none'}, and here are {now or 'none'} with one")
    for (name, reward), entry in zip(found, saved, strict=True):
        try:
            reward.load_state_dict(entry["state"])
        except ValueError as error:
            raise ValueError(f"reward {name}: {error}") from error


@contextlib.contextmanager
def resting(rewards: Iterable[Any]) -> Iterator[None]:
    """Within this block the `stateful` ones score and learn nothing."""
    found = stateful(rewards)
    for _, reward in found:
        reward.train(False)
    try:
        yield
    finally:
        for _, reward in found:
            reward.train(True)
