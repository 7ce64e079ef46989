"""OBLR-PO: the baseline of least variance, and a learning rate that follows the gradient's signal-to-noise ratio.

Paper: "OBLR-PO: A Theoretical Framework for Stable Reinforcement Learning", arXiv 2511.23310. Card: oblr_po. In the
spirit of OBLR-PO, estimators ours: only the paper's abstract was read. It states a gradient-weighted baseline of least
variance and a rate governed by the SNR; how both are estimated here is derived in the card.

For one prompt with rewards r_i (weighted sums) and W_i, an estimate of ||grad log pi(y_i)||^2:

    b     = sum_i W_i r_i / (sum_i W_i + eps)                 or, leave-one-out, without the response's own term
    A_i   = r_i - b                                           not divided by any deviation
    W_i   = sum_t ||e_a - pi_t||^2 = sum_t (1 - 2 p_t + sum_v pi_t(v)^2)      logit_proxy: tokens as if orthogonal
    W_i   = number of loss tokens                             length

b minimises sum_i W_i (r_i - b)^2. W is that of the weights that sampled, at the sampling temperature, over the tokens
TRL trains on; masks and weights that other methods make in the loss are not in it. Exact norms take a backward pass per
response and are not offered: no hook sees the model. They are the reference of the tests.

With M micro-batch gradients g_k of one optimizer step, before clipping, and EMAs of signal and noise apart:

    noise  = (mean ||g_k||^2 - ||mean g_k||^2) / (M - 1)      variance of the mean gradient (trace)
    signal = max(||mean g_k||^2 - noise, 0)
    rho    = clip(signal / (signal + noise), rho_min, 1)      learning rate = the scheduler's * rho, in this step only

With M = 1 there is no estimate and rho stays what it was, at first 1. The theory is that of SGD; with Adam rho scales
the step as well. `capo` predicts with the scheduler's rate, of which rho is a share: it errs on the strict side.
"""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trl_ext.checks import replaced_advantages, unread
from trl_ext.forward import Features, per_position_detached
from trl_ext.method import GRADIENT_NOISE, POLICY, GradientNoise, Group, Method, Rollout, Setup, param

EPS = 1e-8


def squared_logit_gradient(log_p: Tensor, ids: Tensor) -> Tensor:
    """(N, V) log-probs and (N,) sampled tokens -> (N,): ||e_a - pi||^2 = 1 - 2 p_a + sum_v pi(v)^2, in [0, 2)."""
    taken = log_p.gather(1, ids.unsqueeze(1)).squeeze(1).exp()
    squares = torch.logsumexp(2 * log_p, dim=1).exp()
    return (1 - 2 * taken + squares).clamp(min=0)  # rounding leaves 0 by 1e-7


def optimal_baseline(rewards: Tensor, weights: Tensor, leave_one_out: bool = False) -> Tensor:
    """(P, G) twice -> (P, 1), or (P, G) if each response's own term is left out: the W-weighted mean of the rewards.

    0 where no weight is left.
    """
    if leave_one_out:  # summed over the others: a difference of sums would lose a small weight beside a large one
        weights = weights.to(rewards.dtype)
        others = 1 - torch.eye(weights.size(1), dtype=rewards.dtype, device=weights.device)
        return (weights * rewards) @ others / (weights @ others + EPS)
    return (weights * rewards).sum(1, keepdim=True) / (weights.sum(1, keepdim=True) + EPS)


def signal_and_noise(mean_square: float, square_of_mean: float, samples: int) -> tuple[float, float]:
    """Squared norm of the true gradient, and variance of the mean of `samples` >= 2 gradients, both >= 0."""
    noise = max(0.0, mean_square - square_of_mean) / (samples - 1)
    return max(0.0, square_of_mean - noise), noise


def step_share(signal: float, noise: float, lowest: float) -> float:
    """rho = clip(SNR / (1 + SNR), lowest, 1), SNR = signal / noise."""
    return max(lowest, signal / (signal + noise + sys.float_info.min))


