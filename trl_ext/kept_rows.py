"""Dropping rows from a scored batch, so that the loss never forwards them (hook `Method.keep_rows`).

TRL splits a batch into `steps_per_generation` micro-batches of one size and gathers per-row numbers over processes, so
all processes must keep the same number of rows, a multiple of it. The process with most kept rows decides that number
(`room_for`); the others, and an uneven last micro-batch, are filled with dropped rows that have no loss tokens.
TRL's means over rows would count the fillers; `factor` is what corrects them. TRL's own metrics are not corrected: a
micro-batch of fillers alone counts as 0 in them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trl_ext import ops

SCALE = "row_scale"
"""Key of the batch: rows on all processes, fillers included, over kept rows on all processes (0-dim)."""


def room_for(most: int, micro_batches: int) -> int:
    """Rows that each process forwards when the fullest keeps `most`: the next multiple of `micro_batches`, not 0."""
    return max(1, -(-most // micro_batches)) * micro_batches


def without(batch: dict[str, Any], keep: Tensor, room: int) -> dict[str, Any]:
    """A copy of `batch` with `room` rows: those with `keep` (rows,) bool, then dropped ones as fillers, in order.

    Fillers get a `tool_mask` of 0, which takes them out of the loss and leaves attention alone. Values without a first
    dimension of rows pass through.
    """
    chosen = torch.argsort((~keep).int(), stable=True)[:room].sort().values
    short = {key: _rows_of(value, chosen, keep.numel()) for key, value in batch.items()}
    if not keep[chosen].all():
        mask = short.get("tool_mask", torch.ones_like(short["completion_mask"]))
        short["tool_mask"] = mask * keep[chosen].unsqueeze(1).to(mask.dtype)
    return short


def _rows_of(value: Any, chosen: Tensor, rows: int) -> Any:
    if isinstance(value, Tensor) and value.dim() > 0 and value.size(0) == rows:
        return value[chosen.to(value.device)]
    return [value[i] for i in chosen.tolist()] if isinstance(value, list) else value


def scale_of(batch: dict[str, Any]) -> float:
    """What turns a mean over the batch's rows into one over kept rows: 1 if nothing was dropped."""
    return float(batch[SCALE]) if SCALE in batch else 1.0


def factor(batch: dict[str, Any], loss_type: str) -> float:
    """What makes TRL's reduction of `loss_type` count kept rows only: 1 for reductions that divide by tokens."""
    return 1.0 if loss_type in (*ops.TOKEN_MEAN, "bnpo") else scale_of(batch)
