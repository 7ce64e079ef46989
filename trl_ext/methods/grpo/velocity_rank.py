"""VERL (velocity_rank): a bounded bonus for responses whose hidden states span more, or keep spanning more, than usual.

Paper: "Beyond the Exploration-Exploitation Trade-off: A Hidden State Approach for LLM Reasoning in RLVR",
arXiv 2509.23808. Card: velocity_rank. For the last hidden states Z (L, D) of one response, with sigma the singular
values of Z minus its column means:

    ER(Z) = exp(-sum p log(p + 1e-8))    p = sigma / (sum sigma + 1e-8)        effective rank: exploration
    m_j = ER(Z[0..js])                   j = 1..n, js < L, of the last 512 tokens at most
    delta_j = m_j - mean(m_1..m_{j-1})   j >= 2
    ERV = mean_j delta_j (0 if n < 2)    ERA = mean_{j>=3} (delta_j - delta_{j-1}) (0 if n < 3)

With running averages mu of the batch means of each q in {ER, ERV, ERA}, up to the previous rollout:

    d_q  = clip((q - mu_q) / (|mu_q| + 1e-8), -clamp, clamp)        g = sigmoid(gain d_ERA)
    Phi  = w [g tanh(d_ER) + (1 - g) tanh(d_ERV)]
    A'   = A + min(max(Phi, 0), |A| / kappa)

All of it is without gradient. kappa > 1, so no sign flips and an advantage of 0 stays 0.

Decisions (card: provenance). The bonus goes to the whole response; the released code's, at its last token only, is
`bonus_on: last_token`. The averages are bias-corrected and hold everything up to the previous rollout; `averages:
literal` is the code's order: they start at 0, are not corrected, and lag one rollout more. Z are the states that
predict the response's tokens, from the forward of the loss, as generation has them. The averages move once per rollout,
by the mean over all its loss calls and processes (with `num_iterations` > 1 every pass counts). Rows without a token to train on (masked truncation) do not enter the averages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ext.checks import reward_named
from trl_ext.method import HIDDEN, Group, LossInput, Method, Rollout, Setup, param

EPS = 1e-8
ER, ERV, ERA, SCORE = range(4)
"""Columns of what is averaged over a rollout."""


def centred_rank(gram: Tensor) -> Tensor:
    """Effective rank from a Gram matrix: (..., n, n) of n rows (any common shift) -> (...), float64.

    The singular values of the centred rows are the roots of the eigenvalues of (I - 1/n) gram (I - 1/n). Those below
    n * 2^-52 of the largest are round-off and count 0. Equal rows give 1 by the formula; n < 2 gives 0.
    """
    n = gram.size(-1)
    if n < 2:
        return gram.new_zeros(gram.shape[:-2])
    centred = gram - gram.mean(-1, keepdim=True)
    centred = centred - centred.mean(-2, keepdim=True)
    values = torch.linalg.eigvalsh(centred).clamp(min=0)
    values = values * (values > n * torch.finfo(gram.dtype).eps * values.amax(-1, keepdim=True))
    sigma = values.sqrt()
    p = sigma / (sigma.sum(-1, keepdim=True) + EPS)
    return torch.exp(-(p * torch.log(p + EPS)).sum(-1))


def gram_of(states: Tensor) -> Tensor:
    """(n, D) -> (n, n) float64 products of the rows minus their mean.

    ER ignores a common shift; taking it off first keeps the precision, since hidden states share a large mean.
    """
    with torch.autocast(states.device.type, enabled=False):
        rows = states.double()
        rows = rows - rows.mean(0)
        return rows @ rows.T


def velocity(ranks: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Prefix ranks m (B, n), of which row i has `counts[i]` -> ERV, ERA (B,), 0 where there are too few prefixes."""
    if ranks.size(1) < 2:
        return ranks.new_zeros(ranks.size(0)), ranks.new_zeros(ranks.size(0))
    number = torch.arange(1, ranks.size(1) + 1, device=ranks.device)
    delta = ranks[:, 1:] - (ranks.cumsum(1) / number)[:, :-1]  # j = 2..n
    there = number[1:] <= counts.unsqueeze(1)
    erv = (delta * there).sum(1) / there.sum(1).clamp(min=1)
    change, both = delta[:, 1:] - delta[:, :-1], there[:, 1:]
    return erv, (change * both).sum(1) / both.sum(1).clamp(min=1)


