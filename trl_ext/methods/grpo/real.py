"""REAL: rewards as class labels. Right rollouts are pushed above a logit of 0, wrong ones below it.

Paper: "Rewards as Labels: Revisiting RLVR from a Classification Perspective", arXiv 2602.05630. Card: real. For a group
of G rollouts with T_k loss tokens, labels y_k in {0, 1}, P = {y = 1}, M = {y = 0}, pi_old detached:

    s_k     = (1/T_k) sum_t [log pi(o_kt) - log pi_old(o_kt)]
    L_group = log(1 + sum_P exp(-s_k / tau)) + log(1 + sum_M exp(s_k / tau))      0 where P or M is empty
    L       = mean of L_group over all groups, those with 0 included

Two ablations of the official code: "product" has no anchor, L_group = log(1 + sum_M exp(s / tau) sum_P exp(-s / tau));
"bce" is the binary cross-entropy of s / tau, a mean over the rollouts of groups that hold both labels.

No advantage, no ratio, no clip. A group's rows are spread over micro-batches, so the loss has the two-pass form:
g_k = dL/ds_k without gradient in `coupled`, then sum_k g_k s_k, which has the same value and gradient in any split.
A rollout without loss tokens (truncated and masked), or one that no reward function scored, is in neither set.
The old log-probs are the trainer's, with vLLM too, without importance correction (card: open question 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trl_ext.checks import reward_named, unused_flags
from trl_ext.method import Group, LossInput, Method, Rollout, Setup, StepRows, param
from trl_ext.surrogates import log_ratio, token_mean, two_pass

UNLABELLED = -1.0


def both_labels(labels: Tensor) -> Tensor:
    """(P, G) labels -> (P,) bool: whether the group holds a 1 and a 0."""
    return (labels == 1).any(-1) & (labels == 0).any(-1)


def group_losses(scores: Tensor, labels: Tensor, tau: float, form: str = "anchored") -> tuple[Tensor, Tensor]:
    """(P, G) logits s and labels (1, 0, or -1 for neither) -> the parts of L_group and dL_group / ds.

    Parts (P, 2), of positives and of negatives, (P, 1) for "product"; their sum is L_group, for "bce" the sum, not the
    mean, over the group's rollouts. The derivative (P, G) is in closed form: |dL/ds| <= 1 / tau. float32, no gradient.
    """
    scores = scores.detach().float() / tau
    up, down = (torch.where(labels == y, sign * scores, -math.inf) for y, sign in ((1, -1), (0, 1)))
    valid = both_labels(labels).unsqueeze(-1)
    if form == "bce":
        parts = torch.stack([softplus(up).sum(-1), softplus(down).sum(-1)], dim=-1)
        slopes = down.sigmoid() - up.sigmoid()
    elif form == "product":
        both = up.logsumexp(-1, keepdim=True) + down.logsumexp(-1, keepdim=True)
        parts, slopes = softplus(both), both.sigmoid() * (down.softmax(-1) - up.softmax(-1))
    else:
        parts = torch.stack([softplus(up.logsumexp(-1)), softplus(down.logsumexp(-1))], dim=-1)
        slopes = (down - parts[:, 1:]).exp() - (up - parts[:, :1]).exp()
    return torch.where(valid, parts, 0.0), torch.where(valid, slopes / tau, 0.0)


ADVANTAGES: Mapping[str, Any] = {"scale_rewards": "group", "multi_objective_aggregation": "sum_then_normalize"}
"""Settings of TRL's advantages, which REAL does not read -> the defaults at which they must stay."""
TOKENS = "it acts on tokens or at the loss, where {} has one term per sequence; name only one of them"
GROUPS = "it takes rollouts out of their groups, which {} needs whole; name only one of them"


def token_level(name: str) -> dict[str, str]:
    """The methods of which nothing would reach a loss on whole sequences, and why."""
    methods = ("high_entropy", "trace", "dgpo", "dcpo", "capo", "velocity_rank", "pgpo")
    return {**dict.fromkeys(methods, TOKENS.format(name)), "d3s": GROUPS.format(name)}


