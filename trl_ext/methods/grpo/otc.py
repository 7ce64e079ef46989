"""OTC: a right answer earns less the more tool calls it took beyond the fewest with which its question was solved.

Paper: "Acting Less is Reasoning More! Teaching Model to Act Efficiently" (OTC-PO), arXiv 2504.14870. Card: otc.
m tool calls of a rollout, n the fewest calls that solved its question, r the correctness reward, c > 0, alpha > 0:

    f(m, n) = 0 if m = n = 0;  m if n = 0;  2 n m / (m + n) otherwise
    r_tool  = 1                            m = n = 0
              cos(f pi / (2 m + c))        n = 0, m > 0
              sin(f pi / (2 n))            n > 0:  sin(pi m / (m + n)), 1 at m = n, 0.866 at 2n, 0.707 at 3n
    R       = alpha r_tool r               r > 0; a wrong answer earns nothing however few its calls
    n_q     = min(m of the right rollouts of the group, the stored n_q)

R takes r's place before TRL forms advantages; all else is GRPO. It multiplies: an added penalty on calls, which some
tutorials call OTC, would pay wrong answers for not calling. Memory of n_q goes over epochs, by question. OTC-PPO, which
has no groups, takes n = 0 for everything (`form: ppo`).

Decisions (the paper's text was not available to the card). A question that was never solved has no n: its rewards keep
r_tool = 1, which with 0/1 rewards is 0. A rollout is right from `threshold` on; partial credit below it is multiplied
too, and rewards that are not positive only by alpha: more calls must not improve them. n only serves the group in which
it was found and later ones, and is stored at the end of the rollout; the same question twice in a rollout shares it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trl_ext.checks import reward_named, unread
from trl_ext.method import Group, Method, Rollout, Setup, param

UNSOLVED = torch.iinfo(torch.long).max
"""n of a question that no rollout has solved."""


def mapped_calls(calls: Tensor, fewest: Tensor) -> Tensor:
    """f(m, n) of any broadcastable shapes: harmonic mean of m and n, f(n, n) = n, towards 2n; m where n = 0."""
    m, n = calls.float(), fewest.float()
    return torch.where(n == 0, m, 2 * n * m / (m + n).clamp(min=1))


def tool_coefficient(calls: Tensor, fewest: Tensor, smoothing: float = 1.0) -> Tensor:
    """r_tool(m, n) in [0, 1], of any broadcastable shapes; exactly 1 where m = n."""
    m, n = calls.float(), fewest.float()
    f = mapped_calls(calls, fewest)
    without = torch.cos(f * math.pi / (2 * m + smoothing))
    needed = torch.sin(f * math.pi / (2 * n.clamp(min=1)))
    return torch.where(m == n, 1.0, torch.where(n == 0, without, needed).clamp(0, 1))


def fewest_in_groups(right: Tensor, calls: Tensor) -> Tensor:
    """(P, G) bool and (P, G) calls -> (P,) long: the least number of calls of a right rollout, or `UNSOLVED`."""
    return torch.where(right, calls.long(), UNSOLVED).amin(1)


@dataclass(frozen=True)
class Memory:
    """n_q of the questions that were ever solved: `questions` (N,) sorted int64, `fewest` (N,) int64."""

    questions: Tensor
    fewest: Tensor

    def with_groups(self, questions: Tensor, fewest: Tensor) -> Memory:
        """The minimum of what is stored and (P,) `fewest` of (P,) `questions`; `UNSOLVED` ones are left out."""
        solved = fewest < UNSOLVED
        every = torch.cat([self.questions, questions[solved]])
        names, where = every.unique(return_inverse=True)
        least = torch.full_like(names, UNSOLVED)
        least.scatter_reduce_(0, where, torch.cat([self.fewest, fewest[solved]]), "amin")
        return Memory(names, least)

    def of(self, questions: Tensor) -> Tensor:
        """(P,) -> (P,): n_q, or `UNSOLVED`."""
        if self.questions.numel() == 0:
            return torch.full_like(questions, UNSOLVED)
        where = torch.searchsorted(self.questions, questions.contiguous()).clamp(max=self.questions.numel() - 1)
        return torch.where(self.questions[where] == questions, self.fewest[where], UNSOLVED)


@dataclass(frozen=True)
class Otc(Method):
    """Multiplies the correctness reward by r_tool(m, n_q).

    Without tool calls (m = 0 everywhere) and with alpha = 1 it is TRL bit for bit. Rollouts that only differ in calls have
    different rewards, so a group whose answers are all right teaches too.

    Metrics: `calls` (mean m), `calls_correct` (of right rollouts), `accuracy`, `productivity` (right answers / calls),
    `r_tool` (of right rollouts), `n` (of questions that have one), `n_zero` (share of these with n = 0), `known` (share of
    the rollout's questions with a stored n before it).
    """

    name = "otc"
    title = "Acting Less is Reasoning More! Teaching Model to Act Efficiently"
    paper = "2504.14870"
    headline = ("calls", "calls_correct", "accuracy", "productivity")
    conflicts: ClassVar = {
        "real": "REAL takes a reward below its threshold for wrong, and OTC lowers those of right answers; name one",
        "scaf_grpo": "a number of calls that only a hint made possible would be remembered as the fewest; name one",
    }

    correctness: str | None = param(
        None,
        "reward function that says right or wrong, which is multiplied; needed if there are several",
        source="card: paper; which reward it is, is the recipe's",
    )
    threshold: float = param(
        1.0, "a rollout is right if its correctness reward is at least this", source="card: decision (b)", gt=0
    )
    alpha: float = param(1.0, "scale of the reward", source="card: decision (a); not found in the paper", gt=0)
    smoothing: float = param(
        1.0, "c, used where n = 0; larger is a slower decay", source="card: decision (a); not found in the paper", gt=0
    )
    form: str = param(
        "grpo",
        "grpo: n from the group and the memory; ppo: n = 0 for everything (OTC-PPO)",
        source="card: paper, OTC-GRPO and OTC-PPO",
        choices=("grpo", "ppo"),
    )
    group_only: bool = param(
        False, "forget n after each rollout, in place of the minimum over epochs", source="card: paper; option of (c)"
    )

    # What it declares

    def cost(self) -> str:
        return "no extra forward; two numbers for each question that was solved"

    def check(self, setup: Setup) -> list[str]:
        problems = reward_named(setup, self.correctness, "correctness", "tells right from wrong")
        return problems + unread(self, {"form: grpo": (self.form == "grpo", ("group_only",))})

    # Rewards. state: "questions" (N,), "fewest" (N,), the memory

    def _memory(self, device: torch.device) -> Memory:
        if self.group_only or "questions" not in self.state:
            nothing = torch.zeros(0, dtype=torch.long, device=device)
            return Memory(nothing, nothing)
        return Memory(self.state["questions"].to(device), self.state["fewest"].to(device))

    def _with(self, group: Group, correctness: Tensor) -> Memory:
        """The memory after this rollout, on all processes alike."""
        fewest = fewest_in_groups(correctness >= self.threshold, group.tool_calls)
        return self._memory(group.questions.device).with_groups(group.questions, fewest)

    def _coefficient(self, group: Group, correctness: Tensor) -> Tensor:
        """r_tool (P, G) for the raw correctness (P, G)."""
        if self.form == "ppo":
            return tool_coefficient(group.tool_calls, torch.zeros_like(group.tool_calls), self.smoothing)
        n = self._with(group, correctness).of(group.questions).unsqueeze(1)
        found = tool_coefficient(group.tool_calls, n.clamp(max=2**31), self.smoothing)
        return torch.where(n == UNSOLVED, 1.0, found)

    def _column(self, names: Sequence[str]) -> int:
        return 0 if self.correctness is None else list(names).index(self.correctness)

    def shape_rewards(self, rewards: Tensor, group: Group) -> Tensor:
        at = self._column(group.reward_names)
        raw = group.rewards[..., at]  # other methods may have scaled `rewards` by now
        found = rewards.clone()
        coefficient = torch.where(raw > 0, self._coefficient(group, raw), 1.0)
        found[..., at] = (self.alpha * coefficient * rewards[..., at]).to(rewards.dtype)
        return found

    def measure(self, rollout: Rollout) -> dict[str, Tensor]:
        """The correctness as it was, since `observe` sees shaped rewards."""
        return {"correctness": rollout.rewards[:, self._column(rollout.reward_names)]}

    def observe(self, group: Group) -> None:
        """Stores n of the questions of this rollout."""
        correctness = group.measured["correctness"]
        self._log(group, correctness)
        if self.form == "grpo" and not self.group_only:
            memory = self._with(group, correctness)
            self.state.update(questions=memory.questions.cpu(), fewest=memory.fewest.cpu())

    def _log(self, group: Group, correctness: Tensor) -> None:
        log, calls = group.metrics.mean, group.tool_calls.float()
        right = (correctness >= self.threshold).float()
        log("calls", calls)
        log("calls_correct", calls, right)
        log("accuracy", right, (~correctness.isnan()).float())
        log("productivity", right.sum() / calls.sum().clamp(min=1), calls.sum())
        log("r_tool", self._coefficient(group, correctness), right)
        if self.form == "grpo":
            n = self._with(group, correctness).of(group.questions)
            known = (n < UNSOLVED).float()
            log("n", n.clamp(max=2**31).float(), known)
            log("n_zero", (n == 0).float(), known)
            log("known", (self._memory(n.device).of(group.questions) < UNSOLVED).float())

    def summary(self, decode_one: Callable[[int], str]) -> list[str]:
        """How many questions were solved, and with how many calls."""
        if "fewest" not in self.state or self.state["fewest"].numel() == 0:
            return []
        fewest = self.state["fewest"].float()
        return [
            f"{fewest.numel()} questions were solved at least once, with {float(fewest.mean()):.2f} calls at best on "
            f"average; {float((fewest == 0).float().mean()):.0%} of them without a call"
        ]
