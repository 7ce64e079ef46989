"""High-entropy tokens (80/20): only the tokens at which the model really chooses get a policy gradient.

Paper: "Beyond the 80/20 Rule", arXiv 2506.01939. Card: high_entropy. With rho = 1 - quantile, over valid tokens:

    H_t = -sum_v p_t(v) log p_t(v)       detached; p at the sampling temperature, of the current policy
    J   = (1/Z) sum_t 1[H_t among the top rho of the batch] min(r A, clip(r) A)
    Z   = number of kept tokens (official code; card: decision), or of all tokens (TRL's `top_entropy_quantile`)

The mask scales the policy term alone: KL and entropy bonus keep all tokens, as in the official code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ext import ops
from trl_ext.method import ENTROPY_AT_ROLLOUT, LossInput, Method, Rollout, Setup, param


def high_entropy_mask(entropy: Tensor, quantile: float, selection: str = "topk", lowest: bool = False) -> Tensor:
    """Which of n tokens are kept: entropy (n,) -> (n,) bool. rho = 1 - quantile.

    "topk" (official code): exactly max(1, ceil(rho n)) tokens; of ties, which the first tokens of one prompt always
    are, the row order picks. "quantile" (TRL): H >= the `quantile` of H with linear interpolation, every tied token
    included. `lowest` keeps the other end (ablation).
    """
    n = entropy.numel()
    if n == 0:
        return torch.zeros_like(entropy, dtype=torch.bool)
    if selection == "topk":
        return ops.top_k_mask(entropy, max(1, int((1 - quantile) * n + 0.9999)), largest=not lowest)
    if lowest:
        return entropy <= linear_quantile(entropy, 1 - quantile)
    return entropy >= linear_quantile(entropy, quantile)


def linear_quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile of (n,) values with linear interpolation, as torch.quantile, without its limit of 2^24 values."""
    ordered = values.sort().values
    position = q * (values.numel() - 1)
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    return torch.lerp(low, high, position - math.floor(position))


def kept_weights(keep: Tensor, mask: Tensor, loss_type: str, all_over_kept: Tensor) -> Tensor:
    """(B, T) weights that turn TRL's denominators into counts of kept tokens.

    grpo, sapo: each row's count over its kept count; bnpo: the same over this micro-batch; dapo, cispo, vespo:
    `all_over_kept`, n / kept over everything that was ranked, (1,) or one value per row (B, 1).
    """
    keep = keep * mask
    if loss_type in ops.SEQUENCE_MEAN:
        return keep * (mask.sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1))
    if loss_type == "bnpo":
        return keep * (mask.sum() / keep.sum().clamp(min=1))
    return keep * all_over_kept


