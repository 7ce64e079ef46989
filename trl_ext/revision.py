"""Second attempts within a rollout (hook `Method.revise`): extra completions are made and scored, and some swapped in.

TRL generates, then scores. Here the scores are taken right after generation, so that a method can look at them, ask for
more completions and replace some; TRL goes on with what is left as if it had generated that, so old and reference
log-probs are those of the new prompts. Every process sees the whole rollout and decides alike; extra completions are
shared out evenly, and each reaches the process that owns its place.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from trl_ext.base import MethodTrainer
from trl_ext.batch import replaced
from trl_ext.method import Attempt, Revision, Samples

_PER_ROW = 5
"""TRL's `_generate` returns prompt ids, completion ids, tool mask, completions and log-probs by row, None where there
are none; then extra fields, images and the tools' images."""


@dataclasses.dataclass
class Prompts:
    """What a rollout was asked: this process's rows, and which rows of the training set a method drew (P,).

    `discarded` (row of the training set, rewards (G, F)) of each group that was replaced. `unhelped`: the
    rewards (P, G, F) of what is trained on, and where that had help, of what it replaced; `before` (world * rows, F):
    the same, if anything had help.
    """

    rows: list[dict[str, Any]]
    drawn: Tensor | None
    discarded: list[tuple[int, Tensor]] = dataclasses.field(default_factory=list)
    before: Tensor | None = None
    unhelped: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion: its training row and where that was drawn (-1: not drawn), TRL's values, and rewards (F,)."""

    row: dict[str, Any]
    drawn: int
    values: tuple[Any, ...]
    rewards: Tensor


class Revisions(MethodTrainer):
    """Mixin in front of TRL's GRPOTrainer, behind `RolloutHooks`."""

    _prompts: Prompts | None = None
    _known_rewards: Tensor | None = None

    # Set by TRL's trainer, or by RolloutHooks
    _async_tool_dicts: Any
    _draw: Any
    _sync_tool_dicts: Any
    reward_func_names: list[str]
    reward_weights: Tensor
    tools: Any

    def _generate(self, prompts: list[Any]) -> Any:
        output = super()._generate(prompts)  # type: ignore[misc]
        if self._prompts is None or not self.plan.using("revise"):
            return output
        work = _Revising(self, self._prompts, prompts, output)
        for method in self.plan.using("revise"):
            revision = method.revise(work.attempt().for_method(method.name))
            if revision is not None:
                work.swap(revision)
        self._known_rewards = work.rewards.flatten(0, 1)
        self._prompts.unhelped = work.unhelped
        self._prompts.before = work.unhelped.flatten(0, 1) if work.helped else None
        return work.output

    def _calculate_rewards(self, *args: Any) -> Tensor:
        """TRL's; after a revision the scores are known, and the reward functions are not asked again."""
        if self._known_rewards is not None:
            found, self._known_rewards = self._known_rewards, None
            return found
        return super()._calculate_rewards(*args)  # type: ignore[misc]

    def _made(self, rows: Sequence[dict[str, Any]]) -> tuple[list[tuple[Any, ...]], Tensor]:
        """One completion for each row on this process: TRL's values by row, and rewards (world * n, F)."""
        prompts = [row["prompt"] for row in rows]
        # what reward functions log belongs to the rows that stay
        tools: dict[str, Any] = {
            name: collections.defaultdict(list) for name in ("_pending_extra_logs", "_pending_metrics")
        }
        if self.tools:
            for name in ("_sync_tool_dicts", "_async_tool_dicts"):
                tools[name] = getattr(self, name)[:1] * len(rows)
        # TRL's numbers about completions and tools go on describing the rollout
        logged = self._metrics["train"]
        kept = {key: list(values) for key, values in logged.items() if key.startswith(("completions/", "tools/"))}
        with replaced(self, num_generations=1, **tools):
            output = super()._generate(prompts)  # type: ignore[misc]
            logged.update(kept)
            rewards = self._scored_now(list(rows), prompts, output)
        return _by_row(output), rewards

    def _scored_now(self, rows: Sequence[dict[str, Any]], prompts: list[Any], output: Any) -> Tensor:
        """(world * rows, F) from TRL's reward functions; `output` as `_generate` returns it."""
        return super()._calculate_rewards(rows, prompts, output[3], output[1])  # type: ignore[misc]


def _generated(values: tuple[Any, ...]) -> int:
    """Tokens of a completion that the model made: those of its tool mask, if there is one."""
    return len(values[1]) if values[2] is None else sum(values[2])


def _by_row(output: Sequence[Any]) -> list[tuple[Any, ...]]:
    lists = [[None] * len(output[0]) if values is None else values for values in output[:_PER_ROW]]
    return list(zip(*lists, strict=True))


