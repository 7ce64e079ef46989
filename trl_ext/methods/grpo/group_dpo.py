"""Group-DPO: the advantages of a group inside DPO's log-sigmoid, which switches the update off once the group is ranked.

Paper: "GDPO-SR: Group Direct Preference Optimization for One-Step Generative Image Super-Resolution", arXiv 2603.16769.
Card: gdpo (this is not TRL's `multi_objective_aggregation: normalize_then_sum`, also called GDPO). The paper trains a
diffusion model on squared denoising errors; with log-probs in their place (card: inferred), for a group of G completions
with advantages A_i, ref the model at the start of training:

    d_i  = log pi(y_i|x) - log ref(y_i|x)          sum over loss tokens
    u    = beta sum_i A_i d_i
    L    = mean over groups of -log sigmoid(u)
    grad = -mean over groups of (1 - sigmoid(u)) beta sum_i A_i grad log pi(y_i|x)

Advantages are TRL's, after whatever other methods make of them: with scale_rewards "group" (R - mean) / (std + 1e-4),
ddof 1 (paper's code: + 1e-8). At G = 2 that is DPO with beta / sqrt(2), at pi = ref the policy gradient times beta / 2.

The factor 1 - sigmoid(u) is that of the policy at the rollout (card: design a, exact for the rollout's first gradient
step), or of the current weights (design b). TRL makes log-probs at the rollout only if the rollout outlives its weights,
and then a costs nothing; if not, a and b are the same and u is formed before the loss, as in b: free if groups fit a
micro-batch, else one forward without gradient per rollout. The paper's code samples from the reference network, its
text from the trained one; the trainer samples from the policy, as GRPO does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trl_ext.checks import unused_flags
from trl_ext.method import REF_LOGPS, Group, LossInput, Method, Metrics, Rollout, Setup, StepRows, param
from trl_ext.methods.grpo.real import token_level
from trl_ext.surrogates import token_mean, two_pass


def group_losses(log_ratios: Tensor, advantages: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(P, G) d and A -> -log sigmoid(u) (P,), its derivative by d (P, G), and u = beta sum_i A_i d_i (P,). No gradient.

    The derivative is -(1 - sigmoid(u)) beta A_i: it adds up to 0 over a group as the advantages do.
    """
    log_ratios, advantages = log_ratios.detach().float(), advantages.detach().float()
    u = beta * (advantages * log_ratios).sum(-1)
    return softplus(-u), -torch.sigmoid(-u).unsqueeze(-1) * beta * advantages, u


def unit_range(rewards: Tensor) -> Tensor:
    """(P, G, F) -> the same: each reward function's values of a group from 0 to 1; 0 where all are equal, NaN stays."""
    known = ~rewards.isnan()
    low = torch.where(known, rewards, torch.inf).amin(1, keepdim=True)
    spread = torch.where(known, rewards, -torch.inf).amax(1, keepdim=True) - low
    scaled = torch.where(spread > 0, (rewards - low) / spread, 0.0)
    return torch.where(known, scaled, rewards)


