"""CAPO: tokens whose predicted optimizer step would move objective or policy too far are left out of the loss.

Paper: "CAPO: Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM Reasoning",
arXiv 2510.00819. Card: capo. A second-order model of one token's update, restricted to the LM head. For a token with
final state h (H,), its K largest logits S, their softmax pi (K,), the indicator e of the sampled token in S (zeros if
it is not there), advantage A (A_t where another method makes token advantages) and learning rate lr:

    v = e - pi        g = A v h^T  (K, H)        u = G h        s = v . u        F u = pi u - pi (pi . u)
    m_H = lr A s + lr^2/2 A (s^2 - u . F u)      the objective's change: second-order Taylor of A pi_new/pi_old - A
    m_F = lr^2/2 s^2                             the policy's change: half the squared first-order log-prob change
    keep = m_F < tau_F  and  |m_H| < tau_H       (or 0 <= m_H < tau_H); a tau of 0 switches its test off

G is the direction that the optimizer makes of g: g itself ("sgd"), or Adam's with moments m, q of each LM-head row:

    m' = b1 m + (1-b1) g    q' = b2 q + (1-b2) g^2    G = m'/(1-b1^(n+1)) / (sqrt(q'/(1-b2^(n+1))) + eps)

looked at without changing m, q (zero for a row never seen; G = g before the first update). Once per loss call the
moments of every row in S of a kept token move by the mean of that row's g over the kept tokens that have it, over all
processes; other rows stay. Rejected tokens leave the loss and its denominator. All of it is without gradient.

Decisions (card: provenance). h is the state that predicts the token: the released code's is one later. At a sampling
temperature or a logit scale, h is multiplied by scale / temperature, which makes W h the sampled policy's logits. A
soft cap's derivative and a head's bias are left out. A call that keeps no token at all leaves moments and n as they
are. With LoRA the head is usually frozen and the model is a proxy: set the thresholds from the logged quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_ext import ops
from trl_ext.forward import LOGITS_BUDGET, Head, positions_at_once
from trl_ext.method import HIDDEN, Group, LossInput, Method, Setup, param

PRESETS = {"capo": (1e-4, 1e-2), "dr_capo": (1e-3, 5e-4), "rein_capo": (1e-5, 1e-1)}
"""Variant -> (tau_F, tau_H). Card: README and recipe names of the official code."""
Gather = Callable[[Tensor], tuple[Tensor, slice]]
WEIGHTS = "capo predicts each token's step from its advantage, before token weights are known; name only one of them"


# One token's model


def top_k_view(
    head: Head, hidden: Tensor, sampled: Tensor, k: int, budget: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`hidden` (N, H), `sampled` (N,) -> S (N, K) token ids, pi (N, K), v = e - pi (N, K); K = min(k, V).

    Logits exist for budget / V positions at a time (`positions_at_once`).
    """
    largest = min(k, head.weight.size(0))
    parts = [head.logits(block).topk(largest, dim=-1) for block in hidden.split(positions_at_once(head, budget))]
    ids = torch.cat([part.indices for part in parts])
    probs = torch.cat([part.values for part in parts]).softmax(-1)
    return ids, probs, (ids == sampled.unsqueeze(1)).to(probs.dtype) - probs


def adam_direction(g: Tensor, m: Tensor, q: Tensor, updates: int, betas: tuple[float, float], eps: float) -> Tensor:
    """G of Adam for gradients g with moments m, q, all of one shape, after `updates` earlier updates. Changes nothing."""
    first, second = corrections(updates, betas)
    m, q = torch.zeros_like(g).add_(m, alpha=first[0]), torch.zeros_like(g).add_(q, alpha=second[0])
    return _add_gradient(g, m, q, first[1], second[1], eps)


