"""Losses that couple the completions of one prompt (hook `Method.coupled`), although TRL shuffles and splits its rows.

Where sizes allow, the rows of a rollout are put back into whole groups: then a group is in one micro-batch, or at least
in one optimizer step. What a group's loss needs from its other rows is worked out beforehand, without gradient, under
the weights of the coming step (the two-pass form), so the gradient is that of the whole group in any split.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ID, PLACE, MADE_AT = "groups/id", "groups/place", "groups/made_at"
"""Keys of the batch: which prompt of the rollout a row belongs to, which of its completions it is (rows,), and the
optimizer step at which the rollout was made (0-dim)."""
MICRO_BATCH, STEP, ROLLOUT = "micro-batch", "step", "rollout"


def marks(rows: int, rank: int, group: int, step: int, device: torch.device) -> dict[str, Tensor]:
    """The keys above for this process's `rows` of a rollout, whose groups of `group` lie in rank order."""
    place = torch.arange(rank * rows, (rank + 1) * rows, device=device)
    return {ID: place // group, PLACE: place % group, MADE_AT: torch.tensor(step)}  # on the CPU, where it is read


def scope_of(group: int, micro_batch: int, micro_batches: int, accumulation: int, can_move: bool) -> str:
    """What holds whole groups on each process: its micro-batches, its optimizer steps, or only all rollouts together.

    `micro_batches` of a rollout, `accumulation` of a step; `can_move`: whether rows may be put in another order.
    """
    if not can_move or micro_batch * micro_batches % group:
        return ROLLOUT
    if micro_batch % group == 0:
        return MICRO_BATCH
    in_steps = micro_batches % accumulation == 0 and micro_batch * accumulation % group == 0
    return STEP if in_steps or accumulation % micro_batches == 0 else ROLLOUT


def together(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The micro-batches of one rollout with their rows in whole groups; groups keep the order of their first rows."""
    ids = torch.cat([batch[ID] for batch in batches])
    first: dict[int, int] = {}
    order = sorted(range(len(ids)), key=lambda i: first.setdefault(int(ids[i]), len(first)))
    rows, size = torch.tensor(order), batches[0][ID].numel()
    joined = {key: _joined([batch[key] for batch in batches]) for key in batches[0]}
    return [{key: _chosen(value, chosen) for key, value in joined.items()} for chosen in rows.split(size)]


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor) and values[0].dim() > 0:
        return torch.cat(values)
    return list(itertools.chain(*values)) if isinstance(values[0], list) else values[0]


def _chosen(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor) and value.dim() > 0:
        return value[rows.to(value.device)]
    return [value[i] for i in rows.tolist()] if isinstance(value, list) else value


def arranged(
    batches: Sequence[Mapping[str, Any]], group: int, gather: Callable[[Tensor], tuple[Tensor, slice]] | None
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """(rows,) -> (P, G) and back, for the rows of `batches`; with `gather` the groups of all processes.

    Raises ValueError when a group is not whole.
    """
    gather = gather or (lambda values: (values, slice(None)))
    ids, mine = gather(torch.cat([batch[ID] for batch in batches]))
    places, _ = gather(torch.cat([batch[PLACE] for batch in batches]))
    found, index = ids.unique(return_inverse=True)
    if ids.numel() != found.numel() * group:
        raise ValueError(f"{ids.numel()} rows of {found.numel()} groups are not whole groups of {group}")

    def by_group(values: Tensor) -> Tensor:
        everyone, _ = gather(values)
        table = everyone.new_empty(found.numel(), group)
        table[index, places] = everyone
        return table

    return by_group, lambda table: table[index, places][mine]
