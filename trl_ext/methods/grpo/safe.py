"""SAFE: a KL penalty that starts above a threshold, grows when entropy falls, and moves its threshold with the reward.

Paper: "SAFE: Stable Alignment Finetuning with Entropy-Aware Predictive Control for RLHF", arXiv 2602.04651. Card: safe.
Per controller step, with r the mean reward, H and kl token means over all processes (kl = log pi - log pi_ref):

    kl_short <- 0.9 kl_short + 0.1 kl        kl_long <- 0.99 kl_long + 0.01 kl (logged only)       both start at 0
    tau      = clip((0.3 + pid(velocity of r)) phi, 0.1, 0.6)       phi: 1.5, 1.2, 0.8, 1.0 by training phase
    penalty  = g 0.1 (kl_short - tau)^2 if kl_short > tau else 0    g = max(0.5, 2.0 / (H + 0.1))
    c        = d penalty / d kl_short = 0.2 g max(0, kl_short - tau)
    loss    += c mean_token k3(theta)        grad "coef"; c detached, k3 as in TRL's own KL
    loss    += penalty                       grad "constant": the published code, where no gradient flows and so no KL
                                             is regulated: weights are those without the method

Which form the paper means is open; "coef" is the card's decision. The term is a loss of its own, a mean over the
rollout's tokens whatever `loss_type` says, on all tokens that TRL trains on, whichever of them other methods mask. TRL's
`beta` stays what it was, a constant KL term beside this one; the paper has none (beta: 0). The entropy bonus of 0.01 is
TRL's `entropy_coef`.

When the controller moves: kl and H once per optimizer step that sees new rows, from the loss's own forward, so that c
lags one step and costs no forward (`kl_from: previous_step`); rewards once per rollout of one set of weights, with the
same lag (the code pushes each one twice). `kl_from: rollout` measures before the first loss, without lag.

`controller: asymmetric` is the sister method in the code: 0.1 max(0, kl - 0.3)^2 + 5 max(0, m)^2 on the kl of the step,
m = (kl_now - kl_{50 steps ago}) / 50; c is again the derivative. `critic: true` adds the paper's critic, `trl_ext.critic`:

    V     = soft_min(V1, V2; 0.3)        y = rewards standardised by running mean and variance
    A     = (y - V_old - mean) / (std + 1e-8)    over all rows of the rollout; in place of the group's baseline and scale
    value = 0.5 mean_rows 0.5 (huber(V, y; 0.5) + huber(V_clip, y; 0.5)), trained by an AdamW of its own

Not here: the paper's preview of the step, which the code defines and never calls (`controllers.preview_scale`), and its
target critic, which is never used.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_ext import critic as critics
from trl_ext import ops
from trl_ext.checks import replaced_advantages, unread
from trl_ext.controllers import (
    PHASES,
    WARMUP,
    Gains,
    Pid,
    entropy_gate,
    momentum_penalty,
    one_sided,
    phase_of,
    pid_step,
    sampled_kl,
    threshold,
)
from trl_ext.forward import Features, per_position_detached
from trl_ext.method import HIDDEN, POLICY, REF_LOGPS, Group, LossInput, Method, Rollout, Setup, param

ENTROPY_AWARE = (
    *("entropy_floor", "gate_min", "kl_short_ema", "tau_low", "tau_high", "kp", "ki", "kd", "target_velocity"),
    *("reward_ema", "phase_window", "warmup", "climbing", "plateau", "converged", "climbing_rise"),
    *("converged_std", "converged_reward"),
)
ASYMMETRIC = ("momentum_strength", "momentum_window")
CRITIC = (
    *("softmin_alpha", "value_clip", "huber_delta", "value_weight", "critic_lr", "critic_clip"),
    *("critic_gradient", "critic_seed"),
)
"""Settings that one controller, or the critic, alone reads."""
INTEGRAL_LIMIT = 1.0
"""Bound of the PID's integral. Card: clip 1."""


def sampled_and_entropy(log_p: Tensor, ids: Tensor) -> Tensor:
    """(n, V) log-probs, ids (n,) -> (n, 2): log-prob of the id, and entropy in nats."""
    return torch.stack([log_p.gather(1, ids.unsqueeze(1)).squeeze(1), torch.special.entr(log_p.exp()).sum(-1)], -1)


