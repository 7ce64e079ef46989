"""RiskPO: bundles of questions, and an advantage that weighs the lower tail of their scores more than the upper one.

Paper: "RiskPO: Risk-based Policy Optimization via Verifiable Reward for LLM Post-Training", arXiv 2510.00911.
Card: riskpo. R (P, G) are the weighted sums of the rewards. B consecutive prompts form a bundle group; xi_i is a random
permutation of 1..G for prompt i, so every response is in exactly one bundle:

    R_B[j] = sum_i R[i, xi_i(j)]                                              j = 1..G
    g(z,a,b) = (z-a)^+ - (z-b)^+ + a - b                                      in [a-b, 0]
    A[j]   = -(1+omega) (Qa - R_B[j])^+ + g(R_B[j], Qa, Qb)                   Qa, Qb: alpha-, beta-quantile of R_B
    tracking: Q_q <- Q_q + lr (q - mean 1{R_B < Q_q})                         after the advantages of each rollout

A[j] <= 0 goes to all responses of bundle j; at or above Qb it is 0. It replaces TRL's advantage altogether. The variant
`code` is the released code's: with w = 1 + omega,

    rvar[j] = g / (beta-alpha+1e-6)     cvar[j] = -(Qa-R_B[j])^+ / (alpha+1e-6)
    A[j]    = (w cvar + rvar) / (w+1) / (std_j R_B + 1e-6)
    risk seeking:  (w (R_B-Qb)^+ / (1-beta+1e-6) + rvar) / (w+1) / (std_j R_B + 1e-6)

Decisions. The first rollout has no tracked quantiles: it takes each bundle group's own, and tracking starts from those
of all its scores (card). Ours: a smaller last bundle of b prompts counts B/b-fold, so that one pair of quantiles fits
all; tracked Qb never falls below Qa; a response that no function scored adds 0 and has advantage 0. The sequence-level
ratio of the paper is TRL's `importance_sampling_level: sequence`; the released code's ratio is the token's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_ext.checks import replaced_advantages
from trl_ext.method import Group, Method, Setup, param

EPS = 1e-6
SEEDS = 1_000_003
"""Rollouts per seed before two runs could draw the same permutations."""


def pairing(prompts: int, generations: int, seed: int, count: int) -> Tensor:
    """(P, G) long: which response of prompt i bundle j takes; a permutation in each row, drawn for rollout `count`."""
    draw = torch.Generator().manual_seed(seed * SEEDS + count)
    return torch.rand(prompts, generations, generator=draw).argsort(-1)


def bundle_of(prompts: int, size: int, device: torch.device | None = None) -> Tensor:
    """(P,) long: the bundle group of each prompt, `size` consecutive ones in each, the last may be smaller."""
    return torch.arange(prompts, device=device) // size


def bundle_sums(values: Tensor, owner: Tensor) -> Tensor:
    """(P, G) in bundle order and (P,) groups -> (N, G) sums over each group's prompts."""
    return values.new_zeros(int(owner[-1]) + 1, values.size(1)).index_add_(0, owner, values)


def bundle_scores(values: Tensor, owner: Tensor, size: int) -> Tensor:
    """R_B: (P, G) rewards in bundle order -> (N, G); a group of b < `size` prompts counts size / b-fold."""
    return bundle_sums(values, owner) * (size / owner.bincount()).unsqueeze(1)


def middle(scores: Tensor, low: Tensor, high: Tensor, natural_baseline: bool = True) -> Tensor:
    """g(z, a, b) = (z-a)^+ - (z-b)^+ + a - b, elementwise; without the natural baseline the constant a - b is left out."""
    value = (scores - low).relu() - (scores - high).relu()
    return value + low - high if natural_baseline else value


def paper_advantages(scores: Tensor, low: Tensor, high: Tensor, omega: float, natural_baseline: bool = True) -> Tensor:
    """(N, G) -> (N, G): slope 1 + omega below `low`, 1 between, 0 above `high`; the quantiles are (N, 1)."""
    return middle(scores, low, high, natural_baseline) - (1 + omega) * (low - scores).relu()


def code_advantages(
    scores: Tensor,
    low: Tensor,
    high: Tensor,
    levels: tuple[float, float],
    weight: float,
    natural_baseline: bool = True,
    seeking: bool = False,
) -> Tensor:
    """(N, G) -> (N, G), `levels` (alpha, beta), `weight` w: tail and middle by probability mass, over the group's std.

    The std is the unbiased one over the bundles of a group, 1 where there is only one bundle. `seeking` has the tail
    above `high` in place of the one below `low`.
    """
    alpha, beta = levels
    rvar = middle(scores, low, high, natural_baseline) / (beta - alpha + EPS)
    tail = (scores - high).relu() / (1 - beta + EPS) if seeking else -(low - scores).relu() / (alpha + EPS)
    spread = scores.std(1, keepdim=True) + EPS if scores.size(1) > 1 else 1.0
    return (weight * tail + rvar) / (weight + 1) / spread


