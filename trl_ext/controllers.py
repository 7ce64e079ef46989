"""Pieces of a controller for the weight of a KL penalty: PID on rewards, training phases, thresholds, entropy gate.

Pure functions on numbers (what comes from rewards) and on 0-dim tensors (what comes from log-probs, which stay on the
device). Source: SAFE, arXiv 2602.04651, card safe.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WARMUP, CLIMBING, PLATEAU, CONVERGED = "warmup", "climbing", "plateau", "converged"
PHASES = (WARMUP, CLIMBING, PLATEAU, CONVERGED)


@dataclass(frozen=True)
class Gains:
    """Settings of `pid_step`: `smoothing` a of the reward, `target` velocity, bound of the integral, gains kp, ki, kd."""

    kp: float
    ki: float
    kd: float
    smoothing: float
    target: float
    integral_limit: float


@dataclass(frozen=True)
class Pid:
    """What `pid_step` remembers: the smoothed reward (None before the first), the integral, the error before."""

    ema: float | None = None
    integral: float = 0.0
    error: float = 0.0


def pid_step(before: Pid, reward: float, gains: Gains) -> tuple[Pid, float]:
    """A PID controller of the reward's velocity -> what it remembers, its output.

    The first reward sets the average and gives 0. Then v = (1 - a) (reward - ema), e = v - target,
    I = clip(I + e, -limit, limit), output = kp e + ki I + kd (e - e_before).
    """
    if before.ema is None:
        return Pid(reward), 0.0
    ema = gains.smoothing * before.ema + (1 - gains.smoothing) * reward
    error = ema - before.ema - gains.target
    integral = min(gains.integral_limit, max(-gains.integral_limit, before.integral + error))
    output = gains.kp * error + gains.ki * integral + gains.kd * (error - before.error)
    return Pid(ema, integral, error), output


def phase_of(rewards: Sequence[float], window: int, rise: float, flat: float, high: float) -> str:
    """The training phase that the mean rewards so far (oldest first) tell; the last 2 * `window` count.

    "warmup": fewer than `window`. "climbing": the mean of the last `window` is more than `rise` above that of the
    `window` before (which is the last one itself, so never, without 2 * `window`). "converged": their SD (population) is
    below `flat` and their mean above `high`. Else "plateau".
    """
    if len(rewards) < window:
        return WARMUP
    recent = rewards[-window:]
    old = rewards[-2 * window : -window] if len(rewards) >= 2 * window else recent
    mean = statistics.fmean(recent)
    if mean > statistics.fmean(old) + rise:
        return CLIMBING
    return CONVERGED if statistics.pstdev(recent) < flat and mean > high else PLATEAU


def threshold(base: float, correction: float, factor: float, low: float, high: float) -> float:
    """tau = clip((base + correction) factor, low, high)."""
    return min(high, max(low, (base + correction) * factor))


def entropy_gate(entropy: Tensor, floor: Tensor | float, least: float) -> Tensor:
    """g = max(least, floor / (H + 0.1)): grows as the policy's entropy H (nats per token) falls."""
    return torch.clamp(floor / (entropy + 0.1), min=least)


def one_sided(kl: Tensor, tau: float, strength: float) -> tuple[Tensor, Tensor]:
    """The penalty strength (kl - tau)^2 above `tau`, 0 below, and its derivative with respect to `kl`."""
    excess = (kl - tau).clamp(min=0)
    return strength * excess.square(), 2 * strength * excess


def momentum_penalty(history: Tensor, window: int, strength: float) -> tuple[Tensor, Tensor]:
    """strength m^2 for m > 0, and its derivative with respect to the newest KL; `history` (n,), oldest first.

    m = (newest - oldest of the last `window`) / window (so the two are window - 1 steps apart, as in the released code);
    both are 0 with fewer than `window` values.
    """
    if history.numel() < window:
        return history.new_zeros(()), history.new_zeros(())
    momentum = ((history[-1] - history[-window]) / window).clamp(min=0)
    return strength * momentum.square(), 2 * strength * momentum / window


def preview_scale(kl: float, limit: float = 0.5) -> float:
    """What to scale a step with if trying it out gave this KL: limit / kl above `limit`, else 1.

    The released code defines this and never calls it; nothing here calls it either. It takes the KL *after* the step,
    so an honest use needs a trial step and a forward, which no trainer stage offers; for loops of your own.
    """
    return limit / kl if kl > limit else 1.0


def sampled_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """(B, T) twice -> (B, T): the estimator k3 = exp(ref - lp) - (ref - lp) - 1 of KL(pi || ref), >= 0, differentiable."""
    log_ratio = ref_logps - logps
    return torch.expm1(log_ratio) - log_ratio
