"""Scaf-GRPO: a prompt that nobody solves is tried again with hints, and one hinted success joins its group.

Paper: "Scaf-GRPO: Scaffolded Group Relative Policy Optimization for Enhancing LLM Reasoning", arXiv 2510.19807.
Card: scaf_grpo. For question q with completions o_1..o_G and rewards R, and hints h_1, h_2, ... (abstract to concrete):

    trigger    step > warm-up  and  max_i R(o_i) <= 0
    o*_l       ~ pi_old( . | q + h_l)                        one completion for each level, as many at once as o
    l*         = min { l : R(o*_l) > 0 }                     none: the group stays as it is
    O'         = O with o*_{l*} in place of the first failed one
    A', r      GRPO's over O'; for o* both log-probs are those under q + h_{l*}, so the ratio is 1 at the first update

With 0/1 rewards and one success in G: A+ = (G-1)/sqrt(G), A- = -1/sqrt(G), before TRL's epsilon. The replacement comes
before rewards are shaped and advantages formed, so all methods see the group as it is trained; TRL's means of rewards
and its numbers about completions go on describing the rollout without hints. Their standard deviations,
`frac_reward_zero_std` and `entropy` are of what is trained on.

Decisions. The first failed completion gives way (card: decision, as the code; the paper draws one). No memory of which
questions stay unsolved (card: decision, as the code). A tier without its column is left out (card: decision). Not here:
the port's expert trajectories and its importance weight for response-only replacement, which the paper does not have.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trl_ext.checks import parts_of_groups, reward_named, unread
from trl_ext.method import Attempt, Method, Metrics, Revision, Setup, param
from trl_ext.rollouts.hints import Rung, first_solved, hinted, ladder

TIERS = {
    "knowledge_components_parts": "Knowledge Hints",
    "planning_skeleton_parts": "Planning Hints",
    "solution_breakdown_parts": "Solution Hints",
}
"""Column -> label, abstract to concrete: the card's names."""


def failed(rewards: Tensor, threshold: float = 0.0) -> Tensor:
    """(P, G) -> (P,) bool: no reward of the group is above `threshold`."""
    return rewards.amax(1) <= threshold


def warmed_up(step: int, steps: float) -> bool:
    """Whether the optimizer step after `step` done ones is past the first `steps`, in which there are no hints."""
    return step + 1 > round(steps, 6)


@dataclass(frozen=True)
class Trial:
    """A hint for prompt `prompt` of the rollout: the training row as the model sees it with that hint."""

    prompt: int
    rung: Rung
    row: Mapping[str, Any]