@dataclass(frozen=True)
class OblrPo(Method):
    """Gradient-weighted baseline, and a learning rate that is scaled by rho. In the spirit of OBLR-PO, estimators ours.

    Both off: TRL bit for bit. Metrics: `baseline_shift` (mean |b - mean of r|), `W_mean`, `W_std` (inside groups), and
    after steps of several micro-batches `signal`, `noise` (both smoothed), `snr` and `rho`.
    """

    name = "oblr_po"
    title = "OBLR-PO: A Theoretical Framework for Stable Reinforcement Learning"
    paper = "2511.23310"
    owns = ("baseline", "learning rate")
    conflicts: ClassVar = {
        "real": "REAL learns from right and wrong alone, so a baseline has no effect; name one",
        "group_dpo": "its loss needs advantages that sum to zero in each group, and these do not; name one",
    }
    headline = ("baseline_shift", "W_mean", "snr", "rho")

    baseline: bool = param(True, "use the W-weighted baseline", source="card: paper")
    weight: str = param(
        "logit_proxy",
        "W: logit_proxy (squared logit gradients, one policy forward) or length (loss tokens, free)",
        source="card: inferred; decision",
        choices=("logit_proxy", "length"),
    )
    leave_one_out: bool = param(
        False, "leave a response's own reward out of its baseline, which is then unbiased", source="card: decision"
    )
    adapt_lr: bool = param(True, "scale the learning rate by rho", source="card: paper")
    snr_ema: float = param(0.9, "d, decay of the averages of signal and noise", source="ours", ge=0, lt=1)
    rho_min: float = param(0.1, "least rho", source="ours", gt=0, le=1)

    def __post_init__(self) -> None:
        slots = ("baseline",) * self.baseline + ("learning rate",) * self.adapt_lr
        object.__setattr__(self, "owns", slots)
        object.__setattr__(self, "conflicts", OblrPo.conflicts if self.baseline else {})

    # What it declares

    @property
    def idle(self) -> frozenset[str]:
        baseline = () if self.baseline else ("sampled", "measure", "group_advantages")
        return frozenset((*baseline, *(() if self.adapt_lr else ("observe_gradients", "learning_rate"))))

    def needs(self) -> frozenset[str]:
        return frozenset({GRADIENT_NOISE}) if self.adapt_lr else frozenset()

    def cost(self) -> str:
        parts = []
        if self.baseline and self.weight == "logit_proxy":
            parts.append("one policy forward per rollout, unless TRL makes it, and all tokens projected once more")
        if self.adapt_lr:
            parts.append(
                "squared norms of each micro-batch's gradient; with a single one per step the rate is never changed"
            )
        return "; ".join(parts) or "no extra forward"

    def check(self, setup: Setup) -> list[str]:
        if self.adapt_lr and getattr(setup.args, "gradient_accumulation_steps", 2) == 1:
            warnings.warn(
                "oblr_po: one gradient per optimizer step tells nothing about its noise, so the learning rate stays the "
                "scheduler's; set gradient_accumulation_steps: 2 or more, or adapt_lr: false",
                stacklevel=2,
            )
        parts = {
            "baseline: true": (self.baseline, ("weight", "leave_one_out")),
            "adapt_lr: true": (self.adapt_lr, ("snr_ema", "rho_min")),
        }
        return unread(self, parts) + (replaced_advantages(setup.args) if self.baseline else [])

    # Baseline

    @property
    def _projects(self) -> bool:
        return self.baseline and self.weight == "logit_proxy"

    def sampled(self, policy: Features, completion_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"terms": proxy_terms(policy, completion_ids, mask)} if self._projects else {}

    def measure(self, rollout: Rollout) -> dict[str, Tensor]:
        """W of each response, over its loss tokens."""
        if not self.baseline:
            return {}
        mask = rollout.mask.float()
        return {"W": (self._terms(rollout) * mask).sum(1) if self._projects else mask.sum(1)}

    def _terms(self, rollout: Rollout) -> Tensor:
        """(rows, T): squared logit gradients under the weights that sampled, 0 where masked."""
        if "terms" in rollout.sampled:
            return rollout.sampled["terms"]
        everyone = torch.arange(rollout.mask.size(0), device=rollout.mask.device)
        parts = [
            proxy_terms(rollout.other(POLICY, rows), rollout.completion_ids[rows], rollout.mask[rows])
            for rows in everyone.split(rollout.micro_batch)
        ]
        return torch.cat(parts)

    def group_advantages(self, advantages: Tensor, group: Group) -> Tensor:
        if not self.baseline:
            return advantages
        rewards, skipped = group.total, group.unscored
        weights = group.measured["W"].masked_fill(skipped, 0.0)
        baseline = optimal_baseline(rewards, weights, self.leave_one_out)
        group.metrics.mean("baseline_shift", (baseline - rewards.mean(1, keepdim=True)).abs())
        group.metrics.mean("W_mean", weights)
        group.metrics.mean("W_std", weights.std(1))
        return (rewards - baseline).masked_fill(skipped, 0.0).to(advantages.dtype)

    # Learning rate. state: "signal" and "noise", sums of the EMA before its correction, "steps" in them, and "rho"

    def observe_gradients(self, noise: GradientNoise) -> None:
        if not self.adapt_lr or not math.isfinite(noise.mean_square):
            return  # an overflow, which the gradient scaler skips too
        found = signal_and_noise(noise.mean_square, noise.square_of_mean, noise.samples)
        steps = self.state.get("steps", 0) + 1
        for key, value in zip(("signal", "noise"), found, strict=True):
            self.state[key] = self.snr_ema * self.state.get(key, 0.0) + (1 - self.snr_ema) * value
        signal, variance = (self.state[key] / (1 - self.snr_ema**steps) for key in ("signal", "noise"))
        self.state.update(steps=steps, rho=step_share(signal, variance, self.rho_min))
        self._log(noise, signal, variance)

    def _log(self, noise: GradientNoise, signal: float, variance: float) -> None:
        noise.metrics.mean("signal", signal)
        noise.metrics.mean("noise", variance)
        if variance > 0:
            noise.metrics.mean("snr", signal / variance)
        noise.metrics.mean("rho", self.state["rho"])

    def learning_rate(self, lr: float, step: int) -> float:
        return lr * self.state.get("rho", 1.0)


def proxy_terms(policy: Features, completion_ids: Tensor, mask: Tensor) -> Tensor:
    """(b, T): `squared_logit_gradient` at the masked tokens, 0 elsewhere; in blocks, without gradient."""
    valid = mask.bool()
    found = per_position_detached(squared_logit_gradient, [(policy.head, policy.at(valid))], completion_ids[valid])
    return found.new_zeros(valid.shape).masked_scatter(valid, found)
