"""FG-ExPO: a reference KL that is loosened while the model fails, and prompts drawn around a pass rate of one half.

Paper: "FG-ExPO: Frontier-Guided Exploration-Prioritized Policy Optimization via Adaptive KL and Gaussian Curriculum",
arXiv 2605.11403. Card: fg_expo. Two parts, each of which can be switched off. For outcomes R in {0, 1} of the P prompts
with G completions of one rollout, on all processes:

    akl    acc      = mean of R over the rollout
           rho(x)   = (tanh(x) + 1) / 2                       0.5 at 0, 0.880797 at 1: low accuracy means less KL
           beta_eff = beta rho(acc)                           a number, no gradient; for every update on this rollout
    gcs    p_q     <- a p_q + (1 - a) mean_g R(o_qg)          for the prompts of the rollout only; p_q = p0 at first
           w_q      = exp(-(p_q - mu)^2 / (2 sigma^2)),  P(q) = w_q / sum w      for the next rollout

Rollout, advantages, clipping and the KL estimator are TRL's. A rollout holds no prompt twice (card: decision, the paper
does not say); from one rollout to the next prompts come again. An epoch is counted as if each prompt had come once.
Where several rollouts make one optimizer step, each has its own acc. A completion without a score counts as wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from trl_ext.checks import reward_named, unread
from trl_ext.method import Draw, Group, LossInput, Method, Setup, param
from trl_ext.rollouts.draws import Floats
from trl_ext.rollouts.pass_rates import BINS, PassRates, table_in


def kl_scale(accuracy: float, form: str = "tanh") -> float:
    """rho(acc). tanh: (tanh(acc) + 1) / 2; constant: 1, which is GRPO with beta."""
    return 1.0 if form == "constant" else (math.tanh(accuracy) + 1) / 2


def frontier_weights(rates: Floats, center: float, sigma: float) -> Floats:
    """w = exp(-(p - mu)^2 / (2 sigma^2)) of pass rates p (k,) -> (k,); all 1 for sigma = inf."""
    return np.exp(-((rates - center) ** 2) / (2 * sigma**2))


def outcomes(group: Group, accuracy: str | None, threshold: float | None) -> Tensor:
    """(P, G) in [0, 1]: the reward called `accuracy`, or the total; with a threshold, whether it reaches that.

    Raises ValueError if there is no threshold and a reward lies outside [0, 1].
    """
    reward = group.reward_of(group.outcomes, accuracy)
    if threshold is not None:
        return (reward >= threshold).float()
    if bool(((reward < 0) | (reward > 1)).any()):
        name = f"reward '{accuracy}'" if accuracy else "the reward"
        raise ValueError(
            f"fg_expo: {name} is between {float(reward.min()):.3g} and {float(reward.max()):.3g}, but an accuracy lies "
            "in [0, 1]; set threshold to the value from which an answer counts as right, or name another reward: accuracy"
        )
    return reward


@dataclass(frozen=True)
class FgExpo(Method):
    """Adaptive KL (akl) and Gaussian curriculum sampling (gcs), together or alone; both off is TRL bit for bit.

    akl with rho "constant" is GRPO with beta; gcs with sigma = inf draws every prompt with the same chance.
    """

    name = "fg_expo"
    title = (
        "FG-ExPO: Frontier-Guided Exploration-Prioritized Policy Optimization via Adaptive KL and Gaussian Curriculum"
    )
    paper = "2605.11403"
    headline = ("acc", "beta_eff", "one_sided", "effective_prompts")
    owns = ("sampler", "kl controller")
    conflicts: ClassVar = {
        "dgpo": "FG-ExPO scales a KL term and DGPO has none (beta: 0); set akl: false in fg_expo to keep its sampling",
        "paced": "both favour prompts by their pass rate, which would count twice; set gcs: false in fg_expo to keep its "
        "KL part beside paced",
    }

    akl: bool = param(True, "scale the KL coefficient with the accuracy", source="card: paper, one of two add-ons")
    gcs: bool = param(True, "draw prompts around the frontier", source="card: paper, one of two add-ons")
    rho: str = param(
        "tanh",
        "scale of beta: tanh, (tanh(acc) + 1) / 2, or constant, 1",
        source="card: paper; constant is its limit GRPO",
        choices=("tanh", "constant"),
    )
    center: float = param(0.5, "mu, the pass rate that is drawn most", source="card: paper", ge=0, le=1)
    sigma: float = param(0.35, "width of the curriculum; inf is uniform", source="card: paper", gt=0)
    factor: float = param(0.9, "a, memory of the pass rates", source="card: paper", ge=0, lt=1)
    initial: float = param(0.5, "pass rate of a prompt before its first visit", source="card: paper", ge=0, le=1)
    accuracy: str | None = param(
        None,
        "reward function that says right or wrong; none: the sum of all (needed if there are several)",
        source="card: open question 3, decision",
    )
    threshold: float | None = param(
        None,
        "reward from which an answer is right; none: the reward is the accuracy, in [0, 1]",
        source="card: open question 3, decision",
    )

    _kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The table that is made from `state`, and the beta_eff to log."""

    def __post_init__(self) -> None:
        """What is switched off owns nothing and is in nobody's way."""
        slots = ("sampler",) * self.gcs + ("kl controller",) * self.akl
        object.__setattr__(self, "owns", slots)
        used = ("dgpo",) * self.akl + ("paced",) * self.gcs
        object.__setattr__(self, "conflicts", {name: FgExpo.conflicts[name] for name in used})

    # What it declares

    @property
    def idle(self) -> frozenset[str]:
        akl, gcs = {"kl_coef", "observe_loss"}, {"choose_prompts"}
        off = (set() if self.akl else akl) | (set() if self.gcs else gcs)
        return frozenset(off if self.akl or self.gcs else off | {"observe"})

    def cost(self) -> str:
        table = "; a table of pass rates, less than 100 bytes for each row of the training set" if self.gcs else ""
        return f"no extra forward beside TRL's for beta{table}" if self.akl else f"no extra forward{table}"

    def check(self, setup: Setup) -> list[str]:
        gcs = ("center", "sigma", "factor", "initial")
        problems = unread(self, {"akl: true": (self.akl, ("rho",)), "gcs: true": (self.gcs, gcs)})
        args = setup.args
        if self.akl and getattr(args, "beta", 1.0) == 0:
            problems.append("akl scales the reference KL, and beta: 0 has none; set beta (paper: 0.02), or akl: false")
        if self.gcs and not getattr(args, "shuffle_dataset", True):
            problems.append(
                "gcs draws the prompts, so their order is not kept; leave shuffle_dataset on, or gcs: false"
            )
        if self.gcs and self._weights(np.array([0.0, 1.0])).min() == 0:
            problems.append(
                f"with sigma {self.sigma} some pass rates are never drawn again; set sigma to 0.05 or more"
            )
        summed = None if self.threshold is not None else "says right or wrong (or set the threshold of their sum)"
        return problems + (reward_named(setup, self.accuracy, "accuracy", summed) if self.akl or self.gcs else [])

    # Prompts. state: "rates" (n,), "visits" (n,) of the training set; "draws" how many rollouts were drawn; "acc"

    def _weights(self, rates: Floats) -> Floats:
        return frontier_weights(rates, self.center, self.sigma)

    def _table(self, size: int) -> PassRates:
        make = functools.partial(PassRates, size, self.factor, self.initial, self._weights)
        return table_in(self.state, self._kept, make)

    def choose_prompts(self, draw: Draw) -> Tensor | None:
        table, number = self._table(draw.size), self.state.get("draws", 0)
        self.state["draws"] = number + 1
        draw.metrics.mean("effective_prompts", table.effective)
        return table.draw(draw.count, draw.seed, number)

    def observe(self, group: Group) -> None:
        """The accuracy of this rollout sets beta_eff for its updates, and moves the pass rates of its prompts."""
        right = outcomes(group, self.accuracy, self.threshold)
        rates = right.mean(1)
        self.state["acc"] = float(rates.mean())
        group.metrics.mean("acc", rates)
        group.metrics.mean("one_sided", (right.amin(1) == right.amax(1)).float())
        if group.drawn is not None and self.gcs:
            self._visit(group, group.drawn, rates)
        if group.discarded_drawn is not None and group.discarded_rewards is not None and self.gcs:
            again = dataclasses.replace(group, outcomes=group.discarded_rewards)
            self._visit(group, group.discarded_drawn, outcomes(again, self.accuracy, self.threshold).mean(1))

    def _visit(self, group: Group, drawn: Tensor, rates: Tensor) -> None:
        table = self._table(len(self.state["rates"]))
        group.metrics.mean("rate_drawn", table.rates[drawn.cpu()])
        table.update(drawn, rates)
        group.metrics.mean("visits", table.visits[drawn.cpu()])
        group.metrics.mean("visited", table.visited / len(table))
        for name, share in zip(_BIN_NAMES, table.histogram, strict=True):
            group.metrics.mean(f"rates_{name}", share)

    # Step

    def kl_coef(self, beta: float, step: int) -> float:
        self._kept["beta_eff"] = beta * kl_scale(self.state["acc"], self.rho)
        return self._kept["beta_eff"]

    def observe_loss(self, x: LossInput) -> None:
        x.metrics.mean("beta_eff", self._kept["beta_eff"])

    def summary(self, decode_one: Callable[[int], str]) -> list[str]:
        """How the pass rates lie at the end, and how often prompts came."""
        if "rates" not in self.state:
            return []
        table, visits = self._table(len(self.state["rates"])), self.state["visits"]
        shares = ", ".join(f"{n.replace('_', '-')}: {s:.0%}" for n, s in zip(_BIN_NAMES, table.histogram, strict=True))
        return [
            f"Pass rates of {len(table)} prompts: {shares}",
            f"Visits: {float(visits.double().mean()):.1f} on average, at most {int(visits.max())}; "
            f"{1 - table.visited / len(table):.0%} of the prompts never came",
        ]


_BIN_NAMES = [f"{i / BINS:.1f}_{(i + 1) / BINS:.1f}" for i in range(BINS)]
