"""EPO: an entropy bonus for every turn, and a penalty on tokens whose entropy leaves a corridor around its history.

Paper: "EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning", arXiv 2509.22576. Card: epo.
For B rows, T_j turns of row j, |tau_jt| policy tokens of turn t, H = full-vocabulary entropy with gradient:

    L_H      = (1/B) sum_j (1/T_j) sum_t (1/|tau_jt|) sum_i H[j,t,i]
    Hw_k     = (1/k) sum_{m<k} Hbar_m                    Hbar_m: token mean of RL step m over all processes; detached
    P        = relu(kl Hw_k - H) + relu(H - kr Hw_k);    L_smooth = the same averages of alpha P, 0 at k = 0
    beta_k   = 1 + exp(-gamma k / k_mid),  k_mid = floor(K / 2),  K RL steps in all
    added    = -lambda (L_H - beta_k L_smooth)

A turn is a maximal run of policy tokens between tool outputs; without tools a row is one turn. k counts RL steps: the
rollouts that one set of weights makes, one generation batch or, where an optimizer step takes several, all of them.
H is that of the forward that runs anyway, at the sampling temperature, and counts all policy tokens: masks of other
methods do not touch it (card: the corridor concerns the policy, not the data). With the paper's numbers alpha beta is
at most 0.2 and lambda 0.001, so the hinge's effect is small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_ext.method import Group, LossInput, Method, RunShape, Setup, param

CODE_EPOCHS = 75
"""Half of the 150 epochs that the released schedule is written for."""
SPREAD_OVER = 10
"""RL steps over which the metric `Hbar_std` is taken."""


def turn_ids(mask: Tensor) -> Tensor:
    """(B, T) policy tokens -> (B, T) long: the turn of each of them, from 0; -1 elsewhere. A gap begins a new turn."""
    valid = mask.bool()
    before = torch.nn.functional.pad(valid, (1, 0))[:, :-1]
    return torch.where(valid, (valid & ~before).cumsum(1) - 1, -1)


def turn_weights(turns: Tensor) -> Tensor:
    """(B, T) turns -> (B, T): 1 / (B T_j |tau_jt|) on the tokens of turn t of row j, 0 where the turn is -1."""
    valid, index = turns >= 0, turns.clamp(min=0)
    sizes = torch.zeros(turns.shape, device=turns.device).scatter_add_(1, index, valid.float())
    count = (sizes > 0).sum(1, keepdim=True).clamp(min=1)
    return valid / (sizes.gather(1, index).clamp(min=1) * count * turns.size(0))


def corridor_penalty(entropy: Tensor, low: Tensor | float, high: Tensor | float, form: str = "hinge") -> Tensor:
    """P of each token, any shape. hinge: relu(low - H) + relu(H - high), with gradient. step (released code): 1 where
    H <= low or H >= high, else 0, which has no gradient."""
    if form == "step":
        return ((entropy <= low) | (entropy >= high)).to(entropy.dtype)
    return (low - entropy).relu() + (entropy - high).relu()


def penalty_factor(k: int, total: int, gamma: float, schedule: str = "paper") -> float:
    """What multiplies L_smooth at RL step k of `total`. paper: beta_k = 1 + exp(-gamma k / k_mid), k_mid = floor(K/2).

    code: the released w(e) for 150 epochs, e = k: 1 - 0.2 (1 - exp(-2e/75)) up to 75, 0.8 exp(-3(e-75)/75) after it;
    none: 1.
    """
    if schedule == "none":
        return 1.0
    if schedule == "code":
        late = k - CODE_EPOCHS
        return 0.8 * math.exp(-3 * late / CODE_EPOCHS) if late > 0 else 1 - 0.2 * (1 - math.exp(-2 * k / CODE_EPOCHS))
    return 1 + math.exp(-gamma * k / max(1, total // 2))


def rl_steps(run: RunShape) -> int:
    """K: how many sets of weights make rollouts in this run."""
    return max(1, math.ceil(run.max_steps / max(1.0, run.steps_per_rollout)))


def sums_by_turn(entropy: Tensor, turns: Tensor) -> Tensor:
    """(B, T) -> (2, N): sum of entropies and number of tokens of each turn; N turns at most."""
    valid = turns >= 0
    size = int(turns.max()) + 1 if turns.numel() else 0
    pairs = torch.stack([entropy[valid], torch.ones_like(entropy[valid])])
    return torch.zeros(2, max(1, size), device=entropy.device).index_add_(1, turns[valid], pairs.float())


@dataclass(frozen=True)
class Epo(Method):
    """Entropy bonus minus corridor penalty, added to whatever loss runs.

    coefficient = 0 is TRL bit for bit; alpha = 0 is the plain bonus ("EPO-base"). With mean "token" both terms average
    over the tokens of a micro-batch, as the released code does, and then depend on how micro-batches are cut.
    """

    name = "epo"
    title = "EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning"
    paper = "2509.22576"
    headline = ("Hbar", "Hw", "L_H", "L_smooth")

    coefficient: float = param(0.001, "lambda, weight of both terms", source="card: paper", ge=0)
    lower: float = param(
        0.0, "kl, lower edge as a multiple of Hw; 0 switches it off", source="card: paper (released code 0.8)", ge=0
    )
    upper: float = param(2.0, "kr, upper edge as a multiple of Hw", source="card: paper (released code 1.2)", ge=0)
    alpha: float = param(
        0.1, "weight of the penalty; 0 is the plain bonus", source="card: paper, ALFWorld; ScienceWorld 0.05", ge=0
    )
    gamma: float = param(3.0, "decay rate of beta_k", source="card: paper", ge=0)
    penalty: str = param(
        "hinge",
        "hinge (paper v2), or step (released code: constant outside the corridor, no gradient)",
        source="card: decision",
        choices=("hinge", "step"),
    )
    schedule: str = param(
        "paper",
        "factor of the penalty: beta_k, the released code's w(e) for 150 epochs, or none (1)",
        source="card: paper; code",
        choices=("paper", "code", "none"),
    )
    mean: str = param(
        "turn",
        "turn: over tokens, then turns, then rows (paper); token: over the micro-batch's tokens (released code)",
        source="card: decision",
        choices=("turn", "token"),
    )
    history: str = param(
        "step",
        "Hw from all tokens of earlier steps (paper), or for each turn from that turn's tokens (released code)",
        source="card: paper; turn is the released code's",
        choices=("step", "turn"),
    )
    window: int | None = param(
        None, "earlier steps in Hw; none takes all (the authors advise against a window)", source="card: paper", ge=1
    )
    from_turn: int = param(
        0,
        "penalise only micro-batches that hold a turn of this index or later; the released code has 25",
        source="card: paper has no gate",
        ge=0,
    )

    # What it declares

    def cost(self) -> str:
        return "no extra forward: the entropies are there; their gradient goes back through the head"

    def check(self, setup: Setup) -> list[str]:
        problems = []
        own = getattr(setup.args, "entropy_coef", 0.0) or getattr(setup.args, "use_adaptive_entropy", False)
        if own and self.coefficient > 0:
            problems.append("TRL's own entropy bonus is on too; leave entropy_coef at 0 and use_adaptive_entropy off")
        if self.alpha > 0 and self.lower > self.upper:
            problems.append(f"the corridor is empty: lower {self.lower} is above upper {self.upper}; swap them")
        return problems

    # History. state: "at" optimizer step at which the open RL step began; "open" (2, N) its sums by turn (one column if
    # turns do not matter); "means" Hbar of the closed steps, and "by_turn" their (N,) means for a history by turn.

    def observe(self, group: Group) -> None:
        """A rollout under new weights closes the RL step before it."""
        if self.state.get("at") not in (None, group.step) and "open" in self.state:
            closed = self.state.pop("open").cpu()
            means = self.state.setdefault("means", [])
            means.append(float(closed[0].sum() / closed[1].sum().clamp(min=1)))
            if self.history == "turn":
                self.state.setdefault("by_turn", []).append(closed[0] / closed[1])  # 0 / 0: no such turn in this step
            group.metrics.mean("Hbar_std", torch.tensor(means[-SPREAD_OVER:]).std(correction=0))
        self.state["at"] = group.step

    def observe_loss(self, x: LossInput) -> None:
        """Adds this micro-batch's entropies, of all processes, to the open RL step; the first pass only."""
        if self.coefficient == 0 or not x.first_pass:
            return
        entropy = x.entropy.detach()
        x.metrics.mean("Hbar", entropy, x.mask)
        if self.history == "turn":
            total = _over_processes(sums_by_turn(entropy, turn_ids(x.mask)), x)
        else:
            total = x.gather(torch.stack([(entropy * x.mask).sum(), x.mask.sum()]))[0].view(-1, 2).sum(0).view(2, 1)
        self.state["open"] = _add(self.state["open"].to(total), total) if "open" in self.state else total

    def _centre(self, turns: Tensor) -> Tensor | None:
        """Hw_k for each token (B, T), or one for all (); NaN for a turn that never occurred; None at k = 0."""
        means, by_turn = (self.state.get(key, [])[-(self.window or 0) :] for key in ("means", "by_turn"))
        if not means:
            return None
        if self.history == "step":
            return torch.tensor(sum(means) / len(means), device=turns.device)
        table = torch.full((len(by_turn), max(turns.size(1), *map(len, by_turn))), math.nan)
        for row, found in zip(table, by_turn, strict=True):
            row[: len(found)] = found
        return table.nanmean(0).to(turns.device)[turns.clamp(min=0)]

    # Loss

    def aux_loss(self, x: LossInput) -> Tensor | None:
        if self.coefficient == 0:
            return None
        turns = turn_ids(x.mask)
        weights = turn_weights(turns) * x.row_scale if self.mean == "turn" else x.mask / x.mask.sum().clamp(min=1)
        bonus = (weights * x.entropy).sum()
        x.metrics.mean("L_H", bonus)
        smooth = self._smooth(x, turns, weights)
        return -self.coefficient * (bonus if smooth is None else bonus - smooth)

    def _smooth(self, x: LossInput, turns: Tensor, weights: Tensor) -> Tensor | None:
        """beta_k L_smooth; None where there is no corridor yet."""
        centre = self._centre(turns) if self.alpha > 0 else None
        if centre is None:
            return None
        k = len(self.state["means"])
        beta = penalty_factor(k, rl_steps(x.run), self.gamma, self.schedule)
        low, high = self.lower * centre, self.upper * centre
        penalty = corridor_penalty(x.entropy, low, high, self.penalty)
        penalty = torch.where(
            centre.isnan() | (turns < 0), 0.0, penalty
        )  # what is not penalised has no gradient either
        gate = (turns.max() >= self.from_turn).to(penalty.dtype)
        smooth = self.alpha * gate * (weights * penalty).sum()
        self._log(x, centre, low, high, beta, smooth)
        return beta * smooth

    def _log(self, x: LossInput, centre: Tensor, low: Any, high: Any, beta: float, smooth: Tensor) -> None:
        entropy, known = x.entropy.detach(), x.mask * ~centre.isnan()
        x.metrics.mean("L_smooth", smooth)
        x.metrics.mean("beta", beta)
        for name, value in (("Hw", centre), ("low_edge", low), ("high_edge", high)):
            x.metrics.mean(name, value.nan_to_num().expand_as(entropy), known)
        x.metrics.mean("below", (entropy < low).float(), known)
        x.metrics.mean("above", (entropy > high).float(), known)


def _over_processes(sums: Tensor, x: LossInput) -> Tensor:
    """(2, N) sums by turn of this process -> of all; N may differ between processes."""
    turn, _ = x.gather(torch.arange(sums.size(1), device=sums.device))
    columns = torch.stack([x.gather(row)[0] for row in sums])
    return torch.zeros(2, int(turn.max()) + 1, device=sums.device).index_add_(1, turn, columns)


def _add(first: Tensor, second: Tensor) -> Tensor:
    """Sums of two (2, N) with different N."""
    width = max(first.size(1), second.size(1))
    first, second = (torch.nn.functional.pad(x, (0, width - x.size(1))) for x in (first, second))
    return first + second
