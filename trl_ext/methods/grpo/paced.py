"""PACED: prompts count by how close they are to the edge of what the model can do, w(p) = p^a (1 - p)^b.

Paper: "PACED: Distillation (and On-Policy Self-Distillation) at the Frontier of Student Competence", arXiv 2603.11178.
Card: paced. For a prompt x with K rollouts of which s pass the verifier, D_t a divergence from a teacher:

    p(x) = (s + c) / (K + 2c)            c = 0 unless `smoothing`
    w(p) = p^a (1 - p)^b                 0^0 = 1; largest at a / (a + b); no gradient
    L    = sum_x w_x L_distill(x) / sum_x w_x            L_distill(x) = (1/T) sum_t D_t

p comes from the prompt's own group (live, K = G) or from a column of the data (static). Three uses, of which the first
is the paper's and the other two are extensions of ours:
    distill      the weight multiplies the distillation term of another method, row by row (`DISTILLS`)
    advantages   A <- A w / mean w. For 0/1 rewards a group's mean |A| is 2 sqrt(p(1-p)), without `scale_rewards` 2p(1-p),
                 so the weighted means are 2 (p(1-p))^1.5 and 2 (p(1-p))^2 before normalisation
    sampler      prompts are drawn with P(x) = max(w(p_x), floor) / sum, p from a table of the last visits
TRL's own distillation with these weights, and its two stages, is `trl_ext.distillation`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_ext.checks import reward_named, unread
from trl_ext.method import Draw, Group, LossInput, Method, Metrics, Rollout, Setup, param
from trl_ext.rollouts.draws import Floats
from trl_ext.rollouts.pass_rates import PassRates, table_in

DISTILLS = ("trace",)
"""The methods that have a distillation term and multiply it by `x.distill_weights`."""
BINS = 5
"""Equal bins of p in the metrics."""


def pass_rate(solved: Tensor, smoothing: float = 0.0) -> Tensor:
    """(..., K) verdicts in [0, 1], NaN where there is none -> (...) p = (s + c) / (K + 2c) over the verdicts.

    NaN where a prompt has no verdict at all, whatever c.
    """
    count = (~solved.isnan()).sum(-1)
    rate = (solved.nansum(-1) + smoothing) / (count + 2 * smoothing)
    return torch.where(count > 0, rate, torch.nan)


def kernel(p: Tensor, a: float = 1.0, b: float = 1.0) -> Tensor:
    """w(p) = p^a (1 - p)^b of any shape, detached; 0^0 = 1. p in [0, 1]."""
    p = p.detach()
    return p**a * (1 - p) ** b


def normalise(weights: Tensor, how: str = "batch") -> Tensor:
    """(P,) weights, those that are NaN not counted -> (P,): w / mean w ("batch"), w / max w ("max") or w ("none").

    If all weights are 0 they stay 0. ValueError for another `how`.
    """
    if how == "none":
        return weights
    known = ~weights.isnan()
    if how == "batch":
        scale = weights.nansum() / known.sum().clamp(min=1)
    elif how == "max":
        scale = weights.nan_to_num().amax()
    else:
        raise ValueError(f"normalize is batch, none or max, not {how!r}")
    return weights / torch.where(scale > 0, scale, 1.0)


def effective_size(weights: Tensor) -> Tensor:
    """(P,) -> scalar (sum w)^2 / sum w^2: how many prompts the batch is worth; 0 if all weights are 0."""
    return weights.sum().square() / weights.square().sum().clamp(min=torch.finfo(weights.dtype).tiny)


def log_weights(metrics: Metrics, p: Tensor, raw: Tensor) -> None:
    """What a batch of P prompts looks like: shares of p in `BINS` bins ("p_0.4": p in [0.4, 0.6)), their mean, mean raw
    weight, effective size and share of weight 0. p, raw (P,) without NaN."""
    if p.numel() == 0:
        return
    bins = (p * BINS).long().clamp(max=BINS - 1)
    for i in range(BINS):
        metrics.mean(f"p_{i / BINS:.1f}", (bins == i).float(), torch.ones_like(p))
    metrics.mean("p_mean", p, torch.ones_like(p))
    metrics.mean("w_mean", raw, torch.ones_like(p))
    metrics.mean("zero_weight", (raw == 0).float(), torch.ones_like(p))
    metrics.mean("effective_prompts", effective_size(raw))


@dataclass(frozen=True)
class Paced(Method):
    """Weighs or draws prompts by w(p), so that those always and never solved count least.

    A prompt on which the verifier gives no verdict keeps weight 1. If all weights of a batch are 0, so is the weighted
    term. a = b = 0 is TRL bit for bit with `use: advantages`, and the unweighted distillation with `use: distill`.
    fg_expo's curriculum and riskpo, which are about the same pass rates, name their conflict with it themselves.
    With several rewards, `use: advantages` also silences what the others say about prompts that nobody solves.
    """

    name = "paced"
    title = "PACED: Distillation (and On-Policy Self-Distillation) at the Frontier of Student Competence"
    paper = "2603.11178"
    headline = ("p_mean", "w_mean", "effective_prompts", "zero_weight")

    use: str = param(
        "distill",
        "what w(p) acts on: distill (another method's distillation term), advantages, or sampler (which prompts come)",
        source="card: paper for distill; the others are extensions, card: inferred",
        choices=("distill", "advantages", "sampler"),
    )
    a: float = param(1.0, "exponent of p; a > b favours easier prompts", source="card: paper", ge=0)
    b: float = param(1.0, "exponent of 1 - p; a < b favours harder prompts", source="card: paper", ge=0)
    normalize: str = param(
        "batch",
        "scale of the weights: mean 1 over the prompts of a rollout (batch), largest 1 (max), or w itself (none)",
        source="card: decision, as the official code does for its own weights",
        choices=("batch", "none", "max"),
    )
    column: str | None = param(
        None,
        "column of the data with each prompt's pass rate (static, read once); none: the mean verdict of its group (live)",
        source="card: decision, live in GRPO and static for pure distillation",
    )
    verifier: str | None = param(
        None, "reward function that decides right or wrong; needed if there are several", source="card: decision"
    )
    threshold: float | None = param(
        0.5, "right when the verifier gives at least this; none: its value, cut to [0, 1]", source="card: decision"
    )
    smoothing: float = param(
        0.0, "c in p = (s + c) / (K + 2c): with few rollouts p is 0 or 1 by chance", source="card: decision", ge=0
    )
    floor: float = param(
        0.0, "sampler: least weight; 0 never draws what is always or never solved", source="card: inferred", ge=0
    )
    memory: float = param(
        0.0,
        "sampler: share of the old pass rate that a visit keeps (EMA); 0 takes the new one (live)",
        source="card: decision, every rollout; EMA is an option there",
        ge=0,
        lt=1,
    )
    initial: float = param(
        0.5, "sampler: pass rate of a prompt before its first visit", source="card: inferred", ge=0, le=1
    )

    _tables: dict[str, PassRates] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.use == "sampler":
            object.__setattr__(self, "owns", ("sampler",))

    # What it declares

    @property
    def idle(self) -> frozenset[str]:
        hooks = {
            "distill": ("streams", "distill_weights"),
            "advantages": ("measure", "group_advantages"),
            "sampler": ("choose_prompts", "measure", "observe"),
        }
        every = frozenset(hook for used in hooks.values() for hook in used)
        return every if self.use != "sampler" and not self._on else every - {*hooks[self.use]}

    @property
    def _on(self) -> bool:
        """Whether the weights can differ from 1."""
        return self.a > 0 or self.b > 0

    def cost(self) -> str:
        return {
            "distill": "no extra forward; rows of weight 0 need no teacher forward",
            "advantages": "no extra forward",
            "sampler": "no extra forward; a table of some numbers per training row",
        }[self.use]

    def check(self, setup: Setup) -> list[str]:
        live = self.column is None
        parts = {
            "use: sampler": (self.use == "sampler", ("floor", "memory", "initial")),
            "use: distill or advantages (a sampler draws in proportion to w)": (self.use != "sampler", ("normalize",)),
            "live pass rates (drop column)": (live, ("memory", "initial", "smoothing", "verifier", "threshold")),
        }
        wanted = "tells right from wrong" if live else None
        named = reward_named(setup, self.verifier, "verifier", wanted)
        return [*unread(self, parts), *named, *self._wrong_company(setup)]

    def _wrong_company(self, setup: Setup) -> list[str]:
        others = list(setup.methods)
        if not others:  # no plan yet
            return []
        if self.use == "distill" and not set(others) & set(DISTILLS):
            return [
                f"use: distill weighs the distillation term of {' or '.join(DISTILLS)}, which is not named; add it, or "
                "set use: advantages or use: sampler"
            ]
        if self.use != "advantages":
            return []
        if "riskpo" in others:
            return [
                "riskpo bundles questions of different pass rates, and use: advantages weighs each by its own; name one"
            ]
        return ["real has no advantages that could be weighed; set use: sampler"] if "real" in others else []

    # Pass rates

    def measure(self, rollout: Rollout) -> dict[str, Tensor]:
        return {} if self.column is None else {"rates": self._of_rows(rollout)}

    def _of_group(self, group: Group) -> Tensor:
        """(P,) pass rates; live ones are those of answers without help."""
        if self.column is not None:
            return self._rates(group.measured["rates"])
        return self._rates(self._right(group.outcomes, group.reward_names))

    def _of_rows(self, rollout: Rollout) -> Tensor:
        """(rows,) what p is made from: the column's value, or 1 right, 0 wrong, NaN without a verdict."""
        if self.column is not None:
            return torch.tensor([rate_in(row, self.column) for row in rollout.rows], device=rollout.rewards.device)
        return self._right(rollout.rewards, rollout.reward_names)

    def _right(self, rewards: Tensor, names: Sequence[str]) -> Tensor:
        """(..., F) -> (...): 1 right, 0 wrong by the verifier, NaN without a verdict."""
        given = rewards[..., list(names).index(self.verifier) if self.verifier else 0].float()
        right = given.clamp(0, 1) if self.threshold is None else (given >= self.threshold).float()
        return torch.where(given.isnan(), torch.nan, right)

    def _rates(self, by_group: Tensor) -> Tensor:
        """(P, G) from `_of_rows` -> (P,); NaN for a prompt without verdicts."""
        return by_group[:, 0] if self.column is not None else pass_rate(by_group, self.smoothing)

    def _weights(self, p: Tensor, metrics: Metrics) -> Tensor:
        """(P,) -> (P,): normalised weights, 1 where p is NaN."""
        raw = kernel(p, self.a, self.b)
        known = ~p.isnan()
        log_weights(metrics, p[known], raw[known])
        return torch.where(known, normalise(raw, self.normalize), 1.0)

    # As a weight

    def streams(self, rollout: Rollout) -> dict[str, Tensor]:
        everyone, mine = rollout.gather(self._of_rows(rollout))
        size = rollout.run.num_generations
        weights = self._weights(self._rates(everyone.view(-1, size)), rollout.metrics)
        return {"weight": weights.repeat_interleave(size)[mine]}

    def distill_weights(self, weights: Tensor, x: LossInput) -> Tensor:
        return weights * x.streams["weight"]

    def group_advantages(self, advantages: Tensor, group: Group) -> Tensor:
        p = self._of_group(group)
        self._log_advantages(group.metrics, p, advantages)
        return advantages * self._weights(p, group.metrics).unsqueeze(1)

    def _log_advantages(self, metrics: Metrics, p: Tensor, advantages: Tensor) -> None:
        """The mean |A| of prompts in each bin of p, before the weights: the scale of their gradient in the policy loss."""
        size, bins = advantages.abs().mean(1), (p.nan_to_num() * BINS).long().clamp(max=BINS - 1)
        for i in range(BINS):
            metrics.mean(f"advantage_p_{i / BINS:.1f}", size, (bins == i) & ~p.isnan())

    # As a sampler. state: the table's rates and visits, "draws" made so far

    def choose_prompts(self, draw: Draw) -> Tensor | None:
        table, number = self._table(draw.size, draw), self.state.get("draws", 0)
        self.state["draws"] = number + 1
        drawn = table.draw(min(draw.count, table.positive), draw.seed, number)
        rest = draw.count - drawn.numel()
        if rest > 0:  # fewer prompts than asked for have a weight
            without = torch.where(table.weights == 0)[0].numpy()  # the one pass over the table, once it runs out
            others = np.random.default_rng([draw.seed, number, 1]).permutation(without)
            drawn = torch.cat([drawn, torch.from_numpy(others[:rest])])
        draw.metrics.mean("filled", rest / draw.count)
        if self.column is None:
            draw.metrics.mean("visited", table.visited / draw.size)
        draw.metrics.mean("effective_table", table.effective, float(rest < draw.count))
        return drawn

    def observe(self, group: Group) -> None:
        """Moves the drawn prompts' rates towards what was seen, also in groups that another method replaced."""
        assert group.drawn is not None  # `choose_prompts` chose them
        p = self._of_group(group)
        known = ~p.isnan()
        log_weights(group.metrics, p[known], self._draw_weight(p[known]))
        if self.column is None:
            if group.discarded_drawn is not None and group.discarded_rewards is not None:
                right = self._right(group.discarded_rewards, group.reward_names)
                self._visit(group.discarded_drawn, self._rates(right))
            self._visit(group.drawn, p)

    def _visit(self, rows: Tensor, p: Tensor) -> None:
        known = ~p.isnan()
        if known.any():
            self._table(len(self.state["rates"])).update(rows.to(p.device)[known], p[known])

    def _draw_weight(self, p: Tensor) -> Tensor:
        return kernel(p, self.a, self.b).clamp(min=self.floor)

    def _table(self, size: int, draw: Draw | None = None) -> PassRates:
        return table_in(self.state, self._tables, functools.partial(self._new_table, size, draw))

    def _new_table(self, size: int, draw: Draw | None) -> PassRates:
        def weight(rates: Floats) -> Floats:
            return self._draw_weight(torch.from_numpy(rates)).numpy()

        table = PassRates(size, self.memory, self.initial, weight)
        if self.column is not None and draw is not None and "rates" not in self.state:
            rates = [rate_in(draw.row(i), self.column) for i in range(size)]
            table.load({"rates": torch.tensor(rates).double(), "visits": torch.zeros(size, dtype=torch.int64)})
        return table

    def summary(self, decode_one: Callable[[int], str]) -> list[str]:
        if "rates" not in self.state:
            return []
        rates, visits = self.state["rates"], self.state["visits"]
        text = f"prompts drawn for {self.state['draws']} rollouts out of {len(rates)}"
        if self.column is not None:
            return [text]
        seen = rates[visits > 0]
        ends = f"{int((seen < 0.1).sum())} with a pass rate below 0.1, {int((seen > 0.9).sum())} above 0.9"
        return [f"{text}; {len(seen)} different ones came, {ends}"]


def rate_in(row: Mapping[str, Any], column: str) -> float:
    """A row's pass rate. ValueError if the column is missing or holds something else."""
    value = row.get(column)
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(
            f"paced: column '{column}' must hold a pass rate from 0 to 1, found {value!r} in the row "
            f"{str(dict(row))[:200]}; trl_ext.rollouts.scoring.with_pass_rates makes such a column"
        )
    return float(value)
