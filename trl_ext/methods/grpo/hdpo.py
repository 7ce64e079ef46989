"""HDPO: accuracy and tool economy as two channels, each with advantages and a clipped loss of its own.

Paper: "Act Wisely: Cultivating Meta-Cognitive Tool Use in Agentic Multimodal Models" (HDPO), arXiv 2604.08545. Card: hdpo.
T_i tool calls of rollout i, r_ans > 0 a right answer; Q the right rollouts of a group, those without a call included:

    r_tool = 1 / (T_i + 1) if right, else 0
    A_acc  = TRL's advantage of the summed rewards, over the whole group
    A_tool = (r_tool - mean_Q) / (std_Q + eps) inside Q if |Q| >= 2, else 0        sample std
    L(A,M) = mean over the tokens of M of max(-A rho, -A clip(rho, 1-e_low, 1+e_high))
    loss   = w_acc L(A_acc, M_acc) + w_tool L(A_tool, M_tool)       M_tool: tokens of rollouts with A_tool != 0

"First right, then economical" without a schedule: while few rollouts are right, the second term is nearly silent.

Both terms through TRL's one loss (`loss: two`). L(A, .) is linear in |A| for each sign, so with A_2 = w_tool k A_tool
the pair acts on a token as one advantage whose parts drop out where their own clip closes:

    A = w_acc A_acc [open(A_acc)] + A_2 [open(A_2)]     open(a): rho < 1 + e_high if a > 0, rho > 1 - e_low if a < 0

where the signs differ; where they agree the plain sum clips as both do. The gradient is that of the two losses, in every
case; TRL's `loss` lacks the constants of closed parts, which `loss_acc` and `loss_tool` have. k = |M_acc| / |M_tool| makes
TRL's denominator that of the second term, over the scope of the first: tokens of the rollout on all processes (dapo),
those of the micro-batch (bnpo), rows of the rollout (the others, whose mean is one over rows). Token weights and masks of
other methods act on both terms. `loss: one` is the card's shortcut w_acc A_acc + A_2: the same while every ratio is
inside the clip range, or signs agree.

Decisions. eps of A_acc is TRL's 1e-4 (paper: 1e-6 in both). T_i counts calls, `count: turns` is the released code's.
Normalisation per micro-batch, as in the released code, is not offered: results would depend on how batches are cut.
A rollout whose r_tool is the mean of Q has A_tool 0 and is outside M_tool, as in the released code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_ext import ops
from trl_ext.checks import others_that, reward_named, unread
from trl_ext.method import Group, LossInput, Method, Rollout, Setup, param
from trl_ext.surrogates import log_ratio

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""Loss types of TRL with the clipped term."""


def tool_reward(calls: Tensor, right: Tensor) -> Tensor:
    """r_tool = 1 / (T + 1) of right rollouts, 0 of the others; any shape."""
    return right / (calls + 1.0)


def tool_advantages(calls: Tensor, right: Tensor, eps: float = 1e-6) -> Tensor:
    """A_tool (P, G) from calls (P, G) and right (P, G) bool. Exactly 0 outside Q, for |Q| <= 1 and for equal calls."""
    reward, inside = tool_reward(calls, right), right.float()
    count = inside.sum(1, keepdim=True)
    mean = reward.sum(1, keepdim=True) / count.clamp(min=1)
    centred = (reward - mean) * inside
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    low, high = reward.masked_fill(~right, 2.0).amin(1, keepdim=True), reward.amax(1, keepdim=True)
    return torch.where((count >= 2) & (high > low), centred / (std + eps), 0.0)


def is_open(advantages: Tensor, ratio: Tensor, low: float, high: float) -> Tensor:
    """Whether the clipped term has a gradient: rho < 1 + high for A > 0, rho > 1 - low for A < 0; broadcastable shapes."""
    return torch.where(advantages > 0, ratio < 1 + high, ratio > 1 - low)


def clipped_loss(advantages: Tensor, ratio: Tensor, low: float, high: float) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)), broadcastable shapes."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))