def credited(bundle: Tensor, rewards: Tensor, owner: Tensor, credit: str) -> Tensor:
    """Advantages (N, G) of bundles -> (P, G) of their responses, in bundle order; `rewards` (P, G) likewise.

    uniform: A_ij = a[j]. std: a[j] over the unbiased std of question i (1 where that is at most 1e-3). sum-mean: with
    d_ij = R_ij - mean_j R[i,:], A_ij = a[j] d_ij / sum_i d_ij, or a[j] / b where |sum d| <= 1e-6; sums to a[j].
    """
    spread = bundle[owner]
    if credit == "uniform":
        return spread
    if credit == "std":
        std = rewards.std(1, keepdim=True)
        return spread / torch.where(std > 1e-3, std, 1.0)
    d = rewards - rewards.mean(1, keepdim=True)
    total = bundle_sums(d, owner)[owner]
    even = 1 / owner.bincount()[owner].unsqueeze(1)
    return spread * torch.where(total.abs() > EPS, d / torch.where(total.abs() > EPS, total, 1.0), even)


def own_quantiles(scores: Tensor, levels: tuple[float, float]) -> Tensor:
    """(N, G) -> (2, N, 1): each row's empirical quantiles at `levels`, linear between order statistics."""
    return torch.quantile(scores, scores.new_tensor(levels), dim=1, keepdim=True)


def tracked(quantiles: Tensor, scores: Tensor, levels: tuple[float, float], lr: float) -> Tensor:
    """(2,) -> (2,): one step against the gradient of the pinball loss over all `scores`; the upper one stays on top."""
    below = (scores.flatten() < quantiles.unsqueeze(1)).to(quantiles.dtype).mean(1)
    return (quantiles + lr * (quantiles.new_tensor(levels) - below)).cummax(0).values


