"""Target surrogate (SSO): several cheap updates per rollout, towards a target for the log-probs instead of a clip.

Paper: "Target-based Surrogates for Stochastic Optimization", arXiv 2302.02607. Card: target_surrogate. The target space
is the log-probs z of the sampled tokens, z_t those at the rollout, d = z - z_t, g = dl/dz at z_t. With w the weight that
`loss_type` gives a token (grpo: 1 / (B |o|)), g = -w A and the surrogate of rollout t is

    S = sum_bt w [-A d + D(d) / eta_t],   D = d^2 / 2  (l2),  or  exp(d) - 1 - d  (kl: KL(pi_old || pi_theta), sampled)
    target "sequence": z are the sequence log-probs s_b = sum_t d_bt; -A s + D(s) / eta_t per completion, same weights

    eta_t, t = 1..T rollouts:  constant eta;  sqrt: eta / sqrt(t);  exponential: eta T^(-t/T);
    adagrad: eta / sqrt(sum_{u <= t} mean A_u^2)

With l2 S is, up to a constant, sum w (d - eta A)^2 / (2 eta): a regression of the log-ratio on eta A. Its gradient is that
of the policy gradient at d = 0 whatever eta is, zero at d = eta A, and turns round beyond, on both sides. With kl the
minimum is at exp(d) = 1 + eta A, and there is none for eta A <= -1. So eta matters from the second step on a rollout
(`num_iterations` > 1); `check` warns where there is none. A and z_t are detached.

Decisions. No logit target (V times the memory; card). AdaGrad's ||g||^2 is the mean of A^2 over all completions of the
rollout: the norm in units of the weights w, so that eta keeps its meaning whatever the batch size is; it is the advantage
as TRL made it. Left out: the line search on eta, since l on the samples, -mean(A exp d), does not know that probabilities
sum to one: with A = +-1 its condition sinh(eta) >= eta / 2 holds for every eta, so eta would grow 1.8-fold with every
rollout; and the early stop of the inner loop, since a method cannot end TRL's passes over a rollout: `target_residual`
and `surrogate_last` show whether later steps still gain.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ext.checks import others_that, unused_flags
from trl_ext.method import Group, LossInput, Method, Setup, param
from trl_ext.surrogates import (
    last_of_rollout,
    log_ratio,
    one_step_note,
    rollout_count,
    rollout_index,
)


def target_step(t: int, total: int, eta: float, schedule: str = "constant") -> float:
    """eta_t of rollout t = 1..total: eta, eta / sqrt(t) (sqrt), or eta total^(-t / total) (exponential)."""
    if schedule == "sqrt":
        return eta / math.sqrt(t)
    return eta * total ** (-t / total) if schedule == "exponential" else eta


def divergence(d: Tensor, kind: str = "l2") -> Tensor:
    """D(d) of log-ratios of any shape: d^2 / 2, or exp(d) - 1 - d (kl). Both have value and slope 0 at 0."""
    return d.square() / 2 if kind == "l2" else torch.expm1(d) - d


def surrogate_loss(d: Tensor, advantages: Tensor, eta: float, kind: str = "l2") -> Tensor:
    """-A d + D(d) / eta, the shape of d; `advantages` of a shape that fits. eta = inf is the linear term alone."""
    return -advantages * d if math.isinf(eta) else -advantages * d + divergence(d, kind) / eta


def spread(per_row: Tensor, mask: Tensor) -> Tensor:
    """(B,) -> (B, T): every row's value in equal parts on its tokens, which an aggregation then weighs and adds up."""
    return (per_row / mask.sum(1).clamp(min=1)).unsqueeze(1) * mask


