"""D3S: train on the rollouts whose advantages differ most, and in them on the tokens with the largest |A| x entropy.

Paper: "Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy Optimization",
arXiv 2509.22115. Card: d3s. For the pool of M = P * G rollouts of one generation batch, p = step / max_steps:

    A_i  = TRL's advantage, normalised in the full group and never again
    S    = argmax over subsets of the pool with |S| = N of Var(A_S)       population variance; all processes together
    key  = |w_{i,t} A_{i,t}| * H_{i,t};  keep the top K of all valid tokens of S, in one ranking     H detached
    [N(p) / M, K(p)] = (1 - p) [N_init, K_init] + p [N_final, K_final]

A_{i,t} is A_i and w is 1 unless other methods change them: the key takes the advantages that all of them made, and the
weights of those that are named before it. Dropped tokens get weight 0, so nothing puts loss back on them.
With `scope: generation_batch` tokens are ranked before the loss, by the sequence's A_i alone.

Only the policy term is cut to the kept tokens; the reference KL counts all tokens of kept rollouts (card: inferred).
Dropped rollouts leave the batch before the loss's forward and backward (`keep_rows`). What TRL's contract forbids: the
old and the reference log-probs are computed before advantages exist, so for all M, and micro-batches keep one size on
all processes, so a few dropped rollouts may stay in as fillers without loss. With per_device_train_batch_size 1 and one
rollout per step nothing is saved; the metric `rows_forwarded` says what was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_ext import ops
from trl_ext.method import ENTROPY_AT_ROLLOUT, LossInput, Method, Rollout, RunShape, Setup, param
from trl_ext.methods.grpo.high_entropy import kept_weights


def linear(progress: float, start: float, end: float) -> float:
    """(1 - p) start + p end."""
    return (1 - progress) * start + progress * end


def max_variance_subset(values: Tensor, size: int, order: Tensor) -> Tensor:
    """(n,) values -> (n,) bool: the subset of `size` values with the largest population variance.

    The best subset is the lo smallest and the size - lo largest for some lo: all lo are scanned, O(n log n). Of equal
    values (to 1e-6) those that come first in `order` (n,), a permutation, count as smaller; of equal variances the one
    with more of the largest values wins.
    """
    values = values.double().round(decimals=6)
    n, ranked = values.numel(), order[torch.argsort(values[order], stable=True)]
    ordered = values[ranked]
    sums, squares = (torch.cat([ordered.new_zeros(1), x.cumsum(0)]) for x in (ordered, ordered.square()))
    low = torch.arange(size + 1)
    high = n - size + low
    total, total_squares = (x[low] + x[-1] - x[high] for x in (sums, squares))
    lo = int((total_squares / size - (total / size).square()).round(decimals=9).argmax())
    keep = torch.zeros(n, dtype=torch.bool)
    keep[ranked[:lo]] = True
    keep[ranked[n - size + lo :]] = True
    return keep


def select_rollouts(advantages: Tensor, seed: int, in_group: int | None = None, in_pool: int | None = None) -> Tensor:
    """(P, G) advantages -> (P, G) bool: at most `in_group` of each group, then `in_pool` of what is left; None is all.

    Ties are broken at random from `seed`. A pool of zeros has no variance to choose by and is kept whole.
    """
    advantages = advantages.detach().cpu()
    keep = torch.ones(advantages.shape, dtype=torch.bool)
    if not advantages.any():
        return keep
    draw = torch.Generator().manual_seed(seed)
    groups, size = advantages.shape
    if in_group is not None and in_group < size:
        orders = [torch.randperm(size, generator=draw) for _ in range(groups)]
        chosen = [max_variance_subset(a, in_group, o) for a, o in zip(advantages, orders, strict=True)]
        keep = torch.stack(chosen)
    left = keep.flatten().nonzero().squeeze(1)
    if in_pool is not None and in_pool < left.numel():
        order = torch.randperm(left.numel(), generator=draw)
        best = max_variance_subset(advantages.flatten()[left], in_pool, order)
        keep = torch.zeros_like(keep).flatten().index_fill(0, left[best], True).view(groups, size)
    return keep


def select_tokens(keys: Tensor, share: float) -> Tensor:
    """(n,) keys -> (n,) bool: the max(1, ceil(share n)) largest. All of them where every key is 0: nothing to rank."""
    if keys.numel() == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    count = max(1, math.ceil(share * keys.numel() - 1e-6))  # 0.2 + 0.15 is not 0.35
    return ops.top_k_mask(keys, count) | (keys.max() <= 0)


MEASURES = "one measures the policy on all rollouts, and d3s leaves it only their extremes; name only one of them"


@dataclass(frozen=True)
class D3S(Method):
    """Keeps the rollouts of largest advantage variance and their tokens of largest |A| x entropy, more of both with time.

    All four shares at 1 is TRL bit for bit. It ranks tokens by the final advantages, and by the token weights of methods
    named before it; weights of methods named after it scale the tokens that stay. With a sequence-level ratio (GSPO)
    the token stage only weights each sequence's term. Metrics: see `_log_rollouts` and `_log_tokens`.
    """

    name = "d3s"
    title = "Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy Optimization"
    paper = "2509.22115"
    conflicts: ClassVar = {
        "high_entropy": "both pick tokens by entropy and divide by what is left; name d3s alone, or high_entropy alone",
        "real": "it drops group members too, and groups become ragged; name only one of them",
        **dict.fromkeys(("epo", "dcpo", "velocity_rank"), MEASURES),
    }
    headline = ("N", "K", "var_after", "token_use")

    sample_start: float = param(
        0.25, "N_init, share of rollouts kept at the start", source="card: a choice, not seen in the paper", gt=0, le=1
    )
    sample_end: float = param(
        0.5, "N_final, share of rollouts kept at the end", source="card: a choice, not seen in the paper", gt=0, le=1
    )
    token_start: float = param(
        0.2, "K_init, share of their tokens kept at the start", source="card: a choice, not seen", gt=0, le=1
    )
    token_end: float = param(
        0.5, "K_final, share of their tokens kept at the end", source="card: a choice, not seen", gt=0, le=1
    )
    sample_stage: str = param(
        "cross",
        "cross: N of the pool; intra: of each group (D3S-I); intra+cross: group_keep of each group, N of what is left",
        source="card: open question 3, its default",
        choices=("cross", "intra", "intra+cross"),
    )
    group_keep: int | None = param(
        None,
        "n_q, rollouts kept in each group; none with intra: the scheduled share of G",
        source="card: a choice, off",
        ge=1,
    )
    normalizer: str = param(
        "kept",
        "denominator: kept tokens and rollouts, or the original count (a smaller step). A KL term always counts the kept",
        source="card: open question 2, its recommendation",
        choices=("kept", "original"),
    )
    scope: str = param(
        "micro_batch",
        "tokens ranked together: the micro-batch of all processes, or the generation batch at rollout time (then by the "
        "sequence advantages, without other methods' token advantages and weights)",
        source="card: open question 5",
        choices=("micro_batch", "generation_batch"),
    )
    seed: int = param(0, "of the random order that breaks ties", source="card: open question 4", ge=0)

    # What it declares

    @property
    def _samples(self) -> bool:
        return min(self.sample_start, self.sample_end) < 1 or self.group_keep is not None

    @property
    def _cuts_tokens(self) -> bool:
        return min(self.token_start, self.token_end) < 1

    @property
    def _at_rollout(self) -> bool:
        return self._cuts_tokens and self.scope == "generation_batch"

    def needs(self) -> frozenset[str]:
        return frozenset({ENTROPY_AT_ROLLOUT}) if self._at_rollout else frozenset()

    def cost(self) -> str:
        saved = (
            "the loss forwards only kept rollouts, rounded up to whole micro-batches; generation and old or reference "
        )
        saved += "log-probs still run for all"
        extra = "one forward without gradient per rollout for entropies" if self._at_rollout else "two sorts"
        return f"{extra}; {saved}" if self._samples else extra

    def check(self, setup: Setup) -> list[str]:
        loss_type = getattr(setup.args, "loss_type", "grpo")
        group = getattr(setup.args, "num_generations", None)
        by_kept_tokens = self.normalizer == "kept" and self._cuts_tokens
        wrong = {
            "TRL's own entropy mask is on too; leave top_entropy_quantile at 1.0": getattr(
                setup.args, "top_entropy_quantile", 1.0
            )
            < 1,
            f"loss_type {loss_type} does not divide by a token count, so kept tokens have no meaning there; set "
            "normalizer: original, loss_type: dapo, or token_start and token_end: 1": by_kept_tokens
            and loss_type in ("dr_grpo", "luspo"),
            "sample_stage intra+cross needs group_keep, the rollouts to keep in each group": self.sample_stage
            == "intra+cross"
            and self.group_keep is None,
            "group_keep belongs to the stage inside groups; set sample_stage: intra, or intra+cross": self.sample_stage
            == "cross"
            and self.group_keep is not None,
            f"group_keep {self.group_keep} is more than num_generations {group}": group is not None
            and (self.group_keep or 0) > group,
            "loss_type bnpo averages each micro-batch over its own tokens, and one of dropped rollouts alone would count as "
            "0; set loss_type: grpo or dapo, or sample_start and sample_end: 1": self._samples and loss_type == "bnpo",
            "TRL's entropy bonus averages over micro-batches, and one of dropped rollouts alone would count as 0; leave "
            "entropy_coef at 0 and use_adaptive_entropy off, or set sample_start and sample_end: 1": self._samples
            and _entropy_bonus(setup.args),
            "drops rows from the batch, which is text-only so far; train a text model": bool(setup.images)
            and self._samples,
        }
        return [message for message, found in wrong.items() if found]

    # Rollout

    def keep_rows(self, rollout: Rollout) -> Tensor | None:
        if not self._samples:
            return None
        everyone, mine = rollout.gather(rollout.advantages)
        keep = self._select(everyone, rollout)
        self._log_rollouts(rollout, everyone, keep)
        return None if keep.all() else keep[mine]

    def _select(self, everyone: Tensor, rollout: Rollout) -> Tensor:
        """(M,) advantages of all processes -> (M,) bool, the same on each of them."""
        size = rollout.run.num_generations
        share = linear(_progress(rollout.step, rollout.run), self.sample_start, self.sample_end)
        in_group, in_pool = self.group_keep, max(2, round(share * everyone.numel()))  # one alone has no variance
        if self.sample_stage == "intra":
            in_group, in_pool = in_group or min(size, max(2, round(share * size))), everyone.numel()
        seed = self.seed * 1_000_003 + rollout.step
        return select_rollouts(everyone.view(-1, size), seed, in_group, in_pool).flatten().to(everyone.device)

    def streams(self, rollout: Rollout) -> dict[str, Tensor]:
        """Per row: tokens generated for each kept row, shares for the original count, and the token mask if it is made
        here."""
        if not (self._samples or self._cuts_tokens):
            return {}
        everyone, mine = rollout.gather(rollout.advantages)
        keep = self._select(everyone, rollout) if self._samples else torch.ones_like(everyone, dtype=torch.bool)
        tokens, _ = rollout.gather(rollout.mask.sum(1).to(everyone.dtype))
        kept_tokens = tokens[keep].sum()
        found = {
            "generated": keep[mine] * (tokens.sum() / keep.sum()),
            "row_share": keep.float().mean().expand(rollout.mask.size(0)),
            "token_share": (kept_tokens / tokens.sum().clamp(min=1)).expand(rollout.mask.size(0)),
        }
        if self._at_rollout:
            found |= self._tokens_at_rollout(rollout, keep[mine])
        return found

    def _tokens_at_rollout(self, rollout: Rollout, keep: Tensor) -> dict[str, Tensor]:
        """The token mask (rows, T) and n / kept per row, ranked over the kept rollouts of all processes."""
        share = self._token_share(rollout.step, rollout.run)
        mask = rollout.mask * keep.unsqueeze(1)
        tokens, all_over_kept = _rank(rollout.advantages, rollout.entropies(), mask, share, rollout.gather)
        return {"tokens": tokens, "all_over_kept": all_over_kept.expand(mask.size(0))}

    def _log_rollouts(self, rollout: Rollout, everyone: Tensor, keep: Tensor) -> None:
        kept = everyone[keep]
        values = {
            "N": keep.sum(),
            "var_before": everyone.var(correction=0),
            "var_after": kept.var(correction=0),
            "nonzero_before": (everyone != 0).float().mean(),
            "nonzero_kept": (kept != 0).float().mean(),
            "positive_kept": (kept > 0).float().mean(),
        }
        for name, value in values.items():
            rollout.metrics.mean(name, value)

    # Loss

    def _token_share(self, step: int, run: RunShape) -> float:
        return linear(_progress(step, run), self.token_start, self.token_end)

    def token_weights(self, weights: Tensor, x: LossInput) -> Tensor:
        """Weights (B, T) that are 0 on dropped tokens and carry the change of denominator on kept ones."""
        if not (self._samples or self._cuts_tokens):
            return weights
        keep = self._kept_tokens(weights, x)
        self._log_tokens(x, x.mask.to(x.entropy.dtype) if keep is None else keep[0])
        if keep is not None:
            own = kept_weights(keep[0], x.mask, x.loss_type, keep[1]) if self.normalizer == "kept" else keep[0]
            weights = weights * own
        if self.normalizer == "original" and self._samples:
            share = x.streams["token_share" if x.loss_type in ops.TOKEN_MEAN else "row_share"]
            weights = weights * share.unsqueeze(1)
        return weights

    def _kept_tokens(self, weights: Tensor, x: LossInput) -> tuple[Tensor, Tensor] | None:
        """The token mask (B, T) and n / kept, (1,) or (B, 1); None when all tokens stay."""
        if not self._cuts_tokens:
            return None
        if self._at_rollout:
            return x.streams["tokens"] * x.mask, x.streams["all_over_kept"].unsqueeze(1)
        share = self._token_share(x.step, x.run)
        return _rank(_per_token(x.advantages) * weights, x.entropy.detach(), x.mask, share, x.gather)

    def _log_tokens(self, x: LossInput, keep: Tensor) -> None:
        entropy, generated = x.entropy.detach(), x.streams["generated"].sum()
        x.metrics.mean("K", self._token_share(x.step, x.run))
        x.metrics.mean("token_use", keep.sum() / generated.clamp(min=1), generated)
        x.metrics.mean("entropy_kept", entropy, keep)
        x.metrics.mean("entropy_dropped", entropy, x.mask - keep)


def _progress(step: int, run: RunShape) -> float:
    return min(1.0, step / max(1, run.max_steps))


def _entropy_bonus(args: Any) -> bool:
    return bool(getattr(args, "entropy_coef", 0.0) or getattr(args, "use_adaptive_entropy", False))


def _per_token(advantages: Tensor) -> Tensor:
    return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages


def _rank(
    advantages: Tensor,
    entropy: Tensor,
    mask: Tensor,
    share: float,
    gather: Callable[[Tensor], tuple[Tensor, slice]],
) -> tuple[Tensor, Tensor]:
    """Ranks the tokens under `mask` (rows, T) of all processes -> their mask (rows, T) float and n / kept (1,)."""
    valid = mask.bool()
    everyone, mine = gather((_per_token(advantages).detach().abs() * entropy)[valid].float())
    kept = select_tokens(everyone, share)
    keep = torch.zeros_like(entropy).masked_scatter(valid, kept[mine].to(entropy.dtype))
    return keep, (kept.numel() / kept.sum().clamp(min=1)).view(1)
