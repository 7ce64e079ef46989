"""DNO: Direct Nash Optimization (arXiv 2404.03715). A regression of the policy's implicit reward on win rates.

r_t(y) in [0, 1] is the share of the time that y beats a response of the policy that the round began with, pi_t, which is
the reference. For a pair (y1, y2) of one prompt, with eta TRL's `beta`, c `reward_scale`, and log-probs summed over tokens:

    z = sigmoid(c (r_t(y1) - r_t(y2)))                                                       a label without gradient
    d = c eta ((log pi(y1) - log pi_t(y1)) - (log pi(y2) - log pi_t(y2)))
    soft: L = -z log sigmoid(d) - (1 - z) log sigmoid(-d)         dL/dd = sigmoid(d) - z, zero at d = c (r_t(y1) - r_t(y2))
    prct: L = -log sigmoid(d) with c = 1                          TRL's `sigmoid`, bit for bit

r_t(y1) - r_t(y2) is the data set's column `win_margin`; the loop `iterative` (`trl_ext.loops`) makes it.

Card: the scale c is inferred (the paper says "relatively larger"); its searched "alpha = 0.005" is not explained there, so
nothing here is it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trl_ext.checks import unread
from trl_ext.method import Method, PairInput, Setup, param

WIN_MARGIN = "win_margin"
"""Column of the soft label: r_t(chosen) - r_t(rejected), in [-1, 1]."""


def soft_label(win_margin: Tensor, scale: float = 1.0) -> Tensor:
    """(B,) r_t(y1) - r_t(y2) -> z = sigmoid(c (r_t(y1) - r_t(y2))), without gradient."""
    return torch.sigmoid(scale * win_margin.detach())


def soft_loss(distance: Tensor, label: Tensor) -> Tensor:
    """(B,) d and z -> the cross-entropy -z log sigmoid(d) - (1 - z) log sigmoid(-d); z carries no gradient."""
    label = label.detach()
    return -label * logsigmoid(distance) - (1 - label) * logsigmoid(-distance)


@dataclass(frozen=True)
class Dno(Method):
    """Preference pairs with soft labels: how often each reply beats the policy that the round began with."""

    name = "dno"
    title = "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences"
    paper = "2404.03715"
    trainer = "dpo"
    column_ranges: ClassVar[Mapping[str, tuple[float, float]]] = {WIN_MARGIN: (-1.0, 1.0)}

    variant: str = param(
        "prct",
        "prct: hard labels, the loss of loss_type sigmoid; soft: labels from the column win_margin",
        source="card: paper (the experiments are DNO-Prct)",
        choices=("prct", "soft"),
    )
    reward_scale: float = param(
        1.0,
        "c, sharpness of the soft label: multiplies win_margin and beta alike, so the target stays",
        source="card: inferred (the paper calls c eta 'relatively larger')",
        ge=1.0,
    )

    def pair_columns(self) -> tuple[str, ...]:
        """The soft label's column; hard labels need none."""
        return (WIN_MARGIN,) if self.variant == "soft" else ()

    def check(self, setup: Setup) -> list[str]:
        """`reward_scale` without soft labels, and a reference that moves."""
        problems = unread(self, {"variant: soft": (self.variant == "soft", ("reward_scale",))})
        if getattr(setup.args, "sync_ref_model", False):
            problems.append("sync_ref_model moves the reference inside a round; set sync_ref_model: false")
        return problems

    def cost(self) -> str:
        """For the plan."""
        return "no extra forward; win rates come with the data"

    def pair_loss(self, x: PairInput) -> Tensor:
        """(B,) of the soft or the hard loss."""
        gap = (x.chosen - x.ref_chosen) - (x.rejected - x.ref_rejected)
        if self.variant == "prct":
            return -logsigmoid(x.beta * gap)
        margin = x.columns[WIN_MARGIN].float()
        distance, label = self.reward_scale * x.beta * gap, soft_label(margin, self.reward_scale)
        x.metrics.mean("label", label)
        x.metrics.mean("win_margin", margin)
        x.metrics.mean("error", torch.sigmoid(distance) - label)  # the gradient with respect to d
        x.metrics.mean("accuracy", (gap * margin > 0).float(), (margin != 0).float())
        return soft_loss(distance, label)