@torch.no_grad()
def response_metrics(hidden: Tensor, mask: Tensor, stride: int, max_prefix_tokens: int) -> Tensor:
    """Hidden states (B, T, D) and mask (B, T) -> (B, 3) float64: ER, ERV, ERA of each row's masked tokens.

    One Gram matrix per response; prefixes are its leading blocks, solved for all rows of the same prefix at once.
    """
    grams = [gram_of(states[valid]) for states, valid in zip(hidden.detach(), mask.bool(), strict=True)]
    er = torch.stack([centred_rank(gram) for gram in grams])
    last = [gram[-max_prefix_tokens:, -max_prefix_tokens:] for gram in grams]
    counts = [max(0, gram.size(0) - 1) // stride for gram in last]
    ranks = er.new_zeros(len(grams), max(counts))
    for j in range(1, ranks.size(1) + 1):
        rows = [i for i, n in enumerate(counts) if j <= n]
        ranks[rows, j - 1] = centred_rank(torch.stack([last[i][: j * stride + 1, : j * stride + 1] for i in rows]))
    return torch.stack([er, *velocity(ranks, torch.tensor(counts, device=er.device))], dim=1)


def signal(metrics: Tensor, averages: Tensor, gain: float, clamp: float) -> tuple[Tensor, Tensor]:
    """(B, 3) and mu (3,) -> Phi / w (B,) in [-1, 1], and g (B,), the weight of exploration."""
    d = ((metrics - averages) / (averages.abs() + EPS)).clamp(-clamp, clamp)
    g = torch.sigmoid(gain * d[:, ERA])
    return g * torch.tanh(d[:, ER]) + (1 - g) * torch.tanh(d[:, ERV]), g


def bonus(phi: Tensor, advantages: Tensor, kappa: float) -> Tensor:
    """min(max(Phi, 0), |A| / kappa), of the shape of `advantages`: Phi (B,) with A (B,), or Phi (B, 1) with (B, T)."""
    return torch.minimum(phi.clamp(min=0).expand_as(advantages), advantages.abs() / kappa)


@dataclass(frozen=True)
class VelocityRank(Method):
    """Adds a bounded bonus from the effective rank of the hidden states to the advantage.

    weight 0: TRL bit for bit, nothing is computed. kappa infinite: TRL bit for bit, but everything is logged, which is
    the control for a run with it.
    """

    name = "velocity_rank"
    title = "Beyond the Exploration-Exploitation Trade-off: A Hidden State Approach for LLM Reasoning in RLVR"
    paper = "2509.23808"
    headline = ("er", "erv", "era", "bonus_share")

    stride: int = param(40, "s, tokens between two prefixes", source="card: diff_stride of the released script", ge=1)
    ema_alpha: float = param(
        0.3,
        "a, weight of the newest rollout in the averages",
        source="card: reward_ema_alpha of the script",
        gt=0,
        le=1,
    )
    gain: float = param(2.0, "c, slope of the mix in ERA", source="card: modulation_gain of the released script", ge=0)
    weight: float = param(
        1.0, "w, factor of the bonus", source="card: released script, aux_reward_global_weight", ge=0
    )
    kappa: float = param(
        2.0, "the bonus is at most |A| / kappa", source="card: released script, adv_shaping_kappa", gt=1
    )
    clamp: float = param(5.0, "bound of the relative deviations", source="card: official code", gt=0)
    max_prefix_tokens: int = param(
        512, "prefixes use the last tokens only, this many", source="card: official code", ge=2
    )
    adaptive_weight: bool = param(
        False,
        "w (1 - (score + 1) / 2) instead of w; score is the running average of the mean reward, kept in [-1, 1]",
        source="card: aux_fix is true in the released script, so this is off",
    )
    averages: str = param(
        "corrected",
        "corrected for the start and up to the previous rollout, or literal: from 0, one rollout later",
        source="card: decision; literal is the code's order",
        choices=("corrected", "literal"),
    )
    bonus_on: str = param(
        "response",
        "where the bonus is added: the whole response, or its last_token",
        source="card: decision; last_token is what the released code does",
        choices=("response", "last_token"),
    )
    verifier: str | None = param(
        None, "reward that tells right from wrong in the log; none takes the only one", source="ours"
    )
    threshold: float = param(0.5, "a response is right when the verifier gives at least this", source="ours")

    # What it declares

    def needs(self) -> frozenset[str]:
        return frozenset({HIDDEN}) if self.weight > 0 else frozenset()

    def cost(self) -> str:
        if self.weight == 0:
            return "nothing: the weight is 0"
        tokens = f"a symmetric eigenproblem per {self.stride} of its last {self.max_prefix_tokens} tokens"
        return f"for each response {tokens} and one of all; no extra forward"

    def check(self, setup: Setup) -> list[str]:
        return reward_named(
            setup, self.verifier, "verifier", "adaptive_weight goes by" if self.adaptive_weight else None
        )

    # Rollout

    def streams(self, rollout: Rollout) -> dict[str, Tensor]:
        """The verifier's reward of each row, NaN where there is none or several rewards and no verifier."""
        if self.weight == 0:
            return {}
        names: Sequence[str] = rollout.reward_names
        if self.verifier is None and len(names) > 1:
            return {"score": torch.full_like(rollout.rewards[:, 0], math.nan)}
        return {"score": rollout.rewards[:, names.index(self.verifier) if self.verifier else 0]}

    def observe(self, group: Group) -> None:
        """A new rollout: the sums of the last one become its means and enter the averages."""
        if "sums" not in self.state:
            return
        sums, counts = self.state.pop("sums"), self.state.pop("counts")
        if counts[ER] == 0:  # every row was masked
            return
        mean = sums / counts.clamp(min=1)
        if self.averages == "literal":
            mean, self.state["previous"] = self.state.get("previous"), mean
        old = self.state.get("mu")
        if old is None:
            old = torch.zeros_like(self.state["previous"] if mean is None else mean)
        self.state["mu"] = old if mean is None else (1 - self.ema_alpha) * old + self.ema_alpha * mean
        self.state["rollouts"] = self.state.get("rollouts", torch.tensor(0)) + 1

    # Loss

    def token_advantages(self, advantages: Tensor, x: LossInput) -> Tensor:
        if self.weight == 0:
            return advantages
        assert x.policy is not None  # HIDDEN is declared
        metrics = response_metrics(x.policy.hidden, x.mask, self.stride, self.max_prefix_tokens)
        x.scratch["metrics"] = metrics
        self._log_metrics(x, metrics)
        mu = self._averages(metrics)
        if mu is None:
            return advantages
        share, g = signal(metrics, mu[:SCORE], self.gain, self.clamp)
        phi = (self._weight(mu) * share).to(advantages.dtype)
        phi = phi if advantages.dim() == 1 else phi.unsqueeze(1)
        added = bonus(phi, advantages, self.kappa)
        self._log_bonus(x, mu, g, phi, added, advantages)
        if math.isinf(self.kappa):
            return advantages
        return advantages + added if self.bonus_on == "response" else _at_last_token(advantages, added, x.mask)

    def _averages(self, metrics: Tensor) -> Tensor | None:
        """mu (4,) of ER, ERV, ERA and the score, or None in the first rollout."""
        if "mu" not in self.state:
            return None
        mu = self.state["mu"].to(metrics.device)
        if self.averages == "literal":
            return mu
        return mu / (1 - (1 - self.ema_alpha) ** int(self.state["rollouts"]))

    def _weight(self, mu: Tensor) -> Tensor | float:
        return self.weight * (1 - (mu[SCORE].clamp(-1, 1) + 1) / 2) if self.adaptive_weight else self.weight

    def observe_loss(self, x: LossInput) -> None:
        """Adds this micro-batch of all processes to the rollout's sums."""
        if self.weight == 0:
            return
        values = torch.cat([x.scratch["metrics"], x.streams["score"].double().unsqueeze(1)], dim=1)
        everyone = x.gather(values[x.mask.any(1)].flatten())[0].view(-1, values.size(1))
        known = ~everyone.isnan()
        for key, new in (("sums", everyone.nan_to_num() * known), ("counts", known.double())):
            self.state[key] = self.state[key].to(new.device) + new.sum(0) if key in self.state else new.sum(0)

    # Log

    def _log_metrics(self, x: LossInput, metrics: Tensor) -> None:
        there = x.mask.any(1)
        score = x.streams["score"]
        right, known = score >= self.threshold, ~score.isnan()
        for label, rows in (("", there), ("_right", there & known & right), ("_wrong", there & known & ~right)):
            for name, column in (("er", ER), ("erv", ERV), ("era", ERA)):
                x.metrics.mean(name + label, metrics[:, column], rows.float())
        everyone = x.gather(metrics[there][:, :ERA].flatten())[0].view(-1, ERA)
        if everyone.size(0) > 2:
            correlation = torch.corrcoef(everyone.T)[ER, ERV]
            x.metrics.mean("er_erv_correlation", correlation.nan_to_num(), (~correlation.isnan()).float())

    def _log_bonus(self, x: LossInput, mu: Tensor, g: Tensor, phi: Tensor, added: Tensor, advantages: Tensor) -> None:
        for name, column in (("mu_er", ER), ("mu_erv", ERV), ("mu_era", ERA)):
            x.metrics.mean(name, mu[column])
        there = x.mask.any(1)
        x.metrics.mean("g", g, there.float())
        x.metrics.mean("phi", phi.flatten(), there.float())
        where = (there if advantages.dim() == 1 else x.mask).float()
        size = advantages.abs()
        x.metrics.mean("bonus_share", added / size.clamp(min=EPS), where * (size > 0))
        x.metrics.mean("capped", (phi.expand_as(size) >= size / self.kappa).float(), where * (size > 0))


def _at_last_token(advantages: Tensor, added: Tensor, mask: Tensor) -> Tensor:
    """Advantages (B,) or (B, T) with the bonus of the same shape at each row's last masked token alone: (B, T)."""
    position = torch.arange(1, mask.size(1) + 1, device=mask.device) * mask
    last = (position == position.amax(1, keepdim=True)) & mask.bool()
    wide = [a.unsqueeze(1) if a.dim() == 1 else a for a in (advantages, added)]
    return wide[0] + wide[1] * last