@dataclass(frozen=True)
class Safe(Method):
    """Adds the controlled KL penalty to whatever loss runs; with `critic` it also replaces the group's baseline.

    penalty_strength = 0 (and momentum_strength = 0 if asymmetric) is TRL bit for bit, without a reference; so is the
    training while kl_short stays below tau. With `critic`, `scale_rewards` and the group's mean no longer matter.
    The metric `phase` counts warmup, climbing, plateau, converged from 0; `c` is in the unit of TRL's `beta`.
    """

    name = "safe"
    title = "SAFE: Stable Alignment Finetuning with Entropy-Aware Predictive Control for RLHF"
    paper = "2602.04651"
    headline = ("kl_short", "tau", "c", "g")
    owns = ("kl controller",)
    conflicts: ClassVar = {
        "dgpo": "DGPO replaces the KL penalty and SAFE is one; name only one of them",
        "d3s": "SAFE measures the policy on all rollouts, and d3s leaves it only their extremes; name only one of them",
    }

    controller: str = param(
        "entropy_aware",
        "entropy_aware: smoothed KL, moving threshold, entropy gate; asymmetric: the sister method, fixed threshold on "
        "the step's KL and a penalty on its rise",
        source="card: paper; asymmetric is in the released code",
        choices=("entropy_aware", "asymmetric"),
    )
    grad: str = param(
        "coef",
        "coef: the penalty's slope times a KL with gradient; constant: the penalty as a number (released code), which "
        "has no gradient and changes nothing",
        source="card: decision",
        choices=("coef", "constant"),
    )
    kl_from: str = param(
        "previous_step",
        "where KL and entropy are measured: previous_step, in the loss that runs anyway; rollout: of the policy that "
        "sampled, one more forward",
        source="card: decision, ours between the lag of a step and a forward",
        choices=("previous_step", "rollout"),
    )
    kl_base: float = param(0.3, "threshold on the KL per token, before it moves", source="card: official code", ge=0)
    penalty_strength: float = param(0.1, "factor of the squared excess", source="card: official code", ge=0)
    entropy_floor: float | None = param(
        2.0,
        "numerator of the gate, nats per token; 2.0 suits a base model, none takes half of the first measured entropy "
        "(tiny and instruct models)",
        source="card: official code; half of the initial entropy is inferred",
        gt=0,
    )
    gate_min: float = param(0.5, "least g", source="card: official code", ge=0)
    kl_short_ema: float = param(0.9, "smoothing of kl_short", source="card: official code", ge=0, lt=1)
    kl_long_ema: float = param(0.99, "smoothing of kl_long", source="card: official code", ge=0, lt=1)
    tau_low: float = param(0.1, "least tau", source="card: official code", ge=0)
    tau_high: float = param(0.6, "largest tau", source="card: official code", ge=0)
    kp: float = param(0.3, "proportional gain", source="card: official code")
    ki: float = param(0.01, "integral gain", source="card: official code")
    kd: float = param(0.05, "differential gain", source="card: official code")
    target_velocity: float = param(0.001, "reward per step that the PID wants", source="card: official code")
    reward_ema: float = param(0.95, "smoothing of the reward", source="card: official code", ge=0, lt=1)
    phase_window: int = param(50, "rewards that tell the phase", source="card: official code", ge=1)
    warmup: float = param(1.5, "factor of tau until the window is full", source="card: official code", gt=0)
    climbing: float = param(1.2, "factor while rewards rise", source="card: official code", gt=0)
    plateau: float = param(0.8, "factor when they neither rise nor have converged", source="card: official code", gt=0)
    converged: float = param(1.0, "factor when rewards are high and steady", source="card: official code", gt=0)
    climbing_rise: float = param(0.01, "rise of the mean over a window that is climbing", source="card: official code")
    converged_std: float = param(0.02, "SD of a window below which it is steady", source="card: official code", ge=0)
    converged_reward: float = param(0.7, "mean above which rewards are high", source="card: official code")
    momentum_strength: float = param(5.0, "asymmetric: factor of m^2", source="card: official code", ge=0)
    momentum_window: int = param(50, "asymmetric: steps over which m is taken", source="card: official code", ge=2)
    critic: bool = param(
        False, "two value heads on the policy's hidden states give the baseline", source="card: decision, optional"
    )
    softmin_alpha: float = param(0.3, "critic: 0 would be the minimum, inf the mean", source="card: paper", gt=0)
    value_clip: float = param(0.2, "critic: largest move of V that the clipped loss sees", source="card: code", ge=0)
    huber_delta: float = param(0.5, "critic: where the loss turns linear", source="card: official code", gt=0)
    value_weight: float = param(0.5, "critic: factor of the value loss", source="card: official code", gt=0)
    critic_lr: float = param(1e-5, "critic: rate of its AdamW", source="card: official code", gt=0)
    critic_clip: float = param(0.5, "critic: largest norm of its gradient", source="card: official code", gt=0)
    critic_gradient: str = param(
        "detached",
        "whether the value loss also trains the policy: detached, or policy (as in the released code)",
        source="card: decision; the code does not detach the hidden states",
        choices=("detached", "policy"),
    )
    critic_seed: int = param(0, "critic: decides the heads' first weights", source="ours", ge=0)

    def __post_init__(self) -> None:
        if self.critic:  # only then is the baseline replaced; the class says what is always owned
            object.__setattr__(self, "owns", (*type(self).owns, "baseline"))
            why = {
                name: f"{name} has no use for the critic's advantages; set critic: false"
                for name in ("real", "group_dpo")
            }
            object.__setattr__(self, "conflicts", {**Safe.conflicts, **why})

    # What it declares

    @property
    def idle(self) -> frozenset[str]:
        return frozenset() if self.critic else frozenset({"group_advantages", "sampled"})

    @property
    def _steers(self) -> bool:
        return self.penalty_strength > 0 or (self.controller == "asymmetric" and self.momentum_strength > 0)

    @property
    def _at_rollout(self) -> bool:
        return self._steers and self.kl_from == "rollout"

    def needs(self) -> frozenset[str]:
        return frozenset({REF_LOGPS} if self._steers else set()) | frozenset({HIDDEN} if self.critic else set())

    def cost(self) -> str:
        parts = []
        if self._steers:
            parts.append("a reference forward without gradient per rollout, which `beta` would cost as well")
        if self._at_rollout or self.critic:
            spared = "" if self._at_rollout else ", unless TRL makes one for the old log-probs"
            parts.append(f"one policy forward without gradient per rollout{spared}")
        return "; ".join(parts) or "nothing: no penalty, no critic"

    def check(self, setup: Setup) -> list[str]:
        parts = {
            "controller: entropy_aware": (self.controller == "entropy_aware", ENTROPY_AWARE),
            "controller: asymmetric": (self.controller == "asymmetric", ASYMMETRIC),
            "critic: true": (self.critic, CRITIC),
        }
        problems, args = unread(self, parts), setup.args
        if self.critic:
            problems += replaced_advantages(args)
        if self.tau_low > self.tau_high:
            problems.append(f"tau_low {self.tau_low} is above tau_high {self.tau_high}; swap them")
        if self._steers and self.controller == "entropy_aware" and getattr(args, "use_adaptive_entropy", False):
            problems.append(
                "TRL's adaptive bonus and the gate would both steer by the entropy; set use_adaptive_entropy: false and "
                "entropy_coef: 0.01, as the paper does"
            )
        if self._at_rollout and setup.engine in ("fsdp", "zero3"):
            problems.append(f"kl_from rollout is not tested under {setup.engine}; set kl_from: previous_step")
        served = getattr(args, "steps_per_generation", None) or 0
        if self._at_rollout and 0 < served * args.num_iterations < args.gradient_accumulation_steps:
            problems.append(
                "kl_from rollout needs one rollout or less per optimizer step; raise steps_per_generation to "
                "gradient_accumulation_steps, or set kl_from: previous_step"
            )
        return problems

    def summary(self, decode_one: Callable[[int], str]) -> list[str]:
        if self.controller == "asymmetric" or "tau" not in self.state:
            return []
        counts = Counter(self.state["phases"])
        shown = ", ".join(f"{phase} {counts[phase]}" for phase in PHASES if counts[phase])
        return [f"rollouts by training phase: {shown}; the threshold is {self.state['tau']:.3f} at the end"]

    # Rewards -> threshold. state: "pending" {"step", "sum", "count"} rewards of the rollouts of one set of weights that
    # have not moved the controller; "rewards" the means that have, "pid", "tau", "output", "phases" {phase: how often}.

    def observe(self, group: Group) -> None:
        """Rollouts under new weights close those before them; `kl_from: rollout` takes their values at once."""
        if self.critic:
            self._standardise(group)
        if not self._steers:
            return
        scored = ~group.outcomes.isnan().all(-1)
        total, count = float(group.reward_of(group.outcomes, None)[scored].sum()), int(scored.sum())
        if self._at_rollout:
            self._push(total, count)
            kl, entropy, tokens = (group.measured[key].sum() for key in ("kl", "entropy", "tokens"))
            self.state["trackers"] = self._tracked(torch.stack([kl, entropy, tokens]))
            group.metrics.mean("kl", kl / tokens.clamp(min=1))
        else:
            self._collect(group.step, total, count)

    def _collect(self, step: int, total: float, count: int) -> None:
        """Rewards of one more rollout at optimizer step `step`; those of an earlier step move the controller."""
        pending = self.state.get("pending")
        if pending is not None and pending["step"] != step:
            self._push(pending["sum"], pending["count"])
            pending = None
        before = pending or {"sum": 0.0, "count": 0}
        self.state["pending"] = {"step": step, "sum": before["sum"] + total, "count": before["count"] + count}

    def _push(self, total: float, count: int) -> None:
        """One mean reward moves PID, phase and threshold; a rollout that nobody scored moves nothing."""
        if count == 0:
            return
        reward = total / count
        rewards = [*self.state.get("rewards", []), reward][-2 * self.phase_window :]
        limits = (self.phase_window, self.climbing_rise, self.converged_std, self.converged_reward)
        phase = phase_of(rewards, *limits)
        gains = Gains(self.kp, self.ki, self.kd, self.reward_ema, self.target_velocity, INTEGRAL_LIMIT)
        pid, output = pid_step(Pid(**self.state.get("pid", {})), reward, gains)
        phases = Counter(self.state.get("phases", {}))
        phases[phase] += 1
        self.state.update(rewards=rewards, pid=dataclasses.asdict(pid), output=output, phase=phase)
        self.state.update(phases=dict(phases), tau=self._tau(output, phase))

    def _tau(self, output: float, phase: str) -> float:
        return threshold(self.kl_base, output, getattr(self, phase), self.tau_low, self.tau_high)

    # KL and entropy -> coefficient. state: "open" (3,) sums of kl, H and tokens of optimizer step "open_at"; "trackers"
    # {"short", "long", "entropy", "first_entropy"} 0-dim and "history" (n,) of kl, all of closed steps.

    def _tracked(self, sums: Tensor) -> dict[str, Tensor]:
        """The trackers after one more measurement, (3,) sums of kl, H and tokens."""
        kl, entropy = (sums[:2] / sums[2].clamp(min=1)).unbind()
        before = {k: v.to(kl.device) for k, v in self.state.get("trackers", {}).items()}
        short, long = (before.get(key, torch.zeros_like(kl)) for key in ("short", "long"))
        history = torch.cat([before.get("history", kl.new_zeros(0)), kl.view(1)])
        return {
            "short": self.kl_short_ema * short + (1 - self.kl_short_ema) * kl,
            "long": self.kl_long_ema * long + (1 - self.kl_long_ema) * kl,
            "entropy": entropy,
            "first_entropy": before.get("first_entropy", entropy),
            "history": history[-self.momentum_window :],
        }

    def _trackers(self, step: int, device: torch.device) -> dict[str, Tensor] | None:
        """Those that hold in optimizer step `step`: what was measured in an earlier one is closed; None: nothing yet."""
        if "open" in self.state and self.state["open_at"] != step:
            return self._tracked(self.state["open"].to(device))
        found = self.state.get("trackers")
        return found and {k: v.to(device) for k, v in found.items()}

    def _control(self, trackers: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """penalty, its slope c, and g; 0-dim each."""
        if self.controller == "asymmetric":
            excess = one_sided(trackers["history"][-1], self.kl_base, self.penalty_strength)
            rise = momentum_penalty(trackers["history"], self.momentum_window, self.momentum_strength)
            return excess[0] + rise[0], excess[1] + rise[1], torch.ones_like(excess[0])
        floor = trackers["first_entropy"] / 2 if self.entropy_floor is None else self.entropy_floor
        gate = entropy_gate(trackers["entropy"], floor, self.gate_min)
        tau = self.state.get("tau", self._tau(0.0, WARMUP))
        penalty, slope = one_sided(trackers["short"], tau, self.penalty_strength)
        return gate * penalty, gate * slope, gate

    def streams(self, rollout: Rollout) -> dict[str, Tensor]:
        """`share`: rows over loss tokens of the whole rollout, which turns means over rows into means over tokens."""
        found = {}
        if self._steers:
            tokens, mine = rollout.gather(rollout.mask.sum(1).float())
            found["share"] = (tokens.numel() / tokens.sum().clamp(min=1)).expand(tokens[mine].numel())
        if self.critic:
            _, mine = rollout.gather(torch.ones_like(rollout.advantages))
            found["target"], found["old_value"] = (self.state["targets"][:, mine]).unbind()
        return found

    def aux_loss(self, x: LossInput) -> Tensor | None:
        penalty, value = self._penalty(x), self._value_loss(x)
        if penalty is None or value is None:
            return value if penalty is None else penalty
        return penalty + value

    def _penalty(self, x: LossInput) -> Tensor | None:
        trackers = self._trackers(x.step, x.logps.device) if self._steers else None
        if trackers is None:
            return None
        penalty, slope, gate = self._control(trackers)
        x.scratch["trackers"] = trackers
        self._log(x, trackers, penalty, slope, gate)
        if self.grad == "constant":
            return penalty
        assert x.ref_logps is not None  # REF_LOGPS is declared
        per_row = (sampled_kl(x.logps, x.ref_logps) * x.mask).sum(1)
        return slope * x.row_scale * (per_row * x.streams["share"]).mean()

    def _log(self, x: LossInput, trackers: dict[str, Tensor], penalty: Tensor, slope: Tensor, gate: Tensor) -> None:
        values = {"penalty": penalty, "c": slope, "active": (penalty > 0).float(), "kl_long": trackers["long"]}
        values["kl_short"] = trackers["short"]
        if self.controller == "entropy_aware":
            phase = self.state.get("phase", WARMUP)
            values["g"] = gate
            x.metrics.mean("pid", self.state.get("output", 0.0))
            x.metrics.mean("phase", float(PHASES.index(phase)))
            x.metrics.mean("tau", self.state.get("tau", self._tau(0.0, WARMUP)))
        for name, value in values.items():
            x.metrics.mean(name, value)

    def observe_loss(self, x: LossInput) -> None:
        """Closes the step before, and adds this micro-batch of all processes to the open one, on the first pass only."""
        if self.critic:
            self._train_critic(x)
        if not self._steers or self._at_rollout:
            return
        if "trackers" in x.scratch:
            self.state["trackers"] = x.scratch["trackers"]
        if self.state.get("open_at") != x.step:
            self.state.pop("open", None)
        if x.first_pass:
            assert x.ref_logps is not None
            kl, mask = (x.logps.detach() - x.ref_logps), x.mask
            x.metrics.mean("kl", kl, mask)
            own = torch.stack([(kl * mask).sum(), (x.entropy.detach() * mask).sum(), mask.sum()])
            sums = x.gather(own)[0].view(-1, 3).sum(0)
            before = self.state.get("open")
            self.state.update(open=sums if before is None else before.to(sums) + sums, open_at=x.step)

    # Critic. state: "stats" (3,) of the rewards; "targets" (2, N) y and V_old of the newest rollout's rows, in the order
    # of the processes, NaN where no reward is known; "critic" as `trl_ext.critic` describes it.

    def sampled(self, policy: Features, completion_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The states that the heads read, where TRL's own forward gives them away."""
        return {"last": critics.last_states(policy.hidden, mask).float()} if self.critic else {}

    def measure(self, rollout: Rollout) -> dict[str, Tensor]:
        if not (self.critic or self._at_rollout):
            return {}
        if not self._at_rollout and "last" in rollout.sampled:
            return {"value": self._values(rollout.step, rollout.sampled["last"])}
        everyone = torch.arange(rollout.mask.size(0), device=rollout.mask.device)
        parts = [self._block(rollout, rows) for rows in everyone.split(rollout.micro_batch)]
        found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        if self.critic:
            found["value"] = self._values(rollout.step, found.pop("last"))
        return found

    def _block(self, rollout: Rollout, rows: Tensor) -> dict[str, Tensor]:
        """One forward of the sampling policy over `rows`: sums of kl, H and tokens (R,), and the heads' states (R, H)."""
        policy, mask, found = rollout.other(POLICY, rows), rollout.mask[rows], {}
        if self.critic:
            found["last"] = critics.last_states(policy.hidden, mask).float()
        if self._at_rollout:
            valid = mask.bool()
            ids = rollout.completion_ids[rows][valid]
            logps, entropy = per_position_detached(sampled_and_entropy, [(policy.head, policy.at(valid))], ids).unbind(
                -1
            )
            kl = logps - rollout.ref_logps()[rows][valid]
            zeros = torch.zeros(valid.shape, device=mask.device)
            found |= {k: zeros.masked_scatter(valid, v).sum(1) for k, v in (("kl", kl), ("entropy", entropy))}
            found["tokens"] = valid.sum(1).float()
        return found

    def _values(self, step: int, states: Tensor) -> Tensor:
        """V (B,) of states (B, H)."""
        return ops.soft_min(critics.values(self._critic_at(step, states)["heads"], states), self.softmin_alpha)

    def _critic_at(self, step: int, states: Tensor) -> dict[str, Any]:
        """The critic as it is in optimizer step `step`, its update for an earlier one made."""
        found = self.state.get("critic") or critics.new_critic(states.size(-1), self.critic_seed, step)
        found = critics.on_device(found, states.device)
        return found if found["at"] == step else critics.updated(found, step, self.critic_lr, self.critic_clip)

    def _stats(self, group: Group) -> Tensor:
        return critics.merged(self.state.get("stats", critics.fresh_stats()), group.total[~group.unscored])

    def group_advantages(self, advantages: Tensor, group: Group) -> Tensor:
        if not self.critic:
            return advantages
        scored = ~group.unscored
        raw = critics.standardised(group.total, self._stats(group)) - group.measured["value"]
        if int(scored.sum()) < 2:  # no spread to divide by
            return torch.zeros_like(raw)
        return torch.where(scored, (raw - raw[scored].mean()) / (raw[scored].std() + 1e-8), 0.0)

    def _standardise(self, group: Group) -> None:
        """Stores the running statistics, and what the loss compares the values with."""
        self.state["stats"] = stats = self._stats(group)
        target = critics.standardised(group.total, stats).masked_fill(group.unscored, torch.nan)
        self.state["targets"] = torch.stack([target.flatten(), group.measured["value"].flatten()])

    def _rows(self, x: LossInput) -> Tensor:
        """(B,) bool: rows with loss tokens and a reward."""
        return x.mask.bool().any(1) & ~x.streams["target"].isnan()

    def _value_loss(self, x: LossInput) -> Tensor | None:
        """The part of the value loss that trains the policy."""
        if not self.critic or self.critic_gradient == "detached":
            return None
        assert x.policy is not None  # HIDDEN is declared
        value = self._values(x.step, critics.last_states(x.policy.hidden, x.mask))
        return self.value_weight * x.row_scale * (self._per_row(x, value) * self._rows(x)).mean()

    def _per_row(self, x: LossInput, value: Tensor) -> Tensor:
        target, old = x.streams["target"].nan_to_num(), x.streams["old_value"]
        return critics.value_loss(value, old, target, self.value_clip, self.huber_delta)

    def _train_critic(self, x: LossInput) -> None:
        """Adds the gradient of all processes' rows; every process does the same sum, so the heads stay alike."""
        assert x.policy is not None
        states, rows = critics.last_states(x.policy.hidden.detach(), x.mask).float(), self._rows(x)
        critic = self._critic_at(x.step, states)
        both = critics.values(critic["heads"], states)
        value = ops.soft_min(both, self.softmin_alpha)
        x.metrics.mean("value", value, rows)
        x.metrics.mean("value_gap", (both[0] - both[1]).abs(), rows)
        x.metrics.mean("value_loss", self._per_row(x, value), rows)
        everyone = x.gather(states.flatten())[0].view(-1, states.size(-1))
        counted, old, target = (x.gather(v.float())[0] for v in (rows, x.streams["old_value"], x.streams["target"]))
        loss = {"weight": self.value_weight, "alpha": self.softmin_alpha}
        loss |= {"clip": self.value_clip, "delta": self.huber_delta}
        self.state["critic"] = critics.with_rows(critic, everyone, counted.bool(), old, target, **loss)
