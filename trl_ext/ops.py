"""Tensor maths that several methods share. Letters as in `method.py`; nothing here knows a trainer or a config."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SEQUENCE_MEAN = ("grpo", "sapo")
TOKEN_MEAN = ("dapo", "cispo", "vespo")
LOSS_TYPES = ("grpo", "sapo", "bnpo", "dr_grpo", "dapo", "cispo", "vespo", "luspo")


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    loss_type: str,
    *,
    num_items: Tensor | float,
    steps_per_generation: int,
    max_completion_length: int,
    accumulation: int = 1,
) -> Tensor:
    """(B, T) -> scalar with the denominators of TRL's `loss_type`, in TRL's order of operations.

    grpo, sapo: mean over rows of (row sum / row mask). bnpo: sum / mask sum. dr_grpo: sum / (B * max length).
    luspo: mean over rows of row sums. dapo, cispo, vespo: sum / (num_items / steps_per_generation), where `num_items`
    counts the loss tokens of the generation batch per process. Then divided by `accumulation`.

    Raises ValueError for an unknown `loss_type`. Source: TRL.md section 4.
    """
    masked = per_token * mask
    if loss_type in TOKEN_MEAN:
        return masked.sum() / (num_items * accumulation / steps_per_generation)
    if loss_type in SEQUENCE_MEAN:
        loss = (masked.sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    elif loss_type == "bnpo":
        loss = masked.sum() / mask.sum().clamp(min=1.0)
    elif loss_type == "dr_grpo":
        loss = masked.sum() / (per_token.size(0) * max_completion_length)
    elif loss_type == "luspo":
        loss = masked.sum(-1).mean()
    else:
        raise ValueError(f"loss_type '{loss_type}' is not one of {', '.join(LOSS_TYPES)}")
    return loss / accumulation


def top_k_mask(scores: Tensor, k: int, largest: bool = True) -> Tensor:
    """(N,) -> (N,) bool: exactly k True (or N if fewer), the largest or the smallest scores; ties go to torch.topk."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[torch.topk(scores, min(k, scores.numel()), largest=largest, sorted=False).indices] = True
    return mask


def soft_min(values: Tensor, alpha: float, dim: int = 0) -> Tensor:
    """-alpha log mean_k exp(-v_k / alpha) along `dim`, which goes: between min (alpha -> 0) and mean (alpha -> inf).

    For value heads (SAFE, arXiv 2602.04651, alpha 0.3) and for ensembles of reward models on one scale. Has a gradient.
    Raises ValueError unless alpha > 0.
    """
    if alpha <= 0:
        raise ValueError(f"soft_min: alpha is {alpha}, it must be above 0; for the plain minimum use torch.amin")
    return -alpha * (torch.logsumexp(-values / alpha, dim=dim) - math.log(values.size(dim)))
