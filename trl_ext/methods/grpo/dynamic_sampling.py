"""Dynamic sampling: groups whose completions all score the same are replaced by groups of fresh prompts.

Paper: "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv 2503.14476, section on dynamic sampling.
Card: none. Over the P prompts of a rollout with G completions each, R the reward that decides:

    keep q  iff  0 < |{o_i : o_i is right}| < G               paper, for 0/1 rewards
    here    iff  not all R(o_i) are equal  [and low <= mean_i R(o_i) <= high]
    round   n = min(ceil(oversample x missing), P) fresh prompts, G completions of each; those that keep fill the places

up to `rounds` times. What the budget leaves stays as it was and trains nothing; the paper's script stops there with an
error. Every step so has P groups that teach, and costs more completions: compare it with GRPO per step and per
completion (`extra_completions`). The rest of DAPO (clip-higher, token mean, overlong reward) is TRL's own.

Fresh prompts come from the method that draws prompts (FG-ExPO, PACED), or uniformly from the training set by the run's
seed and a counter, which a checkpoint keeps; a prompt that this rollout has had already is passed over. The data
loader's order is not touched, so an epoch may show a prompt more than once. A round makes no more completions than the
rollout itself did: memory does not grow. Good groups beyond the missing ones are thrown away. TRL's reward metrics
describe what is trained on; `reward_before` is what came first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_ext.checks import parts_of_groups, reward_named
from trl_ext.method import Attempt, Method, Revision, Setup, param
from trl_ext.rollouts.refill import Refill, has_signal, refill


@dataclass(frozen=True)
class DynamicSampling(Method):
    """Refills a rollout until every group has a signal, or the budget is spent; rounds = 0 is TRL bit for bit.

    Metrics of each rollout: `flat_before`, `flat_after` (share of groups without signal), `rounds`, `extra_completions`,
    `extra_tokens`, `fresh_kept` (share of fresh groups with a signal) and `reward_before`.
    """

    name = "dynamic_sampling"
    title = "DAPO: An Open-Source LLM Reinforcement Learning System at Scale"
    paper = "2503.14476"
    headline = ("flat_before", "flat_after", "extra_completions", "reward_before")
    conflicts: ClassVar = {
        "riskpo": "RiskPO's bundles are its own remedy for groups without variance, and filtered prompts change the "
        "distribution whose quantiles it tracks; leave dynamic_sampling out",
        "hdpo": "groups that are all right would be replaced, and these are where HDPO's efficiency channel works; leave "
        "dynamic_sampling out",
        "otc": "groups that are all right would be replaced, and their numbers of calls are OTC's signal; leave "
        "dynamic_sampling out",
        "fgrpo": "groups that are all right would be replaced, although their constraints differ; leave dynamic_sampling "
        "out",
    }

    rounds: int = param(
        9,
        "rounds of fresh prompts per rollout; what has no signal after them stays. 0 switches it off",
        source="the script released with DAPO: at most 10 generation batches, of which the rollout is the first",
        ge=0,
    )
    oversample: float = param(
        1.5,
        "fresh prompts of a round for each missing group; more of them mean fewer rounds and more that is thrown away",
        source="ours: decision; the released script begins with 3 times the batch",
        ge=1,
    )
    reward: str | None = param(
        None,
        "reward function that decides; none: the weighted sum, whose spread GRPO divides by",
        source="ours: decision; the paper filters by accuracy",
    )
    low: float | None = param(
        None, "also replace groups whose mean reward is below this", source="ours: the paper has no such bound"
    )
    high: float | None = param(
        None, "also replace groups whose mean reward is above this", source="ours: the paper has no such bound"
    )

    # What it declares

    @property
    def asks_fresh(self) -> bool:
        return self.rounds > 0

    def cost(self) -> str:
        return f"up to {self.rounds} more rounds of generation and scoring per rollout; no extra forward"

    def check(self, setup: Setup) -> list[str]:
        problems, names = [], list(setup.methods)
        if "scaf_grpo" in names and names.index("scaf_grpo") > names.index(self.name):
            problems.append(
                "it would replace the groups that scaf_grpo could still rescue; name scaf_grpo before dynamic_sampling"
            )
        if self.low is not None and self.high is not None and self.low > self.high:
            problems.append(f"low {self.low} is above high {self.high}, so no group is kept; swap them")
        size, processes = getattr(setup.args, "num_generations", 1), getattr(setup.args, "world_size", 1)
        if size % processes:
            why = f"{processes} processes share out fresh groups of {size} unevenly (num_generations: a multiple of them)"
            problems += parts_of_groups(setup, why)
        return problems + reward_named(setup, self.reward, "reward")

    # Rollout. state: "draws", how often fresh prompts were asked for in this run

    def revise(self, attempt: Attempt) -> Revision | None:
        before = self._signal(attempt, attempt.rewards)
        made = _Made(self, attempt)
        found = refill(
            torch.nonzero(~before).flatten().tolist(), made.groups, self.rounds, self.oversample, len(attempt.rows)
        )
        self._log(attempt, before, found, made)
        swaps = {
            (place, g): sample for place, number in found.taken.items() for g, sample in enumerate(made.ids[number])
        }
        used = set(found.taken.values())
        return Revision(swaps, unused=[ids for number, ids in enumerate(made.ids) if number not in used])

    def _signal(self, attempt: Attempt, rewards: Tensor) -> Tensor:
        """(P, G, F) -> (P,) bool."""
        found = attempt.reward(self.reward, rewards).masked_fill(rewards.isnan().all(-1), torch.nan)
        return has_signal(found, self.low, self.high)

    def _fresh(self, attempt: Attempt, count: int, seen: list[Any]) -> list[dict[str, Any]]:
        """Up to `count` rows whose prompts are not in `seen`, to which they are added."""
        number = self.state.get("draws", 0)
        self.state["draws"] = number + 1
        rows = [row for row in attempt.fresh(count, number) if row["prompt"] not in seen]
        seen += [row["prompt"] for row in rows]
        return rows

    def _log(self, attempt: Attempt, before: Tensor, found: Refill, made: _Made) -> None:
        metrics = attempt.metrics
        metrics.mean("flat_before", (~before).float())
        metrics.mean("flat_after", len(found.left) / len(attempt.rows))
        metrics.mean("rounds", found.rounds)
        metrics.mean("extra_completions", found.made * attempt.run.num_generations)
        metrics.mean("extra_tokens", made.tokens)
        metrics.mean("fresh_kept", made.kept / max(1, found.made), found.made)
        metrics.mean("reward_before", attempt.reward(None))


class _Made:
    """The fresh groups of one rollout: their samples' `ids` (n, G), how many `kept` a signal, and all their `tokens`."""

    def __init__(self, method: DynamicSampling, attempt: Attempt) -> None:
        self.method, self.attempt = method, attempt
        self.seen: list[Any] = [row["prompt"] for row in attempt.rows]
        self.ids: list[list[int]] = []
        self.kept, self.tokens = 0, 0

    def groups(self, count: int) -> Tensor:
        """Makes groups of at most `count` fresh prompts -> (made,) bool: which have a signal."""
        size = self.attempt.run.num_generations
        rows: list[Mapping[str, Any]] = list(self.method._fresh(self.attempt, count, self.seen))
        samples = self.attempt.sample([row for row in rows for _ in range(size)])
        self.ids += [list(samples.ids[i : i + size]) for i in range(0, len(samples.ids), size)]
        self.tokens += int(samples.lengths.sum())
        good = self.method._signal(self.attempt, samples.rewards.view(-1, size, samples.rewards.size(-1)))
        self.kept += int(good.sum())
        return good
