"""A rollout by hand, as `Method.revise` gets it, whose services keep a record of what was asked of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trl_ext.method import Attempt, Metrics, RunShape, Samples

Row = Mapping[str, Any]


@dataclass
class Asked:
    """`sampled`: the rows of every call of `sample`; `fresh`: the arguments of every call of `fresh`."""

    sampled: list[list[Row]] = field(default_factory=list)
    fresh: list[tuple[int, int]] = field(default_factory=list)


def attempt(
    rewards: Any,
    rows: Sequence[Row],
    score: Callable[[Row], float] = lambda row: 0.0,
    pool: Callable[[int, int], list[dict[str, Any]]] = lambda count, number: [],
    **kwargs: Any,
) -> tuple[Attempt, Asked]:
    """`rewards` (P, G) of one reward function, or (P, G, F); a new completion of a row scores `score(row)` (each of F)
    and takes 5 tokens; `fresh(count, number)` is `pool(count, number)`; a prompt has as many tokens as characters.
    """
    found: Tensor = torch.as_tensor(rewards, dtype=torch.float32)
    found = found.unsqueeze(-1) if found.dim() == 2 else found
    asked, functions, made = Asked(), found.size(-1), 0

    def sample(wanted: Sequence[Row]) -> Samples:
        nonlocal made
        asked.sampled.append(list(wanted))
        scores = [[score(row)] * functions for row in wanted]
        first, made = made, made + len(wanted)
        values = torch.tensor(scores).view(-1, functions)
        return Samples(range(100 + first, 100 + made), values, torch.full((len(wanted),), 5))

    def fresh(count: int, number: int) -> list[dict[str, Any]]:
        asked.fresh.append((count, number))
        return pool(count, number)

    common: dict[str, Any] = {"step": 10, "run": RunShape(20, found.size(1), 1), "seed": 0, "metrics": Metrics()}
    names = [f"r{i}" for i in range(functions)]
    common |= {"reward_names": names, "reward_weights": torch.ones(functions)}
    services: dict[str, Any] = {"sample": sample, "fresh": fresh, "prompt_tokens": lambda row: len(text(row))}
    return Attempt(rows=rows, rewards=found, **(common | services | kwargs)), asked


def text(row: Row) -> str:
    """The last turn of a row's prompt."""
    return row["prompt"][-1]["content"]


def question(words: str, **columns: Any) -> dict[str, Any]:
    """A row with a conversation of one user turn."""
    return {"prompt": [{"role": "user", "content": words}], **columns}