@dataclass(frozen=True)
class ScafGrpo(Method):
    """Hints for groups that fail altogether, once the warm-up is over; warmup = 1 is TRL bit for bit.

    Metrics, the first two of every rollout: `failed_groups` and `unhinted_reward` before any hint; after the warm-up
    `rescued` groups and, of the failed ones, `rescue_rate`, `no_hint` (no level to try) and `too_long` (some level left
    out for its length); `level` and `tier_...` (its label) of the hints in use; `extra_completions`, `extra_tokens`.
    """

    name = "scaf_grpo"
    title = "Scaf-GRPO: Scaffolded Group Relative Policy Optimization for Enhancing LLM Reasoning"
    paper = "2510.19807"
    headline = ("failed_groups", "rescue_rate", "level", "unhinted_reward")

    columns: dict[str, Any] = param(
        TIERS,
        "columns of the data with hints, in the order of the ladder -> label in the prompt, or a list of labels, one for "
        "each part",
        source="card: released code for the labels; the columns' names are suggested there",
    )
    cumulative: bool = param(
        True,
        "level c of a column shows its parts 1..c; false: part c alone, for a column that is a ladder of its own",
        source="card: paper",
    )
    warmup: float = param(
        0.15, "share of the optimizer steps without hints", source="card: paper, 0.10-0.40 about equal", ge=0, le=1
    )
    warmup_steps: int | None = param(
        None,
        "the same as a number of steps; none: warmup counts",
        source="card: released code, whose script has 50",
        ge=0,
    )
    reward: str | None = param(
        None,
        "reward function that says solved or not; none: the weighted sum (needed if there are several)",
        source="ours: the paper has one reward",
    )
    threshold: float = param(0.0, "solved when that reward is above this", source="card: paper")
    max_prompt_tokens: int | None = param(
        None,
        "levels whose prompt would be longer are left out; none: no limit (released code: 4096, its prompt limit)",
        source="ours: TRL has no prompt limit",
        ge=1,
    )
    replace_num: int = param(
        1,
        "completions that give way; 2: the second gets the hinted completion under the prompt without the hint",
        source="card: paper, code",
        ge=1,
        le=2,
    )
    replace_hint_prompt: bool = param(
        False,
        "train the hinted completion under the prompt without the hint, which is off-policy (the paper: it breaks "
        "training)",
        source="card: paper, code",
    )

    _kept: dict[str, bool] = field(default_factory=dict, init=False, repr=False, compare=False)

    # What it declares

    def cost(self) -> str:
        return "one more completion for each hint of each failed prompt, at most a rollout's at once; no extra forward"

    def check(self, setup: Setup) -> list[str]:
        problems = _column_problems(self.columns)
        generations = getattr(setup.args, "num_generations", None)
        if generations is not None and self.replace_num >= generations:
            problems.append(
                f"replace_num {self.replace_num} leaves none of the {generations} completions of a group; lower it or "
                "raise num_generations"
            )
        if self.replace_num == 2 and self.replace_hint_prompt:
            problems.append("replace_num 2 already keeps one prompt without hint; leave replace_hint_prompt false")
        problems += unread(self, {"warmup_steps: none": (self.warmup_steps is None, ("warmup",))})
        problems += parts_of_groups(setup, "a completion with a hint is scored by itself")
        return problems + reward_named(setup, self.reward, "reward", "says solved or not")

    # Rollout

    def revise(self, attempt: Attempt) -> Revision | None:
        self._check_rows(attempt.rows)
        before = attempt.reward(self.reward)
        stuck = failed(before, self.threshold)
        attempt.metrics.mean("failed_groups", stuck.sum())
        attempt.metrics.mean("unhinted_reward", before)
        steps = self.warmup * attempt.run.max_steps if self.warmup_steps is None else self.warmup_steps
        if not warmed_up(attempt.step, steps):
            return None
        prompts = torch.nonzero(stuck).flatten().tolist()
        trials = self._trials(attempt, prompts)
        samples = attempt.sample([trial.row for trial in trials])
        solved = attempt.reward(self.reward, samples.rewards) > self.threshold
        chosen = first_solved((trial.prompt for trial in trials), solved.tolist())
        _log(attempt.metrics, len(prompts), trials, chosen, samples.lengths)
        return self._revision({prompt: samples.ids[number] for prompt, number in chosen.items()})

    def _trials(self, attempt: Attempt, prompts: Sequence[int]) -> list[Trial]:
        """All levels of all these prompts that are short enough, prompt by prompt, in the order of the ladder."""
        trials = []
        for prompt in prompts:
            own = self._levels(prompt, attempt.rows[prompt])
            fit = [trial for trial in own if self._fits(attempt, trial)]
            attempt.metrics.mean("too_long", float(len(fit) < len(own)))
            attempt.metrics.mean("no_hint", float(not fit))
            trials += fit
        return trials

    def _levels(self, prompt: int, row: Mapping[str, Any]) -> list[Trial]:
        """All levels of one prompt. ValueError for hints or a prompt that do not go together with the settings."""
        try:
            rungs = ladder(row, self.columns, self.cumulative)
            return [Trial(prompt, rung, {**row, "prompt": hinted(row["prompt"], rung)}) for rung in rungs]
        except ValueError as error:
            raise ValueError(f"scaf_grpo: the row with the prompt {str(row['prompt'])[-200:]!r}: {error}") from error

    def _fits(self, attempt: Attempt, trial: Trial) -> bool:
        return self.max_prompt_tokens is None or attempt.prompt_tokens(trial.row) <= self.max_prompt_tokens

    def _check_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """From the first rollout on, not only once a prompt fails after the warm-up: ValueError for a row that cannot get
        its hints, and a warning, once, if the data has none of the columns (the run is plain GRPO then)."""
        for row in rows:
            self._levels(0, row)
        if not self._kept.get("warned") and not any(column in row for row in rows for column in self.columns):
            self._kept["warned"] = True
            warnings.warn(
                f"scaf_grpo: the data has no column of hints ({', '.join(self.columns)}), so this is plain GRPO; it has: "
                f"{', '.join(rows[0])}. Name them in columns: {{theirs: Hint}}",
                stacklevel=2,
            )

    def _revision(self, samples: Mapping[int, int]) -> Revision:
        """Prompt -> id of its hinted success: the first completions of each group give way."""
        places = range(self.replace_num)
        bare = places if self.replace_hint_prompt else range(1, self.replace_num)
        return Revision(
            {(prompt, place): found for prompt, found in samples.items() for place in places},
            helped=True,
            own_prompt=frozenset((prompt, place) for prompt in samples for place in bare),
        )


def _log(metrics: Metrics, failures: int, trials: Sequence[Trial], chosen: Mapping[int, int], lengths: Tensor) -> None:
    """What the hints did for `failures` prompts; `chosen`: prompt -> number of the trial in use."""
    metrics.mean("rescued", len(chosen))
    metrics.mean("extra_completions", len(trials))
    metrics.mean("extra_tokens", lengths.sum())
    metrics.mean("rescue_rate", len(chosen) / max(1, failures), failures)
    used = [trials[number].rung for number in chosen.values()]
    for label in dict.fromkeys(trial.rung.label for trial in trials):
        share = sum(rung.label == label for rung in used) / max(1, len(used))
        metrics.mean(f"tier_{re.sub('[^a-z0-9]+', '_', label.lower())}", share, len(used))
    for rung in used:
        metrics.mean("level", rung.number)


def _column_problems(columns: Mapping[str, Any]) -> list[str]:
    wrong = [
        f"columns: the label of '{column}' must be a text, or a list of texts (one for each part), not {label!r}"
        for column, label in columns.items()
        if not (
            isinstance(label, str) or (isinstance(label, list) and label and all(isinstance(x, str) for x in label))
        )
    ]
    return wrong if columns else ["columns: name at least one column of hints, e.g. columns: {hints: Hint}"]