def joined(first: Tensor, second: Tensor, ratio: Tensor, low: float, high: float) -> Tensor:
    """(B, T): the advantage whose clipped term has the gradient of the sum of the terms of `first` and `second`."""
    parts = [a * is_open(a, ratio, low, high) for a in (first, second)]
    return torch.where(first * second < 0, parts[0] + parts[1], first + second)


@dataclass(frozen=True)
class Hdpo(Method):
    """Adds the efficiency channel to GRPO's advantages. w_tool = 0 and w_acc = 1 is TRL bit for bit.

    Metrics: `accuracy`, `calls`, `calls_correct`, `nonzero` (share of rollouts with A_tool != 0), `qualifying` (share in a
    Q of two or more: the paper's rho), and of the loss `loss_acc`, `loss_tool` (neither weighted), `clip_acc`,
    `clip_tool` (share of the tokens of either mask at which its clip is closed).
    """

    name = "hdpo"
    title = "Act Wisely: Cultivating Meta-Cognitive Tool Use in Agentic Multimodal Models"
    paper = "2604.08545"
    owns = ("baseline",)
    headline = ("calls", "calls_correct", "accuracy", "qualifying")
    conflicts: ClassVar = {
        "otc": "both make calls cost something, which would count twice; name only one of them",
        "real": "REAL learns from right and wrong alone, so advantages have no effect; name one",
        "group_dpo": "its loss on whole groups does not see token advantages, so calls would have no effect; name one",
        "d3s": "it drops the rollouts of equal accuracy, which are those that teach economy; name one",
        "mdpo": "its policy term has no clip; set loss: one in hdpo",
        "target_surrogate": "its policy term has no clip; set loss: one in hdpo",
    }

    answer: str | None = param(
        None, "reward function that says right or wrong; needed if there are several", source="card: paper, r_ans"
    )
    threshold: float = param(0.0, "an answer is right if its reward is above this", source="card: paper, r_ans > 0")
    w_acc: float = param(1.0, "weight of the accuracy loss", source="card: paper and official script", ge=0)
    w_tool: float = param(
        0.15, "weight of the efficiency loss; 0 switches it off", source="card: paper and official script", ge=0
    )
    count: str = param(
        "calls",
        "T: calls, or turns that call a tool",
        source="card: decision; turns is the official code's",
        choices=("calls", "turns"),
    )
    eps: float = param(1e-6, "added to the std of r_tool", source="card: paper and official script", gt=0)
    loss: str = param(
        "two",
        "two: the gradient of two clipped losses; one: their advantages summed before the clip",
        source="card: official code; one is the card's shortcut",
        choices=("two", "one"),
    )
    clip_low: float = param(
        0.2, "e_low, must be TRL's epsilon; used by loss: two", source="card: framework default, code", gt=0, lt=1
    )
    clip_high: float = param(
        0.2, "e_high, must be TRL's epsilon_high; used by loss: two", source="card: framework default, code", gt=0
    )

    _now: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """A_tool (P * G,) of the rollout in hand, from `observe` to `streams`."""

    def __post_init__(self) -> None:
        if self.loss == "one":
            kept = {k: v for k, v in Hdpo.conflicts.items() if k not in ("mdpo", "target_surrogate")}
            object.__setattr__(self, "conflicts", kept)

    # What it declares

    def cost(self) -> str:
        return "no extra forward: a few products for each token"

    def check(self, setup: Setup) -> list[str]:
        problems = reward_named(setup, self.answer, "answer", "tells right from wrong")
        problems += unread(self, {"loss: two": (self.loss == "two", ("clip_low", "clip_high"))})
        problems += [
            f"{other} would change the accuracy channel's advantages alone; name one, or let it not act on advantages"
            for other in others_that(setup, self.name, "group_advantages")
        ]
        return problems + (self._other_clips(setup.args) if self.loss == "two" and self.w_tool > 0 else [])

    def _other_clips(self, args: Any) -> list[str]:
        """Flags of TRL's policy term with which two losses are not what `joined` computes."""
        epsilon = getattr(args, "epsilon", self.clip_low)
        high = getattr(args, "epsilon_high", None)
        clip, theirs = (self.clip_low, self.clip_high), (epsilon, epsilon if high is None else high)
        wrong = {
            f"TRL clips at epsilon {theirs[0]} and epsilon_high {theirs[1]}; set clip_low: {theirs[0]} and clip_high: "
            f"{theirs[1]}, with which both losses clip alike": clip != theirs,
            f"loss_type {getattr(args, 'loss_type', None)} has no clipped term; set loss: one, or loss_type: dapo": (
                getattr(args, "loss_type", "dapo") not in CLIPPED
            ),
        }
        defaults = {"delta": None, "importance_sampling_level": "token", "off_policy_mask_threshold": None}
        for flag, default in defaults.items():
            value = getattr(args, flag, default)
            wrong[f"{flag} {value} is not part of the two losses; leave it at {default}, or set loss: one"] = (
                value != default
            )
        return [message for message, found in wrong.items() if found]

    # Rollout

    def _right(self, group: Group) -> Tensor:
        name = self.answer if self.answer is not None else group.reward_names[0]
        return group.reward(name) > self.threshold

    def observe(self, group: Group) -> None:
        right = self._right(group)
        calls = (group.tool_calls if self.count == "calls" else group.tool_turns).float()
        found = tool_advantages(calls, right, self.eps)
        self._now["A_tool"] = found.flatten()
        log, inside = group.metrics.mean, right.float()
        log("accuracy", inside)
        log("calls", calls)
        log("calls_correct", calls, inside)
        log("nonzero", (found != 0).float())
        log("qualifying", (right & (right.sum(1, keepdim=True) >= 2)).float())

    def streams(self, rollout: Rollout) -> dict[str, Tensor]:
        """A_tool of each row, and k over rows and over tokens of all processes, the same for every row."""
        if self.w_tool == 0:
            return {}
        everyone = self._now.pop("A_tool")
        tokens, mine = rollout.gather(rollout.mask.sum(1).float())
        signal = everyone != 0
        rows_k = signal.numel() / signal.sum().clamp(min=1)
        tokens_k = tokens.sum() / (tokens * signal).sum().clamp(min=1)
        own = everyone[mine]
        return {"A_tool": own, "rows_k": rows_k.expand_as(own), "tokens_k": tokens_k.expand_as(own)}

    # Loss

    def token_advantages(self, advantages: Tensor, x: LossInput) -> Tensor:
        first = advantages if self.w_acc == 1 else self.w_acc * advantages
        if self.w_tool == 0:
            return first
        scale = self._denominators(x)
        second = self.w_tool * scale * x.streams["A_tool"].to(advantages.dtype)
        ratio = log_ratio(x).detach().exp()
        self._log(x, advantages, scale, ratio)
        if first.dim() == 1 and (x.old_logps is None or self.loss == "one"):
            return first + second  # every ratio is 1, or nobody asks
        first = first.unsqueeze(1) if first.dim() == 1 else first
        second = second.unsqueeze(1)
        if self.loss == "one" or x.old_logps is None:
            return first + second
        return joined(first, second, ratio, self.clip_low, self.clip_high)

    def _denominators(self, x: LossInput) -> Tensor:
        """k (B,)."""
        if x.loss_type in ops.TOKEN_MEAN:
            return x.streams["tokens_k"]
        if x.loss_type == "bnpo":
            signal = (x.streams["A_tool"] != 0).float().unsqueeze(1)
            k = x.mask.sum() / (x.mask * signal).sum().clamp(min=1)
            return k.expand_as(x.streams["A_tool"])
        return x.streams["rows_k"]

    def _log(self, x: LossInput, advantages: Tensor, scale: Tensor, ratio: Tensor) -> None:
        acc = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        tool, k = x.streams["A_tool"].unsqueeze(1), scale.unsqueeze(1)
        parts = (("acc", acc, x.mask, torch.ones_like(k)), ("tool", tool, x.mask * (tool != 0), k))
        for name, value, mask, factor in parts:
            terms = clipped_loss(value, ratio, self.clip_low, self.clip_high)
            x.metrics.mean(f"loss_{name}", x.aggregate(terms * factor))
            shut = (value != 0) & ~is_open(value, ratio, self.clip_low, self.clip_high)
            x.metrics.mean(f"clip_{name}", shut.float(), mask)
