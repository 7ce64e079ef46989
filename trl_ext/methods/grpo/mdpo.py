"""MDPO: no clipping; the policy pays for its distance to the one that sampled the rollout, step after step on it.

Paper: "Mirror Descent Policy Optimization", arXiv 2005.09814. Card: mdpo. Per token, d = log pi_theta - log pi_k with
pi_k the policy of rollout k (frozen while the rollout serves m optimizer steps), rho = exp d, A detached:

    token form      l = -rho A + (1/t_k) KL(pi_theta || pi_k),  aggregated as `loss_type` says
      sampled       KL = rho d - (rho - 1)           >= 0, unbiased for tokens drawn from pi_k
      simple        KL = rho d                       unbiased, may be negative
      exact         KL = sum_v pi_theta(v) (log pi_theta(v) - log pi_k(v))
    t_k             t (constant), or max(t_min, t (1 - k/K)) (linear), k = 0..K-1 rollouts

    sequence form   s_i = sum_t d_it,  L = mean_i 0.5 tau (A_i / tau - s_i)^2 / len_i    (policy mirror descent, PMD)
      mean          A_i = R_i - mean_{j != i} R_j
      partition     A_i = R_i - tau log mean_{j != i} exp(R_j / tau)
      unnormalised  L = mean_i (A_i - tau s_i)^2,  A_i = R_i - mean_j R_j

The gradient of the sampled form is -rho (A - d/t) grad log pi_theta: the advantage minus what is spent of it. At the
first step on a rollout d = 0, so with m = 1 the token form is the unclipped policy gradient whatever t is; that is
allowed and said (`check` warns). The sequence form uses raw rewards and has a mean over completions of its own. Weights
of other methods multiply A and leave the KL alone.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ext.checks import others_that, unread, unused_flags
from trl_ext.forward import per_position
from trl_ext.method import HIDDEN, TEACHER, Group, LossInput, Method, RunShape, Setup, param
from trl_ext.surrogates import (
    first_of_rollout,
    inner_steps,
    last_of_rollout,
    log_ratio,
    one_step_note,
    rollout_count,
    rollout_index,
)


def step_size(k: int, total: int, t: float, schedule: str = "constant", t_min: float = 0.0) -> float:
    """t_k of rollout k = 0..total-1: t, or with "linear" max(t_min, t (1 - k / total)), never 0."""
    return t if schedule == "constant" else max(t_min, t * (1 - k / total))


def kl_estimate(d: Tensor, estimator: str = "sampled") -> Tensor:
    """KL(pi_theta || pi_k) of each sampled token from its log-ratio d, any shape: rho d - (rho - 1), or rho d (simple)."""
    return torch.exp(d) * d - (torch.expm1(d) if estimator == "sampled" else 0.0)


def exact_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Log-probs (N, V) of pi_theta and pi_k -> KL(pi_theta || pi_k) (N,), with gradient on `log_p`."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mirror_loss(d: Tensor, advantages: Tensor, kl: Tensor | None, t: float) -> Tensor:
    """-rho A + KL / t, (B, T): log-ratios, `advantages` (B, 1) or (B, T); no KL at t = infinity."""
    linear = -torch.exp(d) * advantages
    return linear if kl is None or math.isinf(t) else linear + kl / t


def pmd_advantages(total: Tensor, tau: float, pmd: str = "mean") -> Tensor:
    """Rewards (P, G) -> A (P, G): minus the mean of the others, their soft maximum (partition), or the group's mean.

    A completion without a reward (NaN) is nobody's other and has A = 0, as has one that has no others.
    """
    scored, rewards = ~total.isnan(), total.nan_to_num()
    count = scored.sum(1, keepdim=True)
    others = (count - 1).clamp(min=1)
    if pmd == "partition":
        absent = torch.eye(total.size(1), dtype=torch.bool, device=total.device) | ~scored.unsqueeze(1)
        exponents = (rewards / tau).unsqueeze(1).expand(absent.shape).masked_fill(absent, -math.inf)
        baseline = tau * (torch.logsumexp(exponents, -1) - others.to(total.dtype).log())
    else:
        spared = rewards if pmd == "mean" else 0.0
        baseline = (rewards.sum(1, keepdim=True) - spared) / (others if pmd == "mean" else count.clamp(min=1))
    return torch.where(scored & (count > 1), rewards - baseline, 0.0)


def pmd_loss(s: Tensor, advantages: Tensor, lengths: Tensor, tau: float, pmd: str = "mean") -> Tensor:
    """Sequence log-ratios s, A and token counts (B,) -> (B,): 0.5 tau (A/tau - s)^2 / len, or (A - tau s)^2."""
    if pmd == "unnormalised":
        return (advantages - tau * s).square()
    return 0.5 * tau * (advantages / tau - s).square() / lengths.clamp(min=1)


@dataclass(frozen=True)
class Mdpo(Method):
    """Replaces the clipped policy term. t = inf is GRPO with the clip switched off."""

    name = "mdpo"
    title = "Mirror Descent Policy Optimization"
    paper = "2005.09814"
    owns = ("surrogate",)
    headline = ("t", "kl_old", "ratio_max")

    form: str = param(
        "token",
        "token: surrogate with a KL per token; sequence: regression of the completion's log-ratio (PMD)",
        source="card: paper; sequence is from OpenKimi's code",
        choices=("token", "sequence"),
    )
    t: float = param(
        1.0,
        "step size; the KL's weight is 1/t, and log-ratios of size t A are where the two balance; inf: no KL",
        source="card: decision, constant 1 for language models; the paper goes from 1 to 0",
        gt=0,
    )
    schedule: str = param(
        "constant",
        "of t over rollouts: constant, or linear, t (1 - k/K) as in the paper",
        source="card: decision; the paper's is linear",
        choices=("constant", "linear"),
    )
    t_min: float = param(1e-2, "smallest t of the linear schedule", source="card: inferred, recommended there", gt=0)
    kl: str = param(
        "sampled",
        "KL to the old policy: sampled (rho d - rho + 1), simple (rho d), or exact over the vocabulary",
        source="card: inferred for language models; the paper's Gaussians have it exact",
        choices=("sampled", "simple", "exact"),
    )
    tau: float = param(0.01, "sequence form: weight of the log-ratio against the reward", source="card: code", gt=0)
    pmd: str = param(
        "mean",
        "sequence form: baseline from the other completions' mean, their partition function, or unnormalised",
        source="card: code",
        choices=("mean", "partition", "unnormalised"),
    )

    def __post_init__(self) -> None:
        slots = ("teacher",) * self._exact + ("baseline",) * (self.form == "sequence")
        object.__setattr__(self, "owns", ("surrogate", *slots))

    # What it declares

    @property
    def idle(self) -> frozenset[str]:
        unused = {"sync_teacher": not self._exact, "group_advantages": self.form == "token"}
        return frozenset(hook for hook, idle in unused.items() if idle)

    @property
    def _exact(self) -> bool:
        return self.form == "token" and self.kl == "exact" and not math.isinf(self.t)

    def needs(self) -> frozenset[str]:
        return frozenset({HIDDEN, TEACHER}) if self._exact else frozenset()

    def cost(self) -> str:
        if self._exact:
            return (
                "a copy of the trained weights; on every optimizer step of a rollout but the first a forward with them "
                "and two projections of all tokens to the vocabulary, one with gradient"
            )
        return "no extra forward; num_iterations passes over each rollout, which the method is for"

    def check(self, setup: Setup) -> list[str]:
        parts = {
            "form: token": (self.form == "token", ("t", "schedule", "t_min", "kl")),
            "form: sequence": (self.form == "sequence", ("tau", "pmd")),
            "schedule: linear": (self.schedule == "linear" or self.form != "token", ("t_min",)),
            "a finite t": (not math.isinf(self.t), ("kl", "schedule")),
        }
        problems = unused_flags(setup.args) + unread(self, parts)
        if self.form == "sequence":
            return problems + self._check_sequence(setup)
        if self.schedule == "linear" and self.t_min > self.t:
            problems.append(f"t_min {self.t_min} is above t {self.t}: every rollout would have t_min; lower it")
        if self._exact:
            steps = inner_steps(setup.args)
            if steps is not None and steps > 1 and steps != int(steps):
                problems.append(
                    f"kl exact keeps one copy of old weights, but with {steps:g} optimizer steps per rollout a step has "
                    "rows of two; make steps_per_generation * num_iterations a multiple of gradient_accumulation_steps"
                )
        note = one_step_note(setup.args, "the KL to the old policy")
        if note and not math.isinf(self.t):
            warnings.warn(f"mdpo: {note}. This run is the unclipped policy gradient", stacklevel=2)
        return problems

    def _check_sequence(self, setup: Setup) -> list[str]:
        args, problems = setup.args, []
        if getattr(args, "loss_type", "grpo") != "grpo":
            problems.append("the sequence form is a mean over completions; set loss_type: grpo")
        if str(getattr(args, "scale_rewards", "none")) not in ("none", "False"):
            problems.append(
                "the sequence form takes rewards as they are, not over their spread; set scale_rewards: none"
            )
        if getattr(args, "multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
            problems.append("the sequence form sums the rewards; set multi_objective_aggregation: sum_then_normalize")
        problems += [
            f"{other} weighs single tokens, the sequence form has one advantage per completion; set form: token"
            for other in others_that(setup, self.name, "token_advantages", "token_weights")
        ]
        return problems

    # Rollout

    def group_advantages(self, advantages: Tensor, group: Group) -> Tensor:
        """The sequence form's A from the raw rewards."""
        total = group.total.masked_fill(group.rewards.isnan().all(-1), math.nan)
        return pmd_advantages(total, self.tau, self.pmd).to(advantages.dtype)

    def sync_teacher(self, step: int, run: RunShape) -> bool:
        """pi_k: the weights at the beginning of every rollout."""
        return first_of_rollout(step, run)

    # Loss

    def surrogate(self, x: LossInput) -> Tensor:
        d = log_ratio(x)
        self._log_drift(x, d.detach())
        return self._sequence(x, d) if self.form == "sequence" else self._token(x, d)

    def _token(self, x: LossInput, d: Tensor) -> Tensor:
        """(B, T), aggregated by the trainer."""
        advantages = x.advantages.unsqueeze(1) if x.advantages.dim() == 1 else x.advantages
        t = step_size(rollout_index(x.step, x.run), rollout_count(x.run), self.t, self.schedule, self.t_min)
        kl = None if math.isinf(t) else self._exact_kl(x) if self.kl == "exact" else kl_estimate(d, self.kl)
        if not math.isinf(t):
            x.metrics.mean("t", t)
        x.metrics.mean("spent", (d.detach().abs() > t * advantages.abs()).float(), x.mask)
        self._log_kl(x, kl_estimate(d.detach()) if kl is None else kl.detach())
        return mirror_loss(d, advantages, kl, t)

    def _exact_kl(self, x: LossInput) -> Tensor:
        """(B, T), 0 off the mask. The first step on a rollout has the old weights: 0, without a forward."""
        zeros = torch.zeros_like(x.logps)
        if first_of_rollout(x.step, x.run):
            return zeros
        assert x.policy is not None  # HIDDEN is declared
        here, old = x.mask.bool(), x.other(TEACHER)
        (kl,) = per_position(
            lambda p, q: (exact_kl(p, q),), (x.policy.head, x.policy.at(here)), (old.head, old.at(here))
        )
        return zeros.masked_scatter(here, kl.to(zeros.dtype))

    def _sequence(self, x: LossInput, d: Tensor) -> Tensor:
        """A scalar: the mean over the micro-batch's completions."""
        s, lengths = (d * x.mask).sum(1), x.mask.sum(1)
        residual = (x.advantages / self.tau - s).detach().abs()
        there = (lengths > 0).float()
        x.metrics.mean("log_ratio", s.abs(), there)
        x.metrics.mean("residual", residual, there)
        self._log_kl(x, kl_estimate(d.detach()))
        return (pmd_loss(s, x.advantages, lengths, self.tau, self.pmd) * there).mean() * x.row_scale

    # Log

    def _log_drift(self, x: LossInput, d: Tensor) -> None:
        ratio = torch.exp(d) * x.mask
        x.metrics.mean("ratio_max", ratio.amax(1), x.mask.any(1).float())

    def _log_kl(self, x: LossInput, kl: Tensor) -> None:
        x.metrics.mean("kl", kl, x.mask)
        if last_of_rollout(x.step, x.run):
            x.metrics.mean("kl_old", kl, x.mask)
