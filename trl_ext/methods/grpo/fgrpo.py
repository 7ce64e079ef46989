"""FGRPO: constraints E[R_k] >= tau_k on the quality of the reasoning, held by multipliers that dual ascent moves.

Paper: "Faithful GRPO: Improving Visual Spatial Reasoning in Multimodal Language Models via Constrained Policy
Optimization", arXiv 2604.08476. Card: fgrpo. R_task is the weighted sum of the rewards, R_k (P, G) each constraint's
reward, m_k where it applies: it is not None and, unless `always` names it, the answer is right (R_acc > 0):

    A_x      = (R_x - mean_group) / (std_group + 1e-4)        per signal, over the group's applicable entries; else 0
    A        = A_task + sum_k lambda_k A_k                    then whitened: (A - mean) / (std + 1e-4) over the rollout
    cbar_k   = sum m_k R_k / sum m_k                          over the rollout, all processes
    lambda_k <- clip(lambda_k + eta (tau_k - cbar_k), 0, lambda_max)      skipped where fewer than 8 apply

A constraint's reward needs weight 0 in `reward_weights`: it is no part of R_task, and TRL's `reward` is then the task's.
Nothing depends on images; any reward function, rule or judge, can be a constraint.

`mode` has the paper's coupled baselines, one reward that is normalised as GRPO's, for comparison. With the constraints C
of right answers, those under `always` V (paper: grounding), and R_fmt the reward called `format`:

    additive        (R_acc + sum_C R_acc R_k + sum_V R_fmt R_k) / (1 + K)
    multiplicative  0.5 R_acc prod_C R_k + 0.5 R_fmt prod_V R_k              without a format: R_acc prod_C R_k

Decisions of the card. Masked entries stay out of the group statistics (`masked: zero` counts them as R_k = 0). Sample std
and 1e-4 as in TRL. The whitening and the dual step take the generation batch, once per generation batch; the new lambda
acts from the next one on. Ours: a constraint without spread in a group contributes exactly 0 there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl.trainer.utils import nanstd

from trl_ext.checks import unread
from trl_ext.method import Group, Method, Setup, param

EPS = 1e-4
"""TRL's, in every normalisation."""


def group_normalised(values: Tensor) -> Tensor:
    """(P, G), NaN where not applicable -> (P, G): (R - mean) / (std + 1e-4) over the group's other entries; NaN stays."""
    mean = torch.nanmean(values, dim=1, keepdim=True)
    return (values - mean) / (nanstd(values, dim=1, keepdim=True) + EPS)


def constraint_advantages(values: Tensor) -> Tensor:
    """A_k: `group_normalised`, with exactly 0 for NaN, for fewer than two entries and for entries without spread."""
    low = values.nan_to_num(nan=torch.inf).amin(1, keepdim=True)
    high = values.nan_to_num(nan=-torch.inf).amax(1, keepdim=True)
    return torch.where(high > low, group_normalised(values).nan_to_num(), 0.0)


def whitened(advantages: Tensor) -> Tensor:
    """(A - mean) / (std + 1e-4) over all entries; NaN stays and does not count."""
    return (advantages - torch.nanmean(advantages)) / (nanstd(advantages) + EPS)


def dual_step(multiplier: float, score: float, tau: float, eta: float, largest: float) -> float:
    """lambda <- clip(lambda + eta (tau - cbar), 0, lambda_max)."""
    return min(max(multiplier + eta * (tau - score), 0.0), largest)


