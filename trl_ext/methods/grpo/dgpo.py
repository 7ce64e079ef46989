"""DGPO: tokens at which an uncertain policy has left its reference get more of the sequence's advantage, others less.

Paper: "Distribution-Guided Policy Optimization for Fine-Grained Credit Assignment", arXiv 2605.03327. Card: dgpo.
With pi the policy, ref the frozen starting model, T_i valid tokens of sequence i, V the vocabulary, all detached:

    d_t = 1 - sum_v sqrt(pi_t(v) ref_t(v))        squared Hellinger distance, in [0, 1]
    h_t = -sum_v pi_t(v) log pi_t(v) / log V      in [0, 1]
    s_t = d_t h_t^kappa
    w_t = T_i exp(s_t / tau) / sum_j exp(s_j / tau)
    J   = mean_i 1/T_i sum_t min(r_t w_t A_i, clip(r_t) w_t A_i)        no KL term; aggregated as `loss_type` says

Both distributions are at the sampling temperature (card: inferred, TRL's entropy is). At the start d = 0 and w = 1.
The card's ablation with pi_old as the reference is not offered: with one update per rollout it is d = 0 throughout.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trl_ext.forward import per_position_detached
from trl_ext.method import HIDDEN, POLICY, REFERENCE, LossInput, Method, Rollout, Setup, param


def hellinger(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(N, V) twice -> (N,) squared Hellinger distance 1 - sum_v sqrt(p q): symmetric, 0 for p = q, 1 if disjoint."""
    overlap = torch.add(log_p, log_q).mul_(0.5).exp_().sum(-1)  # one buffer of (N, V); terms are in [0, 1]
    return (1 - overlap).clamp(0.0, 1.0)  # rounding leaves [0, 1] by 1e-7


def token_scores(distance: Tensor, entropy: Tensor, vocab: int, kappa: float) -> Tensor:
    """d h^kappa, elementwise; `entropy` in nats, h = entropy / log V. kappa = 0 ignores the entropy."""
    return distance * (entropy / math.log(vocab)).clamp(0.0, 1.0) ** kappa


def mean_one_weights(scores: Tensor, mask: Tensor, tau: float) -> Tensor:
    """(B, T) scores and mask -> (B, T) weights: a softmax over each row's valid tokens times their number.

    Mean 1 over valid tokens, 0 elsewhere; largest over smallest at most exp(1 / tau) for scores in [0, 1].
    """
    lowest = torch.finfo(scores.dtype).min  # -inf would make a row without tokens NaN
    share = (scores / tau).masked_fill(mask == 0, lowest).softmax(-1) * mask
    return share * mask.sum(-1, keepdim=True)


