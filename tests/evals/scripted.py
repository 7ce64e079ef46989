"""A model whose accuracy is known: it gives each item's right answer with a set probability, drawn from the reply's seed."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.generation.hf import Job
from evals.generation.store import Reply, text_hash
from evals.models import Activity, Adapter, BaseSpec
from evals.run import Evaluation
from evals.runs import Plan
from evals.task import Item, Sampling, Task
from tests.evals.data import stand_ins
from tests.tiny import tiny_path


def right(task: Task, item: Item) -> str:
    """A reply that the task's grader accepts."""
    if task.kind == "math":
        return f"So it is \\boxed{{{item.gold}}}."
    if task.kind == "choice":
        return f"Answer: {item.gold}"
    return json.dumps(stand_ins.INSTANCE if item.gold is None else item.gold)


def wrong(task: Task, item: Item) -> str:
    """A well-formed wrong reply, or for a schema no JSON at all."""
    if task.kind == "math":
        return "So it is \\boxed{123456789}."
    if task.kind == "choice":
        return f"Answer: {'ABCD'[('ABCD'.index(item.gold) + 1) % 4]}"
    if isinstance(item.gold, dict) and "answer" in item.gold:
        return json.dumps({**item.gold, "answer": 123456789})
    return "I cannot say."


@dataclass
class Script:
    """Answers like a model of accuracy `accuracy`; `asked` counts what it was asked. After `dies_after` batches it is
    killed, as a process is.
    """

    items: Mapping[str, tuple[Task, Item]]
    accuracy: float
    asked: list[Job] = field(default_factory=list)
    dies_after: int | None = None
    salt: str = ""
    batch: int = 16

    def generate(self, jobs: Sequence[Job], sampling: Sampling) -> Iterator[list[Reply]]:
        for number, at in enumerate(range(0, len(jobs), self.batch)):
            if number == self.dies_after:
                raise KeyboardInterrupt
            part = jobs[at : at + self.batch]
            self.asked += part
            yield [self._reply(job, sampling) for job in part]

    def _reply(self, job: Job, sampling: Sampling) -> Reply:
        task, item = self.items[job.item]
        # Shared noise: a more able model is right wherever a less able one is, as with one underlying draw.
        draw = random.Random(f"{self.salt}/{sampling.seed}/{job.task}/{job.item}/{job.sample}").random()
        text = right(task, item) if draw < self.accuracy else wrong(task, item)
        return Reply(job.item, job.sample, text_hash(job.prompt), text, 7, "stop")


@dataclass
class ScriptedEngine:
    """`scripts`: None (the base) or an adapter's name -> its script."""

    scripts: Mapping[str | None, Script]
    spec: BaseSpec
    identity: dict[str, str]
    dtype: str = "float32"
    change: float = 1.0
    ends: list[int] = field(default_factory=lambda: [2])

    @contextlib.contextmanager
    def answering(self, adapter: Adapter | None, batch_size: int, constraint: Any = None) -> Iterator[Script]:
        yield self.scripts[None if adapter is None else adapter.name]

    def activity(self, adapter: Adapter, prompts: Sequence[str]) -> Activity:
        return Activity(self.change, self.change)


class Scripted(Evaluation):
    """An evaluation in which only the model is scripted."""

    engine: ScriptedEngine

    def _load(self, spec: BaseSpec, adapters: Sequence[Adapter]) -> ScriptedEngine:
        return self.engine


def plan(*names: str) -> Plan:
    """The tiny model as base, and adapters of these names."""
    base = BaseSpec(tiny_path(max_position_embeddings=100_000))
    adapters = tuple(Adapter(name, Path(name)) for name in names)
    return Plan("tiny", base, adapters, (), base.model, (), {})