class _Revising:
    """A rollout while methods revise it; `rewards` (P, G, F) of all processes, the lists of TRL's `output` of this one."""

    def __init__(self, trainer: Any, asked: Prompts, prompts: list[Any], output: Any) -> None:
        self.trainer, self.asked, self.prompts, self.output = trainer, asked, prompts, output
        self.group = trainer.args.num_generations
        self.first = trainer.accelerator.process_index * len(asked.rows)
        scored = trainer._scored_now(asked.rows, prompts, output)
        self.rewards: Tensor = scored.view(-1, self.group, scored.size(1)).clone()
        self.helped = False
        self.unhelped = self.rewards.clone()
        self.rows: list[dict[str, Any]] = gather_object(list(asked.rows))[:: self.group]
        self.samples: list[Sample] = []
        self.fresh_rows: dict[
            int, tuple[int, Any]
        ] = {}  # id of a row that `fresh` gave -> where it was drawn; the row

    def attempt(self) -> Attempt:
        trainer = self.trainer
        return Attempt(
            rows=tuple(self.rows),
            rewards=self.rewards.clone(),
            reward_names=trainer.reward_func_names,
            reward_weights=trainer.reward_weights.to(self.rewards.device),
            step=trainer.state.global_step,
            run=trainer._run_shape(),
            seed=trainer.args.seed,
            metrics=trainer._metrics_store(),
            sample=self.sample,
            fresh=self.fresh,
            prompt_tokens=lambda row: len(trainer._tokenize_prompts([row["prompt"]])[0][0]),
        )

    def fresh(self, count: int, number: int) -> list[dict[str, Any]]:
        rows, drawn = self.trainer._draw(count, number)
        where = [-1] * count if drawn is None else drawn.tolist()
        self.fresh_rows |= {id(row): (place, row) for row, place in zip(rows, where, strict=True)}
        return rows

    def sample(self, rows: Sequence[Mapping[str, Any]]) -> Samples:
        """Every process makes the same number, the last ones again where they do not share out evenly."""
        if not rows:
            none = self.rewards.new_zeros(0, self.rewards.size(-1))
            return Samples([], none, torch.zeros(0, dtype=torch.long, device=none.device))
        processes = self.trainer.accelerator.num_processes
        each = -(-len(rows) // processes)
        shared = [dict(rows[min(i, len(rows) - 1)]) for i in range(each * processes)]
        mine = self.trainer.accelerator.process_index * each
        at_once = len(self.asked.rows)  # no more than the rollout itself had, which fits in memory
        parts = [
            self.trainer._made(shared[mine + start : mine + min(start + at_once, each)])
            for start in range(0, each, at_once)
        ]
        values = gather_object([value for found, _ in parts for value in found])
        rewards = torch.cat([scores.view(processes, -1, scores.size(-1)) for _, scores in parts], 1).flatten(0, 1)
        first = len(self.samples)
        for row, found, scores in zip(rows, values, rewards, strict=False):
            self.samples.append(Sample(dict(row), self.fresh_rows.get(id(row), (-1, row))[0], found, scores))
        lengths = [_generated(found) for found in values[: len(rows)]]
        return Samples(
            range(first, first + len(rows)), rewards[: len(rows)], torch.tensor(lengths, device=rewards.device)
        )

    def swap(self, revision: Revision) -> None:
        """Puts samples in their places, in the lists that TRL holds."""
        self.helped |= revision.helped and bool(revision.swaps)
        for group in {group for group, _ in revision.swaps}:
            places = [place for own, place in revision.swaps if own == group]
            if len(places) == self.group:
                self._discard(group, self.samples[revision.swaps[group, places[0]]])
        for made in revision.unused:
            samples = [self.samples[number] for number in made]
            if self.asked.drawn is not None and samples[0].drawn >= 0:
                self.asked.discarded.append((samples[0].drawn, torch.stack([sample.rewards for sample in samples])))
        for (group, place), number in revision.swaps.items():
            sample = self.samples[number]
            self.rewards[group, place] = sample.rewards
            if not revision.helped:
                self.unhelped[group, place] = sample.rewards
            row = group * self.group + place - self.first
            if 0 <= row < len(self.asked.rows):
                skipped = 0
                if (group, place) in revision.own_prompt:
                    skipped = 1  # the ids of the prompt
                else:
                    self.asked.rows[row], self.prompts[row] = sample.row, sample.row["prompt"]
                for values, value in zip(self.output[skipped:_PER_ROW], sample.values[skipped:], strict=True):
                    if values is not None:
                        values[row] = value

    def _discard(self, group: int, sample: Sample) -> None:
        drawn = self.asked.drawn
        if drawn is not None:
            self.asked.discarded.append((int(drawn[group]), self.unhelped[group].clone()))
            drawn[group] = sample.drawn
        self.rows[group] = sample.row