@dataclass(frozen=True)
class Fgrpo(Method):
    """Replaces the advantages by those of the constrained problem.

    initial = 0, eta = 0 and whiten: false is TRL on R_task bit for bit. Metrics, for each
    constraint: `lambda_NAME` (in use), `score_NAME` (cbar), `gap_NAME` (tau - cbar), `applies_NAME` (share of rollouts),
    `spread_NAME` (std of A_k); and `accuracy`.
    """

    name = "fgrpo"
    title = (
        "Faithful GRPO: Improving Visual Spatial Reasoning in Multimodal Language Models via Constrained Policy "
        "Optimization"
    )
    paper = "2604.08476"
    owns = ("baseline",)
    headline = ("accuracy",)
    conflicts: ClassVar = {
        "real": "REAL learns from right and wrong alone, so constraints have no effect; name one",
    }

    constraints: dict[str, float] = param(
        {}, "reward function -> tau, the mean that it should reach", source="card: paper, 0.95, 0.95 and 0.7"
    )
    accuracy: str | None = param(
        None,
        "reward function that says right (above 0) or wrong; needed if several have a weight",
        source="card: paper, R_acc",
    )
    always: list[str] = param(
        [], "constraints that hold for wrong answers too, wherever they are not None", source="card: paper, m_G"
    )
    initial: float = param(1.0, "lambda at the start", source="card: paper", ge=0)
    eta: float = param(0.05, "dual learning rate; 0 keeps lambda", source="card: paper", ge=0)
    largest: float = param(5.0, "lambda_max", source="card: paper", gt=0)
    minimum: int = param(8, "least number of applicable rollouts for a dual step", source="card: paper", ge=1)
    masked: str = param(
        "exclude",
        "entries that a constraint does not apply to: exclude them from the statistics, or count them as zero",
        source="card: decision (a)",
        choices=("exclude", "zero"),
    )
    whiten: bool = param(True, "whiten over the rollout; mode constrained", source="card: paper")
    mode: str = param(
        "constrained",
        "constrained (the method), or one coupled reward: additive, multiplicative",
        source="card: paper; the others are its baselines",
        choices=("constrained", "additive", "multiplicative"),
    )
    format: str | None = param(
        None, "reward function of the format, in the coupled modes", source="card: paper, R_fmt of the baselines"
    )

    # What it declares

    def cost(self) -> str:
        return "no extra forward; the constraints' reward functions (a judge is a request for each completion)"

    def check(self, setup: Setup) -> list[str]:
        problems = self._wrong_settings()
        if setup.reward_names is not None:
            problems += self._wrong_rewards(list(setup.reward_names), getattr(setup.args, "reward_weights", None))
        return problems + other_normalisations(setup.args)

    def _wrong_settings(self) -> list[str]:
        coupled = self.mode != "constrained"
        parts = {
            "mode: constrained": (not coupled, ("initial", "eta", "largest", "minimum", "masked", "whiten")),
            "mode: additive or multiplicative": (coupled, ("format",)),
        }
        stray = [name for name in self.always if name not in self.constraints]
        not_numbers = [
            n for n, tau in self.constraints.items() if isinstance(tau, bool) or not isinstance(tau, (int, float))
        ]
        wrong = {
            "no constraints; name rewards with the mean that each should reach, as constraints: {NAME: 0.95}": (
                not self.constraints
            ),
            f"constraints: {', '.join(not_numbers)} has no number as its tau": bool(not_numbers),
            f"always: {', '.join(stray)} is no constraint; add it to constraints, or drop it here": bool(stray),
            f"initial {self.initial} is above largest {self.largest}": self.initial > self.largest,
            f"mode: {self.mode} multiplies constraints under always with the format's reward; name it: format": (
                coupled and bool(self.always) and self.format is None
            ),
        }
        return [message for message, found in wrong.items() if found] + unread(self, parts)

    def _wrong_rewards(self, names: list[str], weights: Any) -> list[str]:
        weights = dict(zip(names, weights or [1.0] * len(names), strict=False))
        asked = [
            *self.constraints,
            *([self.accuracy] if self.accuracy else []),
            *([self.format] if self.format else []),
        ]
        problems = [f"'{n}' is not a reward of this run ({', '.join(names)})" for n in asked if n not in names]
        heavy = [n for n in self.constraints if weights.get(n, 0) != 0 and n != self.accuracy]
        if heavy:
            problems.append(
                f"{', '.join(heavy)}: a constraint is no part of the task's reward; set reward_weights with 0 in its "
                f"place (order: {', '.join(names)})"
            )
        task = [n for n in names if weights[n] != 0]
        if self.accuracy is None and len(task) > 1:
            problems.append(f"several rewards ({', '.join(task)}); name the one that tells right from wrong: accuracy")
        return problems

    # Signals

    def _right(self, group: Group) -> Tensor:
        """(P, G) bool: R_acc > 0."""
        return self._accuracy(group) > 0

    def _accuracy(self, group: Group) -> Tensor:
        return group.total if self.accuracy is None else group.reward(self.accuracy)

    def _applicable(self, group: Group, name: str) -> Tensor:
        """m_k (P, G) bool."""
        given = ~group.rewards[..., list(group.reward_names).index(name)].isnan()
        return given if name in self.always else given & self._right(group)

    def _signal(self, group: Group, name: str) -> Tensor:
        """R_k (P, G) as it enters the group's statistics."""
        outside = torch.nan if self.masked == "exclude" else 0.0
        return group.reward(name).masked_fill(~self._applicable(group, name), outside)

    def _multiplier(self, name: str) -> float:
        """lambda_k in use. state: "lambda", name -> number."""
        return float(self.state.get("lambda", {}).get(name, self.initial))

    # Advantages

    def group_advantages(self, advantages: Tensor, group: Group) -> Tensor:
        lost = group.unscored
        if self.mode != "constrained":
            found = group_normalised(self._coupled(group).masked_fill(lost, torch.nan))
        else:
            found = group_normalised(group.total.masked_fill(lost, torch.nan))
            for name in self.constraints:
                multiplier = self._multiplier(name)
                if multiplier > 0:
                    found = found + multiplier * constraint_advantages(self._signal(group, name))
            found = whitened(found) if self.whiten else found
        return found.nan_to_num().to(advantages.dtype)

    def _coupled(self, group: Group) -> Tensor:
        """The one reward of the paper's baselines (P, G)."""
        accuracy = self._accuracy(group)
        form = torch.zeros_like(accuracy) if self.format is None else group.reward(self.format)
        pairs = [(form if name in self.always else accuracy, group.reward(name)) for name in self.constraints]
        if self.mode == "additive":
            return (accuracy + sum(factor * value for factor, value in pairs)) / (1 + len(pairs))
        for name in self.constraints:
            if name in self.always:
                form = form * group.reward(name)
            else:
                accuracy = accuracy * group.reward(name)
        return accuracy if self.format is None else 0.5 * accuracy + 0.5 * form

    # Dual step

    def observe(self, group: Group) -> None:
        """Logs what the update in hand was made with, then moves lambda for the next rollout."""
        group.metrics.mean("accuracy", self._right(group).float())
        multipliers = {}
        for name, tau in self.constraints.items():
            applies, multiplier = self._applicable(group, name), self._multiplier(name)
            score = (group.reward(name) * applies).sum() / applies.sum().clamp(min=1)
            self._log(group, name, multiplier, score, applies)
            enough = int(applies.sum()) >= self.minimum
            multipliers[name] = (
                dual_step(multiplier, float(score), float(tau), self.eta, self.largest) if enough else multiplier
            )
        if self.mode == "constrained":
            self.state["lambda"] = multipliers

    def _log(self, group: Group, name: str, multiplier: float, score: Tensor, applies: Tensor) -> None:
        log, known = group.metrics.mean, float(applies.any())
        log(f"score_{name}", score, known)
        log(f"gap_{name}", float(self.constraints[name]) - score, known)
        log(f"applies_{name}", applies.float())
        if self.mode == "constrained":
            log(f"lambda_{name}", multiplier)
            log(f"spread_{name}", constraint_advantages(self._signal(group, name)).std())

    def summary(self, decode_one: Callable[[int], str]) -> list[str]:
        """The multipliers at the end."""
        found = self.state.get("lambda", {})
        return [f"lambda of {name}: {value:.4f} (tau {self.constraints[name]})" for name, value in found.items()]


def other_normalisations(args: Any) -> list[str]:
    """TRL's settings that ask for another normalisation than each signal's own in its group."""
    problems = []
    scale = getattr(args, "scale_rewards", "group")
    if scale not in ("group", True):
        problems.append(f"scale_rewards {scale}: each signal is divided by its group's std; set scale_rewards: group")
    aggregation = getattr(args, "multi_objective_aggregation", "sum_then_normalize")
    if aggregation != "sum_then_normalize":
        problems.append(
            f"multi_objective_aggregation {aggregation} has no effect, since the advantages are replaced; set "
            "multi_objective_aggregation: sum_then_normalize"
        )
    return problems
