"""DCPO: an entropy controller that pulls towards, or away from, what a hotter copy of the policy would reinforce.

Paper: "Distribution-Centric Policy Optimization", arXiv 2601.12730 (not Dynamic Clipping Policy Optimization, which has
the same short name). Card: dcpo; the formula is that of the official code. With pi_old the policy that sampled token
o_t, pi_old^T the same at T times its temperature, R_i = 1[score_i > threshold], p the mean of R, H the entropy estimate:

    rho_t = pi_old^T(o_t) / pi_old(o_t)                  detached, not clipped; E_{o ~ pi_old}[rho] = 1
    T     = 1.2 if H <= H0 else 0.8
    a0    = min(|H0 - H|, 0.1);  alpha = a0 / (p + a0), and 0 if p = 0
    A~_t  = (1 - alpha) A_i + alpha R_i rho_t            in TRL's clipped loss in place of A_i

H is minus the mean log-prob of the sampled tokens under the current policy, over all tokens of the steps since the last
estimate (the code averages micro-batches; a mean over tokens does not depend on their split). It is taken once per
optimizer step, at the first rollout, and is part of the checkpoint. "Temperature 1" is the run's sampling temperature.
p is taken over the generation batch of all processes. Where no completion of it succeeds, A~ = A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trl_ext.checks import reward_named
from trl_ext.forward import Features, per_position_detached
from trl_ext.method import ENTROPY_AT_ROLLOUT, HIDDEN, Group, LossInput, Method, Rollout, Setup, param


def log_rho(log_p: Tensor, ids: Tensor, temperature: float | Tensor) -> Tensor:
    """log of pi^T(o) / pi(o): log_p (N, V), ids (N,), T a number or (N,) -> (N,). 0 for T = 1."""
    hot = log_p / (temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature)
    chosen = ids.unsqueeze(1)
    return (hot.gather(1, chosen) - log_p.gather(1, chosen)).squeeze(1) - hot.logsumexp(-1)


def mixing_weight(error: float, cap: float, positive_share: float) -> float:
    """alpha = a0 / (p + a0) with a0 = min(|error|, cap); 0 without error, cap or positive sample."""
    a0 = min(abs(error), cap)
    return a0 / (positive_share + a0) if positive_share > 0 and a0 > 0 else 0.0


def mixed_advantages(advantages: Tensor, positive: Tensor, rho: Tensor, alpha: Tensor) -> Tensor:
    """(1 - alpha) A + alpha R rho: A (B,) or (B, T), R (B,), rho (B, T), alpha (B,) -> (B, T). Detached."""
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    share = alpha.unsqueeze(1)
    return ((1 - share) * advantages + share * positive.unsqueeze(1) * rho).detach()


@dataclass(frozen=True)
class Dcpo(Method):
    """Mixes a REINFORCE term, re-weighted to another temperature, into the advantage to hold entropy at a target.

    cap = 0 leaves the advantages alone: TRL bit for bit, with the entropy still estimated and logged. With both
    temperatures 1 the term stays and rho is 1 (the paper's ablation without the second ratio).
    """

    name = "dcpo"
    title = "DCPO: Distribution-Centric Policy Optimization Dominates Exploration-Exploitation Trade-off"
    paper = "2601.12730"
    headline = ("entropy_estimate", "alpha", "temperature")
    conflicts: ClassVar = {"epo": "both steer the entropy; name only one of them"}

    entropy_target: float = param(
        0.5, "H0 in nats per token", source="card: released script; 0.25 is best for Qwen2.5-Math-7B", ge=0
    )
    temperature_high: float = param(1.2, "T while H <= H0", source="card: official code", gt=0)
    temperature_low: float = param(0.8, "T while H > H0", source="card: official code", gt=0)
    cap: float = param(0.1, "largest a0; 0 switches the term off", source="card: official code", ge=0)
    threshold: float = param(0.05, "a score above this is a positive sample", source="card: official code")
    verifier: str | None = param(
        None, "reward function that gives the score; needed if there are several", source="ours"
    )
    estimate: str = param(
        "sampled",
        "H from the sampled tokens' log-probs, or the exact entropy",
        source="card: official code; exact is the card's option",
        choices=("sampled", "exact"),
    )
    start: str = param(
        "zero",
        "H before the first step: 0, so T is high and a0 at its cap, or the entropy of the first rollout",
        source="card: official code; first_batch is the card's option",
        choices=("zero", "first_batch"),
    )
    rho_cap: float | None = param(
        None, "largest rho; none does not clip", source="card: decision, none by default", gt=0
    )

    # What it declares

    @property
    def _ratio(self) -> bool:
        """Whether rho must be computed at all."""
        return self.cap > 0 and (self.temperature_high, self.temperature_low) != (1.0, 1.0)

    def needs(self) -> frozenset[str]:
        needed = {HIDDEN} if self._ratio else set()
        return frozenset(needed | {ENTROPY_AT_ROLLOUT} if self.cap > 0 and self.start == "first_batch" else needed)

    def cost(self) -> str:
        if not self._ratio:
            return "no extra forward"
        first = "; a forward without gradient before step 0" if self.start == "first_batch" else ""
        return f"one more projection of positive completions, without gradient (all, if rollouts serve several steps){first}"

    def check(self, setup: Setup) -> list[str]:
        problems, args = [], setup.args
        if getattr(args, "use_adaptive_entropy", False) or getattr(args, "entropy_coef", 0.0) != 0:
            problems.append(
                "TRL's entropy bonus steers the entropy too; leave entropy_coef at 0 and use_adaptive_entropy off"
            )
        if getattr(args, "importance_sampling_level", "token") == "sequence":
            problems.append("its advantages differ by token; set importance_sampling_level: token")
        if getattr(args, "loss_type", "grpo") == "vespo":
            problems.append("loss_type vespo weighs whole sequences; set loss_type: dapo or grpo")
        return problems + reward_named(setup, self.verifier, "verifier", "is the score")

    # Rollout: temperature and mixing weight of the step

    def observe(self, group: Group) -> None:
        """The first rollout of an optimizer step turns what the losses have summed up into the new estimate."""
        if self.state.get("estimated_at") == group.step:
            return
        self.state["estimated_at"] = group.step
        sums = self.state.pop("sums", None)
        if sums is not None and float(sums[1]) > 0:
            self.state["entropy"] = float(sums[0] / sums[1])

    def streams(self, rollout: Rollout) -> dict[str, Tensor]:
        entropy = self._estimate(rollout)
        column = rollout.reward_names.index(self.verifier) if self.verifier else 0
        positive = (rollout.rewards[:, column] > self.threshold).float()
        everyone, _ = rollout.gather(positive)
        share = float(everyone.mean())
        alpha = mixing_weight(self.entropy_target - entropy, self.cap, share)
        hot = entropy <= self.entropy_target
        temperature = self.temperature_high if hot else self.temperature_low
        shown = {"target": self.entropy_target, "temperature": temperature, "alpha": alpha, "positive_share": share}
        for name, value in shown.items():
            rollout.metrics.mean(name, value)
        if entropy or "entropy" in self.state:  # the code's first 0 was not measured
            rollout.metrics.mean("entropy_estimate", entropy)
        if alpha == 0:
            return {}
        row = torch.ones_like(positive)
        return {"positive": positive, "alpha": alpha * row, "hot": hot * row}

    def _estimate(self, rollout: Rollout) -> float:
        """H of the previous step; before there is one, 0 or the mean entropy of this rollout over all processes."""
        if "entropy" in self.state or self.start == "zero" or self.cap == 0:
            return self.state.get("entropy", 0.0)
        total = torch.stack([(rollout.entropies() * rollout.mask).sum(), rollout.mask.sum().float()])
        summed = rollout.gather(total)[0].view(-1, 2).sum(0)
        return float(summed[0] / summed[1].clamp(min=1))

    def sampled(self, policy: Features, completion_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Both log rho (b, T, 2), high first: which one is wanted is known only when the rollout is scored."""
        if not self._ratio:
            return {}
        valid = mask.bool()
        found = per_position_detached(self._both, [(policy.head, policy.at(valid))], completion_ids[valid])
        return {"log_rho": found.new_zeros(*valid.shape, 2).masked_scatter(valid.unsqueeze(-1), found)}

    def _both(self, log_p: Tensor, ids: Tensor) -> Tensor:
        return torch.stack([log_rho(log_p, ids, t) for t in (self.temperature_high, self.temperature_low)], dim=-1)

    # Loss

    def token_advantages(self, advantages: Tensor, x: LossInput) -> Tensor:
        if "alpha" not in x.streams:
            return advantages
        positive, alpha = x.streams["positive"], x.streams["alpha"]
        rho = self._log_rho(x).exp()
        rho = rho if self.rho_cap is None else rho.clamp(max=self.rho_cap)
        here = x.mask * positive.unsqueeze(1)
        x.metrics.mean("rho_mean", rho, here)
        # the mean over positive sequences of the largest rho in the row
        x.metrics.mean("rho_max", (rho * here).amax(1), here.any(1))
        return mixed_advantages(advantages, positive, rho, alpha).to(x.advantages.dtype)

    def _log_rho(self, x: LossInput) -> Tensor:
        """(B, T) at least on the tokens of positive samples, under the weights that sampled them; 0 elsewhere."""
        hot = (x.streams["hot"] > 0).unsqueeze(1)
        if "log_rho" in x.streams:
            high, low = x.streams["log_rho"].unbind(-1)
            return torch.where(hot, high, low)
        here = x.mask.bool() & (x.streams["positive"] > 0).unsqueeze(1)
        empty = torch.zeros_like(here, dtype=torch.float32)
        if not self._ratio:
            return empty
        assert x.policy is not None  # HIDDEN is declared
        own = torch.where(hot, self.temperature_high, self.temperature_low).expand_as(here)[here]
        found = per_position_detached(log_rho, [(x.policy.head, x.policy.at(here))], x.completion_ids[here], own)
        return empty.masked_scatter(here, found)

    def observe_loss(self, x: LossInput) -> None:
        """Adds this micro-batch of all processes to the sums behind the next estimate."""
        nats = -x.logps.detach() if self.estimate == "sampled" else x.entropy.detach()
        own = torch.stack([(nats * x.mask).sum().float(), x.mask.sum().float()])
        everyone = x.gather(own)[0].view(-1, 2).sum(0)
        self.state["sums"] = everyone + self.state["sums"].to(everyone.device) if "sums" in self.state else everyone