@dataclass(frozen=True)
class HighEntropy(Method):
    """Keeps the policy gradient of the most uncertain tokens.

    quantile = 0 keeps all tokens and is TRL bit for bit. With normalizer "all" and selection "quantile" it equals
    TRL's `top_entropy_quantile = 1 - quantile`. The mask carries no gradient.
    """

    name = "high_entropy"
    title = (
        "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM Reasoning"
    )
    paper = "2506.01939"
    headline = ("threshold", "kept_fraction")

    quantile: float = param(
        0.8, "tokens below this entropy quantile drop out; kept share rho = 1 - it", source="card: paper", ge=0, lt=1
    )
    normalizer: str = param(
        "kept",
        "denominator: kept tokens (paper) or all tokens (TRL's top_entropy_quantile)",
        source="card: official code",
        choices=("kept", "all"),
    )
    selection: str = param(
        "topk",
        "exactly ceil(rho n) tokens, or all at the threshold",
        source="card: official code",
        choices=("topk", "quantile"),
    )
    scope: str = param(
        "micro_batch",
        "tokens that are ranked together: the micro-batch of all processes, or the generation batch at rollout time",
        source="card: official code, but over all processes as TRL does",
        choices=("micro_batch", "generation_batch"),
    )
    lowest: bool = param(False, "keep the lowest entropies instead: the paper's ablation", source="card: ablation")

    def needs(self) -> frozenset[str]:
        return frozenset({ENTROPY_AT_ROLLOUT}) if self._at_rollout else frozenset()

    def cost(self) -> str:
        return "one forward without gradient per rollout" if self._at_rollout else "a sort of the token entropies"

    def check(self, setup: Setup) -> list[str]:
        problems = []
        if getattr(setup.args, "importance_sampling_level", "token") == "sequence":
            problems.append(
                "a sequence-level ratio spreads every kept token's gradient over the whole sequence; set "
                "importance_sampling_level: token"
            )
        if getattr(setup.args, "top_entropy_quantile", 1.0) < 1.0:
            problems.append(
                "TRL's own entropy mask is on too; leave top_entropy_quantile at 1.0 and use quantile here"
            )
        loss_type = getattr(setup.args, "loss_type", "grpo")
        if self.normalizer == "kept" and loss_type in ("dr_grpo", "luspo"):
            problems.append(
                f"loss_type {loss_type} does not divide by a token count, so 'kept' has no meaning there; set "
                "normalizer: all, or loss_type: dapo"
            )
        return problems

    @property
    def _at_rollout(self) -> bool:
        return self.scope == "generation_batch" and self.quantile > 0

    def streams(self, rollout: Rollout) -> dict[str, Tensor]:
        if not self._at_rollout:
            return {}
        keep, all_over_kept, threshold = self._select(rollout.entropies(), rollout.mask, rollout.gather)
        rollout.metrics.mean("threshold", threshold)
        return {"keep": keep, "all_over_kept": all_over_kept.expand(keep.size(0))}

    def token_weights(self, weights: Tensor, x: LossInput) -> Tensor:
        if self.quantile == 0:
            return weights
        if self._at_rollout:
            keep, all_over_kept = x.streams["keep"] * x.mask, x.streams["all_over_kept"].unsqueeze(1)
        else:
            keep, all_over_kept, threshold = self._select(x.entropy.detach(), x.mask, x.gather)
            x.metrics.mean("threshold", threshold)
        x.scratch["keep"] = keep
        self._log(x, keep)
        if self.normalizer == "kept":
            return weights * kept_weights(keep, x.mask, x.loss_type, all_over_kept)
        return weights * keep

    def _select(
        self, entropy: Tensor, mask: Tensor, gather: Callable[[Tensor], tuple[Tensor, slice]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, T) -> the mask (rows, T) float, ranked over all processes; n / kept (1,); the last kept entropy."""
        valid = mask.bool()
        everyone, mine = gather(entropy[valid].float())
        kept = high_entropy_mask(everyone, self.quantile, self.selection, self.lowest)
        keep = torch.zeros_like(entropy).masked_scatter(valid, kept[mine].to(entropy.dtype))
        last = everyone.masked_fill(~kept, -math.inf if self.lowest else math.inf)
        threshold = (last.max() if self.lowest else last.min()) if kept.numel() else last.new_zeros(())
        return keep, (kept.numel() / kept.sum().clamp(min=1)).view(1), threshold

    def _log(self, x: LossInput, keep: Tensor) -> None:
        entropy, mask = x.entropy.detach(), x.mask.float()
        x.metrics.mean("kept_fraction", keep, mask)
        x.metrics.mean("entropy_kept", entropy, keep)
        x.metrics.mean("entropy_dropped", entropy, mask - keep)

    def observe_loss(self, x: LossInput) -> None:
        """Counts kept tokens by id on this process, for the list of frequent ones in the report."""
        if "keep" not in x.scratch:
            return
        counts = torch.bincount(x.completion_ids[x.scratch["keep"].bool()].cpu())
        seen = self.state.get("kept_counts", counts.new_zeros(0))
        size = max(len(counts), len(seen))
        padded = [torch.nn.functional.pad(c, (0, size - len(c))) for c in (counts, seen)]
        self.state["kept_counts"] = padded[0] + padded[1]

    def summary(self, decode_one: Callable[[int], str]) -> list[str]:
        counts = Counter(dict(enumerate(self.state.get("kept_counts", torch.zeros(0)).tolist())))
        common = [f"{decode_one(token)!r} {int(n)}" for token, n in counts.most_common(12) if n]
        return [f"most frequent kept tokens: {', '.join(common)}"] if common else []