@dataclass(frozen=True)
class GroupDpo(Method):
    """One log-sigmoid per group in place of the policy term. TRL's KL term is added only if its `beta` is not 0.

    Groups of equal rewards have A = 0: loss log 2 and no gradient.
    """

    name = "group_dpo"
    title = "GDPO-SR: Group Direct Preference Optimization for One-Step Generative Image Super-Resolution"
    paper = "2603.16769"
    owns = ("surrogate",)
    headline = ("u_mean", "weight", "implicit_acc", "kl")
    conflicts: ClassVar = token_level("group_dpo")

    beta: float = param(
        0.1,
        "strength inside the sigmoid; not TRL's beta, which adds a KL term",
        source="card: inferred for summed log-probs; the paper's 5000 is for mean squared errors",
        gt=0,
    )
    over_group: str = param(
        "sum",
        "u as a sum over the group, or its mean, which the card recommends for more than 8 completions",
        source="card: paper",
        choices=("sum", "mean"),
    )
    length_norm: bool = param(
        False, "d_i per token: long and short completions count alike", source="card: decision, off"
    )
    weight_at: str = param(
        "rollout",
        "1 - sigmoid(u) of the policy at the rollout, or at each optimizer step: one forward without gradient more for "
        "a later step, unless groups fit a micro-batch",
        source="card: decision, design (a); step is its design (b)",
        choices=("rollout", "step"),
    )
    equal_rewards: str = param(
        "keep",
        "groups without advantage: keep them in the mean over groups, or drop them, which makes the gradient larger",
        source="card: code",
        choices=("keep", "drop"),
    )
    min_max: bool = param(
        False,
        "scale each reward function from 0 to 1 inside a group before the weighted sum; TRL then logs the scaled ones",
        source="card: decision, off; the paper's image metrics have it on",
    )

    # What it declares

    @property
    def idle(self) -> frozenset[str]:
        return frozenset() if self.min_max else frozenset({"shape_rewards"})

    def needs(self) -> frozenset[str]:
        return frozenset({REF_LOGPS})

    def cost(self) -> str:
        forward = "one forward without gradient of the policy"
        later = "" if self.weight_at == "rollout" else f"; {forward} per later step on a rollout, if not"
        return (
            "one reference forward per rollout (TRL's own if its beta is not 0); nothing more if groups fit a "
            f"micro-batch or TRL keeps old log-probs, else {forward} per rollout{later}"
        )

    def check(self, setup: Setup) -> list[str]:
        return unused_flags(setup.args)

    # Rollout

    def shape_rewards(self, rewards: Tensor, group: Group) -> Tensor:
        return unit_range(rewards)

    def observe(self, group: Group) -> None:
        """state: "unequal" (P,), groups of the rollout whose rewards differ. Rounding leaves no exact 0 in advantages."""
        total = group.total
        self.state["unequal"] = total.amax(1) > total.amin(1)

    def streams(self, rollout: Rollout) -> dict[str, Tensor]:
        """Per row: its advantage, what turns the mean over rows into that over groups, and loss and weight if frozen."""
        everyone, mine = rollout.gather(rollout.advantages)
        advantages = everyone.view(-1, rollout.run.num_generations)
        scale = torch.tensor(float(advantages.size(1)), device=advantages.device)
        unequal = self.state["unequal"].to(advantages.device)
        if self.equal_rewards == "drop":
            scale = scale * advantages.size(0) / unequal.sum().clamp(min=1)
        rows = unequal.unsqueeze(1).expand_as(advantages).flatten()[mine]
        found = {"advantage": torch.where(rows, rollout.advantages, 0.0), "unequal": rows.float()}
        found["scale"] = scale.expand(rollout.advantages.size(0))
        if self.weight_at == "step" or rollout.old_logps is None:
            return found
        ratios, _ = rollout.gather(self._per_row(rollout.old_logps - rollout.ref_logps(), rollout.mask))
        values, slopes = self._weighed(
            ratios.view_as(advantages), advantages * unequal[:, None], unequal, rollout.metrics
        )
        return found | {
            "value": found["scale"] * values.flatten()[mine],
            "slope": found["scale"] * slopes.flatten()[mine],
        }

    # Loss

    def coupled(self, rows: StepRows) -> dict[str, Tensor]:
        if "slope" in rows.streams:
            return {}
        assert rows.ref_logps is not None  # REF_LOGPS is declared
        ratios = rows.by_group(self._per_row(rows.logps() - rows.ref_logps, rows.mask))
        advantages, unequal = (rows.by_group(rows.streams[key]) for key in ("advantage", "unequal"))
        values, slopes = self._weighed(ratios, advantages, unequal[:, 0] > 0, rows.metrics)
        scale = rows.streams["scale"]
        return {"value": scale * rows.own(values), "slope": scale * rows.own(slopes)}

    def surrogate(self, x: LossInput) -> Tensor | None:
        assert x.ref_logps is not None
        apart = x.ref_logps - x.logps.detach()
        x.metrics.mean("kl", apart.exp() - apart - 1, x.mask)
        return two_pass(x.streams["value"], x.streams["slope"], self._per_row(x.logps, x.mask))

    def _per_row(self, values: Tensor, mask: Tensor) -> Tensor:
        """(B, T) -> (B,): sum over loss tokens, or mean."""
        return token_mean(values, mask) if self.length_norm else (values * mask).sum(1)

    def _weighed(self, ratios: Tensor, advantages: Tensor, unequal: Tensor, metrics: Metrics) -> tuple[Tensor, Tensor]:
        """(P, G) d and A, (P,) -> each row's share of its group's loss, and dL/dd, both (P, G); logs them."""
        size = advantages.size(1)
        beta = self.beta / size if self.over_group == "mean" else self.beta
        losses, slopes, u = group_losses(ratios, advantages, beta)
        metrics.mean("u_mean", u)
        metrics.mean("weight", torch.sigmoid(-u))
        metrics.mean("implicit_acc", (u > 0).float(), unequal)
        losses = losses * unequal if self.equal_rewards == "drop" else losses
        return losses.unsqueeze(-1).expand_as(slopes) / size, slopes