def corrections(updates: int, betas: tuple[float, float]) -> tuple[tuple[float, float], ...]:
    """For either moment, what the old one and the new gradient (squared) are multiplied by: b and 1 - b, both over
    1 - b^(n+1)."""
    return tuple((b / (1 - b ** (updates + 1)), (1 - b) / (1 - b ** (updates + 1))) for b in betas)


def _add_gradient(g: Tensor, m: Tensor, q: Tensor, first: float, second: float, eps: float) -> Tensor:
    """G, from gradients and moments that are decayed and corrected already; overwrites m and q."""
    return m.add_(g, alpha=first).div_(q.addcmul_(g, g, value=second).sqrt_().add_(eps))


def predicted_shifts(v: Tensor, probs: Tensor, u: Tensor, advantages: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """v, pi, u (N, K), A (N,) -> m_H (N,), m_F (N,). Uses <g, G> = A v . u = A s."""
    s = (v * u).sum(-1)
    fu = probs * u - probs * (probs * u).sum(-1, keepdim=True)
    m_h = lr * advantages * s + 0.5 * lr**2 * advantages * (s.square() - (u * fu).sum(-1))
    return m_h, 0.5 * lr**2 * s.square()


def rejected(m_h: Tensor, m_f: Tensor, tau_h: float, tau_f: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Which of N tokens fail the test on m_H and the test on m_F: two (N,) bool. A tau of 0 fails none."""
    none = torch.zeros_like(m_f, dtype=torch.bool)
    by_h = m_h.abs() >= tau_h if symmetric else (m_h < 0) | (m_h >= tau_h)
    return by_h if tau_h > 0 else none, m_f >= tau_f if tau_f > 0 else none


# Adam's moments of LM-head rows


@dataclass(frozen=True)
class Moments:
    """Moments of the rows seen so far: `ids` (R,) sorted, `m`, `q` (R, H) float32, and the number of updates."""

    ids: Tensor
    m: Tensor
    q: Tensor
    updates: int

    def of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """`ids` of any shape -> m and q (*ids.shape, H), zero for rows never seen."""
        place = torch.searchsorted(self.ids, ids).clamp(max=self.ids.numel() - 1)
        unseen = (self.ids[place] != ids).unsqueeze(-1)
        return self.m[place].masked_fill_(unseen, 0), self.q[place].masked_fill_(unseen, 0)

    def grown(self, rows: Tensor) -> Moments:
        """The same with zeros for those of `rows` (U,) that were not seen."""
        ids = torch.cat([self.ids, rows]).unique()
        if ids.numel() == self.ids.numel():
            return self
        place = torch.searchsorted(ids, self.ids)
        m, q = (old.new_zeros(ids.numel(), old.size(1)).index_copy_(0, place, old) for old in (self.m, self.q))
        return Moments(ids, m, q, self.updates)

    def updated(self, rows: Tensor, means: Tensor, betas: tuple[float, float]) -> Moments:
        """One update of `rows` (U,) with mean gradients (U, H); writes into this one's tensors where no row is new."""
        grown = self.grown(rows)
        place = torch.searchsorted(grown.ids, rows)
        m, q = grown.m[place], grown.q[place]
        grown.m.index_copy_(0, place, m.lerp_(means, 1 - betas[0]))
        grown.q.index_copy_(0, place, q.mul_(betas[1]).addcmul_(means, means, value=1 - betas[1]))
        return Moments(grown.ids, grown.m, grown.q, self.updates + 1)

    @classmethod
    def empty(cls, hidden: Tensor) -> Moments:
        """No rows yet, for states (N, H) of this width and device."""
        rows = hidden.new_zeros(0, hidden.size(-1))
        return cls(torch.zeros(0, dtype=torch.long, device=hidden.device), rows, rows, 0)


def responses(
    ids: Tensor,
    weights: Tensor,
    hidden: Tensor,
    moments: Moments,
    betas: tuple[float, float],
    eps: float,
    budget: int | None = None,
) -> Tensor:
    """u = G h (N, K) under Adam. `ids` S and `weights` A v (N, K), `hidden` h (N, H): g = weights h^T.

    The (K, H) blocks exist for budget / (K H) tokens at a time, by default as many as suit the device.
    """
    if moments.updates == 0:
        return weights * hidden.square().sum(-1, keepdim=True)
    if budget is None:
        # A CPU is faster on blocks that stay in its cache (measured); a GPU wants few kernels.
        budget = 2**19 if hidden.device.type == "cpu" else LOGITS_BUDGET
    size = max(1, budget // (ids.size(1) * hidden.size(1)))
    rows, place = ids.unique(return_inverse=True)  # a row is decayed once, not for every token that has it
    m, q = moments.of(rows)
    first, second = corrections(moments.updates, betas)
    m, q = m.mul_(first[0]), q.mul_(second[0])
    found = []
    for at, w, h in zip(place.split(size), weights.split(size), hidden.split(size), strict=True):
        h, shape = h.unsqueeze(1), (*at.shape, h.size(1))
        own_m, own_q = (moment.index_select(0, at.flatten()).view(shape) for moment in (m, q))
        direction = _add_gradient(w.unsqueeze(-1) * h, own_m, own_q, first[1], second[1], eps)
        found.append(direction.mul_(h).sum(-1))  # not a matrix product: autocast would round it
    return torch.cat(found)


def row_means(ids: Tensor, weights: Tensor, hidden: Tensor, gather: Gather) -> tuple[Tensor, Tensor]:
    """Mean gradient of every LM-head row over the tokens that have it among their top K, over all processes.

    `ids`, `weights` (N, K), `hidden` (N, H) of this process -> rows (U,), means (U, H).
    """
    rows, place, counts = ids.unique(return_inverse=True, return_counts=True)
    tokens = torch.arange(ids.size(0), device=ids.device).unsqueeze(1).expand_as(ids)
    spread = torch.sparse_coo_tensor(
        torch.stack([place.flatten(), tokens.flatten()]),
        weights.flatten(),
        (rows.numel(), ids.size(0)),
        check_invariants=False,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        sums = torch.sparse.mm(spread, hidden)
    sums = gather(sums.flatten())[0].view(-1, hidden.size(1))
    counts = gather(counts)[0].to(sums.dtype)
    rows, place = gather(rows)[0].unique(return_inverse=True)
    total = sums.new_zeros(rows.numel(), sums.size(1)).index_add_(0, place, sums)
    return rows, total / counts.new_zeros(rows.numel()).index_add_(0, place, counts).unsqueeze(1)


@dataclass(frozen=True)
class Capo(Method):
    """Leaves out tokens whose predicted update leaves the trust region.

    Both thresholds 0: TRL bit for bit, nothing is computed. Both infinite: TRL bit for bit, but everything is logged,
    which is how to set them (card: the early p95 to p99 of m_F) and the control for a run with them.
    """

    name = "capo"
    title = "CAPO: Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM Reasoning"
    paper = "2510.00819"
    headline = ("rejected", "m_F_p99", "m_H_p99")
    conflicts: ClassVar = dict.fromkeys(("dgpo", "pgpo", "d3s"), WEIGHTS)

    preset: str = param(
        "capo",
        "thresholds and loss of a variant: capo (on GRPO), dr_capo (Dr.GRPO), rein_capo (REINFORCE: the advantage is "
        "the reward itself)",
        source="card: official README and recipes",
        choices=tuple(PRESETS),
    )
    tau_fisher: float | None = param(
        None,
        "tau_F, bound on m_F; none takes the preset's (1e-4, 1e-3, 1e-5), 0 switches the test off",
        source="card: official code, fisher_token_mask_tau",
        ge=0,
    )
    tau_hessian: float | None = param(
        None,
        "tau_H, bound on m_H; none takes the preset's (1e-2, 5e-4, 1e-1), 0 switches the test off",
        source="card: official code, hessian_token_mask_tau",
        ge=0,
    )
    symmetric: bool = param(
        True, "|m_H| < tau_H; false keeps 0 <= m_H < tau_H only", source="card: true in all released runs"
    )
    optim_model: str = param(
        "adam",
        "model of the optimizer: adam with moments per LM-head row, or sgd",
        source="card: official code, optim_model_type",
        choices=("adam", "sgd"),
    )
    top_k: int = param(
        50, "K, logits in a token's model, at most V", source="card: decision, 50 where the sampler has no top-k", ge=1
    )

    def __post_init__(self) -> None:
        if self.preset == "rein_capo":  # its advantage is the reward itself
            object.__setattr__(self, "owns", ("baseline",))

    # What it declares

    @property
    def taus(self) -> tuple[float, float]:
        """(tau_F, tau_H): the preset's where none is set."""
        fisher, hessian = PRESETS[self.preset]
        return (
            fisher if self.tau_fisher is None else self.tau_fisher,
            hessian if self.tau_hessian is None else self.tau_hessian,
        )

    @property
    def _on(self) -> bool:
        return any(tau > 0 for tau in self.taus)

    @property
    def _can_reject(self) -> bool:
        return any(0 < tau < math.inf for tau in self.taus)

    def needs(self) -> frozenset[str]:
        return frozenset({HIDDEN}) if self._on else frozenset()

    def cost(self) -> str:
        if not self._on:
            return "nothing: both thresholds are 0"
        moments = ", 8 x H bytes per LM-head row seen" if self.optim_model == "adam" else ""
        return f"top {self.top_k} logits of each token and their gradients, in blocks{moments}; no extra forward"

    def check(self, setup: Setup) -> list[str]:
        problems: list[str] = []
        if not self._on and self.preset != "rein_capo":
            return problems
        loss_type = getattr(setup.args, "loss_type", "grpo")
        if self._can_reject and loss_type in ops.TOKEN_MEAN:
            problems.append(
                f"loss_type {loss_type} divides by a token count that is fixed at rollout time, which rejected tokens "
                "cannot leave; set loss_type: grpo (or dr_grpo with preset: dr_capo)"
            )
        optim = str(getattr(getattr(setup.args, "optim", "adamw"), "value", getattr(setup.args, "optim", "adamw")))
        if self.optim_model == "adam" and self._on and "adam" not in optim:
            problems.append(f"optim_model adam does not describe optim: {optim}; set optim_model: sgd, or an AdamW")
        return problems + self._variant_problems(setup.args, loss_type)

    @property
    def idle(self) -> frozenset[str]:
        return frozenset() if self.preset == "rein_capo" else frozenset({"group_advantages"})

    def _variant_problems(self, args: Any, loss_type: str) -> list[str]:
        if args is None or self.preset == "capo":
            return []
        problems = []
        if args.scale_rewards not in ("none", False):
            problems.append(f"preset {self.preset} does not divide by the group's deviation; set scale_rewards: none")
        if self.preset == "dr_capo" and loss_type != "dr_grpo":
            problems.append("preset dr_capo divides by the completion length limit; set loss_type: dr_grpo")
        if self.preset == "rein_capo" and args.reward_weights is not None:
            problems.append("preset rein_capo sums the rewards as they are; leave reward_weights unset")
        if self.optim_model == "sgd":
            problems.append(f"the sgd model does not work for {self.preset} (card); set optim_model: adam")
        return problems

    # Rollout

    def group_advantages(self, advantages: Tensor, group: Group) -> Tensor:
        """REINFORCE without a baseline for `rein_capo`: A is the sum of the rewards."""
        return group.rewards.nansum(-1)

    # Loss

    @torch.no_grad()
    def loss_mask(self, mask: Tensor, x: LossInput) -> Tensor:
        if not self._on:
            return mask
        m_h, m_f = self._shifts(mask.bool(), x)
        by_h, by_f = rejected(m_h, m_f, self.taus[1], self.taus[0], self.symmetric)
        keep = ~(by_h | by_f)
        x.scratch["keep"] = keep
        self._log(x, m_h, m_f, by_h, by_f)
        return torch.zeros_like(mask).masked_scatter(mask.bool(), keep.to(mask.dtype))

    def _shifts(self, valid: Tensor, x: LossInput) -> tuple[Tensor, Tensor]:
        """m_H and m_F (N,) of the valid tokens; what the moments need later is left in the scratch."""
        assert x.policy is not None  # HIDDEN is declared
        head, hidden, advantages = x.policy.head, x.policy.at(valid), x.advantages.float()
        advantages = (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand_as(valid)[valid]
        ids, probs, v = top_k_view(head, hidden, x.completion_ids[valid], self.top_k)
        hidden, weights = hidden.float() * (head.scale / head.temperature), advantages.unsqueeze(1) * v
        x.scratch.update(ids=ids, weights=weights, hidden=hidden)
        moments = self._moments(hidden)
        u = responses(ids, weights, hidden, moments, *self._adam(x))
        return predicted_shifts(v, probs, u, advantages, x.optimizer.learning_rate)

    def _moments(self, hidden: Tensor) -> Moments:
        if "ids" not in self.state:
            return Moments.empty(hidden)
        ids, m, q = (self.state[key].to(hidden.device) for key in ("ids", "m", "q"))
        return Moments(ids, m, q, int(self.state["updates"]))

    def _adam(self, x: LossInput) -> tuple[tuple[float, float], float]:
        """betas and eps of the run's optimizer; the sgd model never reads them."""
        if self.optim_model == "sgd":
            return (0.0, 0.0), 0.0
        if x.optimizer.betas is None or x.optimizer.eps is None:
            raise ValueError("capo: optim_model adam, but the optimizer has no betas and eps; set optim_model: sgd")
        return x.optimizer.betas, x.optimizer.eps

    def _log(self, x: LossInput, m_h: Tensor, m_f: Tensor, by_h: Tensor, by_f: Tensor) -> None:
        """Rejected fractions of tokens; statistics of m_F and |m_H| over all tokens of a loss call (all processes) and
        over its kept tokens, averaged over the calls between two logs."""
        x.metrics.mean("rejected", (by_h | by_f).float())
        x.metrics.mean("rejected_by_m_F", by_f.float())
        x.metrics.mean("rejected_by_m_H", by_h.float())
        for name, values in (("m_F", m_f), ("m_H", m_h.abs())):
            everyone, kept = x.gather(values)[0], x.gather(values[~(by_h | by_f)])[0]
            for label, chosen in ((name, everyone), (f"{name}_kept", kept)):
                if chosen.numel():
                    p90, p99 = torch.quantile(chosen, chosen.new_tensor([0.9, 0.99]))
                    shown = {"mean": chosen.mean(), "p90": p90, "p99": p99, "max": chosen.max()}
                    for statistic, value in shown.items():
                        x.metrics.mean(f"{label}_{statistic}", value)

    @torch.no_grad()
    def observe_loss(self, x: LossInput) -> None:
        """One update of the moments from the kept tokens of all processes."""
        if not self._on or self.optim_model == "sgd":
            return
        keep, hidden = x.scratch["keep"], x.scratch["hidden"]
        rows, means = row_means(x.scratch["ids"][keep], x.scratch["weights"][keep], hidden[keep], x.gather)
        if rows.numel():
            moments = self._moments(hidden).updated(rows, means, self._adam(x)[0])
            self.state.update(ids=moments.ids, m=moments.m, q=moments.q, updates=torch.tensor(moments.updates))

    def summary(self, decode_one: Callable[[int], str]) -> list[str]:
        if "ids" not in self.state:
            return []
        size = sum(self.state[key].numel() * 4 for key in ("m", "q"))
        return [f"moments of {self.state['ids'].numel()} LM-head rows, {size / 2**20:.1f} MiB"]
