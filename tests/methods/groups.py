"""A scored rollout as methods see it, made by hand, and what they log about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trl_ext.method import Group, Metrics, RunShape


def made_group(rewards: Any, names: Sequence[str] = ("reward",), weights: Any = None, **changed: Any) -> Group:
    """A Group of `rewards` (P, G, F), or (P, G) for one reward; weights 1 and the rest 0 where nothing else is said."""
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    rewards = rewards.unsqueeze(-1) if rewards.dim() == 2 else rewards
    zeros = torch.zeros(rewards.shape[:2])
    data: dict[str, Any] = {
        "rewards": rewards,
        "advantages": zeros,
        "lengths": zeros,
        "truncated": zeros.bool(),
        "reward_names": names,
        "step": 0,
        "run": RunShape(10, rewards.size(1), 1.0),
        "metrics": Metrics(),
        "reward_weights": torch.ones(len(names)) if weights is None else torch.tensor(weights),
        "seed": 0,
    }
    return Group(**data | changed)


def logged(metrics: Metrics) -> dict[str, float]:
    """Name -> what the trainer would log: nothing where no weight is."""
    return {name: float(total[0] / total[1]) for name, total in metrics.totals.items() if total[1] != 0}
