"""Several scores for one completion made into one reward that does not trust a single scorer (arXiv 2310.02743).

Letters: k members, B completions. Scores are (k, B); NaN says that a member abstains, and is left out; where all abstain
the result is NaN. Nothing here carries a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ext.ops import soft_min

OBJECTIVES = ("mean", "wco", "uwo", "soft_min")
GROUP_EPS = 1e-4
"""Added to a group's standard deviation, as TRL does."""


def combine(
    scores: Tensor, objective: str = "uwo", *, variance_weight: float = 0.5, ddof: int = 0, soft_alpha: float = 0.3
) -> Tensor:
    """(k, B) -> (B,): the reward that k members give together.

    mean: mu = mean_m S_m. wco: min_m S_m. uwo: mu - variance_weight * sum_m (S_m - mu)^2 / (k - ddof), the paper's
    Eq. 5 with ddof 0; with a single score its variance is 0. soft_min: -a log mean_m exp(-S_m / a), `soft_alpha` a, a
    smooth wco. In float64 inside, the scores' type outside. ValueError for another objective or an infinite score.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: {objective!r} is not one of {', '.join(OBJECTIVES)}")
    if scores.isinf().any():
        raise ValueError("a member gave an infinite score")
    values = scores.detach().double()
    count = (~values.isnan()).sum(0)
    if objective == "mean":
        found = values.nanmean(0)
    elif objective == "wco":
        found = values.nan_to_num(math.inf).amin(0)
    elif objective == "uwo":
        found = values.nanmean(0) - variance_weight * variance(values, ddof)
    else:
        # soft_min divides by k; the last term makes it the number of members that did not abstain
        found = soft_min(values.nan_to_num(math.inf), soft_alpha) + soft_alpha * (count.double() / len(values)).log()
    return found.where(count > 0, math.nan).to(scores.dtype)


def variance(scores: Tensor, ddof: int = 0) -> Tensor:
    """(k, B) -> (B,): variance between members, NaN left out; 0 where no more than `ddof` members scored."""
    values = scores.detach().double()
    count = (~values.isnan()).sum(0)
    squares = (values - values.nanmean(0)).square().nansum(0)
    return (squares / (count - ddof).clamp(min=1)).where(count > ddof, 0.0)


def group_z(scores: Tensor, groups: Tensor) -> Tensor:
    """(k, B), group number (B,) -> (k, B): each member's scores standardised inside each group of completions.

    (S - mean) / (std + 1e-4) with the sample standard deviation, 0 in a group with fewer than two scores.
    """
    values = scores.detach().double()
    found = torch.full_like(values, math.nan)
    for number in groups.unique().tolist():
        inside = values[:, groups == number]
        centred = inside - inside.nanmean(1, keepdim=True)
        more = (~inside.isnan()).sum(1, keepdim=True) - 1
        std = (centred.square().nansum(1, keepdim=True) / more.clamp(min=1)).sqrt()
        found[:, groups == number] = centred / (std + GROUP_EPS)
    return found.to(scores.dtype)


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations (k,) of all scores that each member gave so far, in float64."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, members: int) -> Moments:
        """Of no scores."""
        return cls(*(torch.zeros(members, dtype=torch.float64) for _ in range(3)))

    def saved(self) -> dict[str, Tensor]:
        """Its fields, by name."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def updated(self, scores: Tensor) -> Moments:
        """With the scores (k, B), NaN left out: the parallel update of Chan, Golub and LeVeque."""
        values = scores.detach().double().cpu()
        count = (~values.isnan()).sum(1)
        mean = (values.nansum(1) / count.clamp(min=1)).double()
        squares = (values - mean[:, None]).square().nansum(1)
        total = (self.count + count).clamp(min=1)
        apart = mean - self.mean
        return Moments(
            self.count + count,
            self.mean + apart * count / total,
            self.squares + squares + apart.square() * self.count * count / total,
        )

    def z(self, scores: Tensor) -> Tensor:
        """(k, B) -> (S - mean) / std with the population standard deviation; of a member without spread S - mean."""
        std = (self.squares / self.count.clamp(min=1)).sqrt()
        std = std.where(std > 0, 1.0)
        values = scores.detach().double()
        return ((values - self.mean.to(values.device)[:, None]) / std.to(values.device)[:, None]).to(scores.dtype)


def summary(scores: Tensor, combined: Tensor) -> dict[str, float]:
    """What to log of (k, B) scores and their (B,) reward; nothing when no completion was scored.

    Means over completions of mean, standard deviation (population) and minimum between members, of the reward, and of
    mean - reward (`gap`). `lowest_differs`: share of completions whose lowest member is not the one that is lowest most
    often.
    """
    there = ~combined.isnan()
    if not there.any():
        return {}
    values, reward = scores[:, there].detach().double(), combined[there].double()
    lowest = values.nan_to_num(math.inf).argmin(0)
    mean = values.nanmean(0)
    found = {
        "mean": mean.mean(),
        "std": variance(values).sqrt().mean(),
        "min": values.nan_to_num(math.inf).amin(0).mean(),
        "combined": reward.mean(),
        "gap": (mean - reward).mean(),
        "lowest_differs": (lowest != lowest.mode().values).double().mean(),
    }
    return {name: float(value) for name, value in found.items()}