@dataclass(frozen=True)
class RiskPO(Method):
    """Replaces the advantages by those of a risk measure of bundled scores (MVaR).

    Metrics: `Qa`, `Qb` in use, `score_mean`, `score_std`, `cvar` (mean of the scores up to Qa), `rvar` (from Qa to Qb),
    `above` (share above Qb), `flat_prompts` (share whose responses all score the same: no gradient in GRPO) and
    `flat_with_signal` (share of these that have an advantage here). There is no setting that equals TRL.

    `above` near 1 says that the tracked quantiles lag behind rewards that rise fast, and then there is no gradient:
    raise `quantile_lr`, or take `quantiles: mix` or `batch`.
    """

    name = "riskpo"
    title = "RiskPO: Risk-based Policy Optimization via Verifiable Reward for LLM Post-Training"
    paper = "2510.00911"
    owns = ("baseline",)
    conflicts: ClassVar = {
        "real": "REAL learns from right and wrong alone, so RiskPO's advantages have no effect; name one",
        "group_dpo": "its loss needs advantages that sum to zero in each group, and RiskPO's do not; name one",
    }
    headline = ("score_mean", "cvar", "rvar", "above")

    variant: str = param(
        "paper",
        "paper: slopes 1 + omega, 1 and 0; code: both parts by probability mass, over the bundles' std",
        source="card: decision; code is the released one's",
        choices=("paper", "code"),
    )
    bundle_size: int = param(5, "B, prompts in a bundle; 1 bundles nothing", source="card: paper ablation", ge=1)
    quantile_down: float = param(0.2, "alpha, level below which the tail is", source="card: paper", ge=0, lt=1)
    quantile_up: float = param(
        0.8, "beta, level above which there is no more gradient", source="card: paper", gt=0, le=1
    )
    omega: float = param(
        0.5,
        "extra weight of the tail, whose slope is 1 + omega (code: w); -1 switches it off",
        source="card: paper",
        ge=-1,
    )
    quantiles: str = param(
        "track",
        "track: one pair for all bundles, moved after each rollout; batch: each bundle group's own; mix: their mean",
        source="card: paper",
        choices=("track", "batch", "mix"),
    )
    quantile_lr: float = param(
        0.1, "gamma, step of the tracked quantiles; unused with batch", source="card: paper", gt=0
    )
    natural_baseline: bool = param(
        True,
        "keep the constant Qa - Qb, with which the paper's A is at most 0",
        source="card: paper; option in the code",
    )
    credit: str = param(
        "uniform",
        "a bundle's advantage for its responses: uniform, over the question's std, or sum-mean (by R - mean)",
        source="card: paper; std and sum-mean are the released scripts'",
        choices=("uniform", "std", "sum-mean"),
    )
    risk: str = param(
        "averse",
        "averse: more weight for the lower tail; seeking: for the upper one, as a control (variant code only)",
        source="card: paper; seeking is the released code's",
        choices=("averse", "seeking"),
    )

    # What it declares

    @property
    def levels(self) -> tuple[float, float]:
        """(alpha, beta)."""
        return self.quantile_down, self.quantile_up

    def cost(self) -> str:
        return "no extra forward: sums and quantiles of the rewards"

    def check(self, setup: Setup) -> list[str]:
        problems = []
        if self.quantile_down >= self.quantile_up:
            problems.append(f"quantile_down {self.quantile_down} must be below quantile_up {self.quantile_up}")
        if self.risk == "seeking" and self.variant != "code":
            problems.append("risk: seeking is defined for the released code only; set variant: code")
        if self.variant == "code" and self.risk == "averse" and self.quantile_down == 0:
            problems.append("variant code divides by quantile_down; set it above 0, or variant: paper")
        if self.variant == "code" and self.risk == "seeking" and self.quantile_up == 1:
            problems.append("risk: seeking divides by 1 - quantile_up; set quantile_up below 1")
        if self.quantiles == "batch" and self.quantile_lr != RiskPO.quantile_lr:
            problems.append("quantile_lr moves tracked quantiles; leave it out, or set quantiles: track or mix")
        return problems + replaced_advantages(setup.args) + self._too_few_prompts(setup.args)

    def _too_few_prompts(self, args: Any) -> list[str]:
        size, generations = getattr(args, "generation_batch_size", None), getattr(args, "num_generations", None)
        if size is None or generations is None or size // generations >= self.bundle_size:
            return []
        return [
            f"a rollout has {size // generations} prompts, fewer than bundle_size {self.bundle_size}; set bundle_size to "
            "at most that, or raise generation_batch_size (or steps_per_generation)"
        ]

    # Advantages. state: "rollouts" seen so far, which seeds the pairing; "quantiles" (2,), if they are tracked

    def group_advantages(self, advantages: Tensor, group: Group) -> Tensor:
        order, rewards, owner = self._bundled(group)
        scores = bundle_scores(rewards, owner, self.bundle_size)
        low, high = self._quantiles(scores)
        bundle = self._advantages(scores, low, high)
        own = credited(bundle, rewards, owner, self.credit).to(advantages.dtype)
        found = torch.zeros_like(advantages).scatter(1, order, own).masked_fill(group.unscored, 0.0)
        self._log(group, scores, low, high, found)
        return found

    def observe(self, group: Group) -> None:
        """Moves the tracked quantiles by all scores of the rollout, of all processes."""
        if self.quantiles != "batch":
            _, rewards, owner = self._bundled(group)
            scores = bundle_scores(rewards, owner, self.bundle_size)
            old = self.state.get("quantiles")
            if old is None:
                self.state["quantiles"] = torch.quantile(scores.flatten(), scores.new_tensor(self.levels))
            else:
                self.state["quantiles"] = tracked(old.to(scores), scores, self.levels, self.quantile_lr)
        self.state["rollouts"] = self.state.get("rollouts", 0) + 1

    def _bundled(self, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        """(P, G) pairing, (P, G) rewards in bundle order, (P,) bundle groups: the same on all processes."""
        total = group.total
        order = pairing(total.size(0), total.size(1), group.seed, self.state.get("rollouts", 0)).to(total.device)
        return order, total.gather(1, order), bundle_of(total.size(0), self.bundle_size, total.device)

    def _quantiles(self, scores: Tensor) -> Tensor:
        """(2, N, 1): Qa and Qb of every bundle group."""
        known = self.state.get("quantiles")
        if known is None:
            return own_quantiles(scores, self.levels)
        everywhere = known.to(scores).view(2, 1, 1).expand(2, scores.size(0), 1)
        return (everywhere + own_quantiles(scores, self.levels)) / 2 if self.quantiles == "mix" else everywhere

    def _advantages(self, scores: Tensor, low: Tensor, high: Tensor) -> Tensor:
        if self.variant == "paper":
            return paper_advantages(scores, low, high, self.omega, self.natural_baseline)
        seeking = self.risk == "seeking"
        return code_advantages(scores, low, high, self.levels, 1 + self.omega, self.natural_baseline, seeking)

    def _log(self, group: Group, scores: Tensor, low: Tensor, high: Tensor, found: Tensor) -> None:
        log, total = group.metrics.mean, group.total
        log("Qa", low)
        log("Qb", high)
        log("score_mean", scores)
        log("score_std", scores.std(correction=0))
        log("cvar", scores, (scores <= low).float())
        log("rvar", scores, ((scores >= low) & (scores <= high)).float())
        log("above", (scores > high).float())
        flat = (total == total[:, :1]).all(1)
        log("flat_prompts", flat.float())
        log("flat_with_signal", (found != 0).any(1).float(), flat.float())
