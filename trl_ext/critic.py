"""A critic beside the policy: two value heads on its hidden states, a pessimistic value, an optimizer of its own.

Everything is a plain dictionary of tensors, so that a method can keep it in its state: `heads` {name: tensor}, two
networks stacked along the first dimension. Source: SAFE, arXiv 2602.04651, card safe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.adamw import adamw

from trl_ext import ops

Heads = Mapping[str, Tensor]
WEIGHT_DECAY = 0.01
"""AdamW's default in PyTorch, which the released code uses."""


def new_heads(hidden: int, seed: int) -> dict[str, Tensor]:
    """Two heads MLP(LayerNorm(h)), H -> H/4 -> GELU -> 1, float32, with PyTorch's initialisation of linear layers.

    The LayerNorm is shared by both, as in the released code. `seed` alone decides the weights.
    """
    draw, inner = torch.Generator().manual_seed(seed), max(1, hidden // 4)

    def uniform(fan_in: int, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=draw) * 2 - 1) / fan_in**0.5

    return {
        "norm.weight": torch.ones(hidden),
        "norm.bias": torch.zeros(hidden),
        "first.weight": uniform(hidden, 2, inner, hidden),
        "first.bias": uniform(hidden, 2, inner),
        "second.weight": uniform(inner, 2, inner),
        "second.bias": uniform(inner, 2),
    }


def values(heads: Heads, hidden: Tensor) -> Tensor:
    """V1, V2 (2, B) float32 of hidden states (B, H), outside autocast; differentiable in both arguments."""
    with torch.autocast(hidden.device.type, enabled=False):
        normed = functional.layer_norm(hidden.float(), hidden.shape[-1:], heads["norm.weight"], heads["norm.bias"])
        inner = torch.einsum("bh,kih->kbi", normed, heads["first.weight"]) + heads["first.bias"].unsqueeze(1)
        out = torch.einsum("kbi,ki->kb", functional.gelu(inner), heads["second.weight"])
        return out + heads["second.bias"].unsqueeze(1)


def value_loss(value: Tensor, old: Tensor, target: Tensor, clip: float, delta: float) -> Tensor:
    """0.5 (huber(v, y) + huber(v_clip, y)), v_clip = old + clip(v - old, -c, c): elementwise, any shape."""
    clipped = old + (value - old).clamp(-clip, clip)
    losses = [functional.huber_loss(v, target, reduction="none", delta=delta) for v in (value, clipped)]
    return 0.5 * (losses[0] + losses[1])


def last_states(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, T, H), mask (B, T) -> (B, H): the state that predicts each row's last loss token (its first one's, if none).

    It has read the prompt and all of the answer before that token, which is the end-of-text token of a finished one.
    """
    places = torch.arange(mask.size(1), device=mask.device)
    last = (mask.bool() * places).argmax(1)
    return hidden[torch.arange(hidden.size(0), device=hidden.device), last]


def merged(stats: Tensor, batch: Tensor) -> Tensor:
    """Running [count, mean, variance] (3,) after `batch` (n,), of which the variance is the unbiased one."""
    if batch.numel() == 0:
        return stats.to(batch.device)
    count, mean, variance = stats.to(batch.device).unbind()
    added, total = batch.numel(), count + batch.numel()
    spread = batch.var() if added > 1 else batch.new_zeros(())
    delta = batch.mean() - mean
    squares = variance * count + spread * added + delta.square() * count * added / total
    return torch.stack([total, mean + delta * added / total, squares / total])


def fresh_stats() -> Tensor:
    """(3,) for `merged`: mean 0 and variance 1 that count for a ten-thousandth of a value, as in the released code."""
    return torch.tensor([1e-4, 0.0, 1.0])


def standardised(batch: Tensor, stats: Tensor, eps: float = 1e-8) -> Tensor:
    """(x - mean) / (sqrt(variance) + eps), any shape."""
    _, mean, variance = stats.unbind()
    return (batch - mean) / (variance.sqrt() + eps)


# Training. A critic: {"heads", "exp_avg", "exp_avg_sq", "grad"} of {name: tensor}, "rows" and "updates" 0-dim, "at" the
# optimizer step whose gradient is open.


def new_critic(hidden: int, seed: int, step: int) -> dict[str, Any]:
    """A critic before its first update."""
    heads = new_heads(hidden, seed)
    empty = {part: {k: torch.zeros_like(v) for k, v in heads.items()} for part in ("exp_avg", "exp_avg_sq", "grad")}
    return {"heads": heads, **empty, "rows": torch.zeros(()), "updates": torch.zeros(()), "at": step}


def on_device(critic: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The same critic there; where it is there already, the same tensors."""
    return {
        key: {k: v.to(device) for k, v in part.items()} if isinstance(part, Mapping) else part
        for key, part in critic.items()
    } | {"rows": critic["rows"].to(device)}


def with_rows(
    critic: Mapping[str, Any], hidden: Tensor, rows: Tensor, old: Tensor, target: Tensor, **loss: float
) -> dict[str, Any]:
    """Adds the gradient of the summed loss of states (B, H) to what is open; `rows` (B,) bool says which count.

    `loss`: `weight`, and `alpha`, `clip`, `delta` of `soft_min` and `value_loss`. The states get no gradient.
    """
    with torch.enable_grad():
        leaves = {k: v.detach().requires_grad_() for k, v in critic["heads"].items()}
        value = ops.soft_min(values(leaves, hidden.detach()), loss["alpha"])
        per_row = value_loss(value, old, target.nan_to_num(), loss["clip"], loss["delta"])
        total = loss["weight"] * (per_row * rows).sum()
        grads = torch.autograd.grad(total, list(leaves.values()))
    summed = {k: critic["grad"][k] + g for k, g in zip(leaves, grads, strict=True)}
    return {**critic, "grad": summed, "rows": critic["rows"] + rows.sum()}


def updated(critic: Mapping[str, Any], step: int, lr: float, max_norm: float) -> dict[str, Any]:
    """The critic after AdamW on the mean of its open gradients, clipped to `max_norm`; open again for `step`."""
    heads = {k: v.clone() for k, v in critic["heads"].items()}
    moments = [{k: v.clone() for k, v in critic[part].items()} for part in ("exp_avg", "exp_avg_sq")]
    mean = [g / critic["rows"].clamp(min=1) for g in critic["grad"].values()]
    norm = torch.stack([g.norm() for g in mean]).norm()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    updates = critic["updates"].clone()
    adamw(
        list(heads.values()),
        [g * scale for g in mean],
        list(moments[0].values()),
        list(moments[1].values()),
        max_exp_avg_sqs=[],
        state_steps=[updates.clone() for _ in heads],
        amsgrad=False,
        beta1=0.9,
        beta2=0.999,
        lr=lr,
        weight_decay=WEIGHT_DECAY,
        eps=1e-8,
        maximize=False,
    )
    zeros = {k: torch.zeros_like(v) for k, v in heads.items()}
    return {
        **{"heads": heads, "exp_avg": moments[0], "exp_avg_sq": moments[1], "grad": zeros},
        **{"rows": torch.zeros_like(critic["rows"]), "updates": updates + 1, "at": step},
    }