@dataclass(frozen=True)
class TargetSurrogate(Method):
    """Replaces the clipped policy term. One optimizer step per rollout: plain GRPO, whatever the settings are."""

    name = "target_surrogate"
    title = "Target-based Surrogates for Stochastic Optimization"
    paper = "2302.02607"
    owns = ("surrogate",)
    headline = ("eta", "d_mean_pos", "d_mean_neg", "target_residual")

    eta: float = param(
        0.2,
        "target step: the log-ratio that a unit of advantage asks for; inf: linear, nothing holds it back",
        source="card: decision",
        gt=0,
    )
    schedule: str = param(
        "constant",
        "of eta over rollouts: constant, sqrt (eta / sqrt(t)), exponential (eta T^(-t/T)), or adagrad",
        source="card: official code",
        choices=("constant", "sqrt", "exponential", "adagrad"),
    )
    divergence: str = param(
        "l2",
        "closeness to the old log-probs: l2, or kl (old against new, estimated on the sampled tokens)",
        source="card: paper; kl is the card's option",
        choices=("l2", "kl"),
    )
    target: str = param(
        "token",
        "the log-probs that have a target: of each token, or of the whole sequence",
        source="card: decision",
        choices=("token", "sequence"),
    )

    # What it declares

    def cost(self) -> str:
        return "no extra forward; num_iterations passes over each rollout, which the method is for"

    def check(self, setup: Setup) -> list[str]:
        problems = unused_flags(setup.args)
        if math.isinf(self.eta) and (self.schedule, self.divergence) != ("constant", "l2"):
            problems.append("eta inf has neither schedule nor divergence; leave both out, or set a finite eta")
        if self.target == "sequence":
            problems += [
                f"{other} weighs single tokens, target sequence has one advantage per completion; set target: token"
                for other in others_that(setup, self.name, "token_advantages", "token_weights")
            ]
        if note := one_step_note(setup.args, "the way from the old log-probs"):
            warnings.warn(f"target_surrogate: {note}. This run is plain GRPO without clip", stacklevel=2)
        return problems

    # Rollout. state: "squares", the sum of mean A^2 over rollouts (adagrad).

    def observe(self, group: Group) -> None:
        if self.schedule == "adagrad":
            self.state["squares"] = self.state.get("squares", 0.0) + float(group.advantages.square().mean())

    def _eta(self, x: LossInput) -> float:
        if self.schedule == "adagrad":
            squares = self.state["squares"]
            return self.eta / math.sqrt(squares) if squares > 0 else math.inf  # no advantage yet: no gradient either
        return target_step(rollout_index(x.step, x.run) + 1, rollout_count(x.run), self.eta, self.schedule)

    # Loss

    def surrogate(self, x: LossInput) -> Tensor:
        """(B, T), aggregated by the trainer."""
        d, eta = log_ratio(x) * x.mask, self._eta(x)
        if self.target == "token":
            advantages = x.advantages.unsqueeze(1) if x.advantages.dim() == 1 else x.advantages
            per_token = surrogate_loss(d, advantages, eta, self.divergence)
            self._log(x, d.detach(), advantages.expand_as(d), eta, x.mask.float())
        else:
            s = d.sum(1)
            per_token = spread(surrogate_loss(s, x.advantages, eta, self.divergence), x.mask)
            self._log(x, s.detach(), x.advantages, eta, x.mask.any(1).float())
        self._log_value(x, x.aggregate(per_token.detach()))
        return per_token

    # Log

    def _log(self, x: LossInput, d: Tensor, advantages: Tensor, eta: float, there: Tensor) -> None:
        """Of tokens (B, T), or of sequences (B,) with target "sequence"."""
        x.metrics.mean("d_mean_pos", d, there * (advantages > 0))
        x.metrics.mean("d_mean_neg", d, there * (advantages < 0))
        x.metrics.mean("d_abs", d.abs(), there)
        if math.isinf(eta):
            return
        x.metrics.mean("eta", eta)
        residual = (d - eta * advantages).abs()
        x.metrics.mean("target_residual", residual, there)
        slope = d if self.divergence == "l2" else torch.expm1(d)
        x.metrics.mean("grad_inner", (slope / eta - advantages).abs(), there)

    def _log_value(self, x: LossInput, value: Tensor) -> None:
        x.metrics.mean("surrogate", value)
        if last_of_rollout(x.step, x.run):
            x.metrics.mean("surrogate_last", value)