def distance_and_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(N, V) twice -> (N, 2): distance of the two, and entropy of the first in nats."""
    return torch.stack([hellinger(log_p, log_q), -(log_p.exp() * log_p).sum(-1)], dim=-1)


@dataclass(frozen=True)
class Dgpo(Method):
    """Weights each token's advantage by how far, and how uncertainly, the policy has moved there.

    tau = inf is TRL bit for bit, without reference. Weights carry no gradient and keep each sequence's mean, so named
    after `high_entropy` they have mean 1 over the tokens that it keeps.
    """

    name = "dgpo"
    title = "DGPO: Distribution-Guided Policy Optimization for Fine-Grained Credit Assignment"
    paper = "2605.03327"
    headline = ("d_mean", "h_mean", "weight_max")
    conflicts: ClassVar = {
        "real": "REAL replaces advantages by a loss on whole sequences, so token weights have no meaning; name one",
    }

    tau: float = param(
        0.5, "softmax temperature; lower is sharper, inf gives every token 1", source="card: paper", gt=0
    )
    kappa: float = param(1.0, "exponent of the entropy; 0 is the distance alone", source="card: paper", ge=0)
    policy: str = param(
        "current",
        "whose distance: the current policy's at each update, or rollout: the sampling one's, computed once",
        source="card: open question 3, decision; rollout is its flag to freeze",
        choices=("current", "rollout"),
    )

    @property
    def _active(self) -> bool:
        return not math.isinf(self.tau)

    def needs(self) -> frozenset[str]:
        return frozenset({HIDDEN, REFERENCE}) if self._active else frozenset()

    def cost(self) -> str:
        if not self._active:
            return "nothing: every weight is 1"
        if self.policy == "rollout":
            return "one policy and one reference forward per rollout, all tokens projected twice; without gradient"
        return "one reference forward per micro-batch, all tokens projected twice; without gradient"

    def check(self, setup: Setup) -> list[str]:
        if not self._active:
            return []
        problems, args = [], setup.args
        if getattr(args, "beta", 0.0) != 0:
            problems.append("it replaces the KL penalty; set beta: 0.0")
        if getattr(args, "importance_sampling_level", "token") == "sequence":
            problems.append("a sequence-level ratio has no token advantages; set importance_sampling_level: token")
        if getattr(args, "loss_type", "grpo") == "vespo":
            problems.append("loss_type vespo weighs whole sequences; set loss_type: grpo or dapo")
        if getattr(args, "top_entropy_quantile", 1.0) < 1.0:
            problems.append(
                "its weights would not have mean 1 over the tokens that TRL's entropy mask keeps; leave "
                "top_entropy_quantile at 1.0 and name high_entropy before dgpo"
            )
        if "high_entropy" in itertools.dropwhile(lambda name: name != self.name, setup.methods):
            problems.append("name high_entropy before dgpo, so that weights have mean 1 over the tokens that it keeps")
        return problems

    def streams(self, rollout: Rollout) -> dict[str, Tensor]:
        if not self._active or self.policy == "current":
            return {}
        everyone = torch.arange(rollout.mask.size(0), device=rollout.mask.device)
        parts = [self._measured(rollout, rows) for rows in everyone.split(rollout.micro_batch)]
        distance, entropy = torch.cat(parts).unbind(-1)
        return {"distance": distance, "entropy": entropy}

    def _measured(self, rollout: Rollout, rows: Tensor) -> Tensor:
        """(R,) row indices -> (R, T, 2): distance and entropy under the sampling weights, 0 where masked."""
        valid = rollout.mask[rows].bool()
        policy, reference = rollout.other(POLICY, rows), rollout.other(REFERENCE, rows)
        sides = [(policy.head, policy.at(valid)), (reference.head, reference.at(valid))]
        found = per_position_detached(distance_and_entropy, sides)
        return found.new_zeros(*valid.shape, 2).masked_scatter(valid.unsqueeze(-1), found)

    def token_weights(self, weights: Tensor, x: LossInput) -> Tensor:
        if not self._active:
            return weights
        assert x.policy is not None  # HIDDEN is declared
        if "distance" in x.streams:
            distance, entropy = x.streams["distance"], x.streams["entropy"]
        else:
            distance, entropy = self._distance(x), x.entropy.detach().float()
        vocab = x.policy.head.weight.size(0)
        kept = x.mask * (weights.detach() != 0)
        own = mean_one_weights(token_scores(distance, entropy, vocab, self.kappa), kept, self.tau)
        self._log(x, distance, entropy / math.log(vocab), own, kept)
        return weights * own.to(weights.dtype)

    def _distance(self, x: LossInput) -> Tensor:
        """(B, T) distance of the current policy from the reference, 0 where masked."""
        assert x.policy is not None
        valid, reference = x.mask.bool(), x.other(REFERENCE)
        sides = [(x.policy.head, x.policy.at(valid)), (reference.head, reference.at(valid))]
        found = per_position_detached(hellinger, sides)
        return found.new_zeros(valid.shape).masked_scatter(valid, found)

    def _log(self, x: LossInput, distance: Tensor, entropy: Tensor, own: Tensor, kept: Tensor) -> None:
        """Means over tokens; largest distance, largest weight and spread of weights are means over sequences."""
        x.metrics.mean("d_mean", distance, x.mask)
        x.metrics.mean("h_mean", entropy, x.mask)
        count = kept.sum(1)
        spread = ((own - 1).square() * kept).sum(1) / count.clamp(min=1)
        x.metrics.mean("d_max", (distance * x.mask).amax(1), x.mask.any(1))
        x.metrics.mean("weight_std", spread.sqrt(), count > 0)
        x.metrics.mean("weight_max", own.amax(1), count > 0)