@dataclass(frozen=True)
class Real(Method):
    """A two-sided log-sum-exp classification loss on each group in place of the policy term. A KL term may be added.

    `threshold` turns rewards into labels; scaling or shifting rewards so that labels stay changes nothing.
    """

    name = "real"
    title = "Rewards as Labels: Revisiting RLVR from a Classification Perspective"
    paper = "2602.05630"
    owns = ("surrogate",)
    headline = ("valid_group_fraction", "s_positive", "s_negative", "margin")
    conflicts: ClassVar = token_level("real")

    tau: float = param(0.5, "temperature of the logits; the gradient's bound is 1 / tau", source="card: paper", gt=0)
    form: str = param(
        "anchored",
        "anchored: both sides against a logit of 0; product: without it (Circle loss); bce: each rollout by itself",
        source="card: paper; the others are the official code's ablations",
        choices=("anchored", "product", "bce"),
    )
    reward: str | None = param(
        None, "reward function that gives the label, unweighted; none: the weighted sum of all", source="ours"
    )
    threshold: float = param(
        0.5, "a reward of at least this is label 1", source="card: open question 1; the paper's rewards are 0 and 1"
    )

    # What it declares

    def cost(self) -> str:
        return (
            "no extra forward while weights are those that sampled, or groups fit a micro-batch; else one without "
            "gradient per optimizer step over its rollouts"
        )

    def check(self, setup: Setup) -> list[str]:
        problems = unused_flags(setup.args)
        problems += [
            f"{name}: labels take the place of advantages; leave it at {default}"
            for name, default in ADVANTAGES.items()
            if getattr(setup.args, name, default) != default
        ]
        return problems + reward_named(setup, self.reward, "reward")

    # Rollout. state: "labels" (P, G) of the rollout that is being scored

    def observe(self, group: Group) -> None:
        given = group.rewards if self.reward is None else group.rewards[..., self._chosen(group)]
        labels = (group.reward(self.reward) >= self.threshold).float()
        self.state["labels"] = labels.masked_fill(given.isnan().all(-1), UNLABELLED)

    def _chosen(self, group: Group) -> list[bool]:
        return [name == self.reward for name in group.reward_names]

    def streams(self, rollout: Rollout) -> dict[str, Tensor]:
        """Per row: its label, and what the mean over rows multiplies with to be the loss's own mean."""
        spoken, mine = rollout.gather(rollout.mask.any(1).float())
        labels = self.state["labels"].to(spoken)
        labels = torch.where(spoken.view_as(labels) > 0, labels, UNLABELLED)
        scale = torch.tensor(float(labels.size(1)), device=labels.device)
        if self.form == "bce":
            counted = ((labels != UNLABELLED) & both_labels(labels).unsqueeze(-1)).sum()
            scale = labels.numel() / counted.clamp(min=1)
        return {"label": labels.flatten()[mine], "scale": scale.expand(rollout.mask.size(0))}

    # Loss

    def coupled(self, rows: StepRows) -> dict[str, Tensor]:
        labels = rows.by_group(rows.streams["label"])
        scores = rows.by_group(token_mean(rows.drift(), rows.mask))
        parts, slopes = group_losses(scores, labels, self.tau, self.form)
        self._log(rows, scores, labels, parts, slopes)
        per_row = parts.sum(-1, keepdim=True).expand_as(slopes) / labels.size(1)
        scale = rows.streams["scale"]
        return {"value": scale * rows.own(per_row), "slope": scale * rows.own(slopes)}

    def surrogate(self, x: LossInput) -> Tensor | None:
        return two_pass(x.streams["value"], x.streams["slope"], token_mean(log_ratio(x), x.mask))

    def _log(self, rows: StepRows, scores: Tensor, labels: Tensor, parts: Tensor, slopes: Tensor) -> None:
        """The share of groups with both labels; all else over these groups alone."""
        valid = both_labels(labels)
        sides = {name: (labels == y) & valid.unsqueeze(-1) for name, y in (("positive", 1), ("negative", 0))}
        means = {name: token_mean(scores, side) for name, side in sides.items()}
        size, member = slopes.abs(), labels != UNLABELLED
        smallest = torch.where(member, size, math.inf).amin(-1)
        rows.metrics.mean("valid_group_fraction", valid.float())
        rows.metrics.mean("margin", means["positive"] - means["negative"], valid)
        rows.metrics.mean("weight_min", torch.where(valid, smallest, 0.0), valid)
        rows.metrics.mean("weight_max", size.amax(-1), valid)
        for i, (name, side) in enumerate(sides.items()):
            rows.metrics.mean(f"s_{name}", scores, side)
            if parts.size(1) == len(sides):
                rows.metrics.mean(f"loss_{name}", parts[:, i], valid)
