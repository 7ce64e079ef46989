"""From stored replies to a result: grades every reply, has lm-eval write its own numbers, and compares the subjects.

Nothing here needs a model, so a better grader, another split or a new page never costs a generation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from evals.analysis.tables import Graded
from evals.analysis.task import analyse
from evals.analysis.verdict import finish_result
from evals.data.build import fingerprint
from evals.generation.lm import Replies, StoredLM
from evals.generation.store import Reply, Store, StoreError
from evals.judging import best_of, judged
from evals.result import Result, Subject, TaskResult
from evals.session import Asked, Session
from evals.task import Item, Task
from evals.tasks import TASKS


@dataclasses.dataclass(frozen=True)
class Scored:
    """The report, and for each subject lm-eval's own result dictionary."""

    result: Result
    lm_eval: Mapping[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Answered:
    """One task with its items and, for each subject by name, its replies by (item, sample)."""

    task: Task
    asked: Asked
    items: Sequence[Item]
    replies: Mapping[str, Replies]
    control: Replies | None


def score(session: Session, tokenizer: Any = None, settings: Any = None) -> Scored:
    """Grades a session. With a tokenizer lm-eval's prompts are checked against those that were answered.

    Raises StoreError for missing replies or items that changed, DataError when a task's data cannot be had any more.
    """
    answered = [_answered(session, asked, TASKS[asked.task]) for asked in session.tasks]
    results = tuple(_analysed(session, one) for one in answered)
    lm_eval = {
        s.name: lm_eval_results(answered, s, tokenizer, settings, str(session.environment["backend"]))
        for s in session.subjects
    }
    result = finish_result(
        session.subjects,
        results,
        targets=session.targets,
        environment=session.environment,
        skipped=session.skipped,
        notes=session.notes,
        repeats=session.repeats,
        looks=session.looks,
    )
    return Scored(result, lm_eval)


def _answered(session: Session, asked: Asked, task: Task) -> Answered:
    items = task.load(asked.source)
    if asked.candidate_prompts is None and fingerprint(items) != asked.fingerprint:
        raise StoreError(
            f"{task.name}: its questions are not those that were answered (the data or its loader changed since), so "
            "the old replies cannot be graded; evaluate again"
        )
    items = [item for item in items if item.id in asked.prompts]
    names = [subject.name for subject in session.subjects]
    if len(set(names)) < len(names):
        raise StoreError(f"two subjects have one name: {', '.join(names)}")
    replies = {}
    for number, (name, about) in enumerate(zip(names, asked.abouts, strict=True)):
        other = asked.candidate_prompts if number else None
        own = asked if other is None else dataclasses.replace(asked, prompts=other)
        replies[name] = _replies(session.store, own, about)
    control = None if asked.control is None else _replies(session.store, asked, asked.control, asked.controlled)
    return Answered(task, asked, items, replies, control)


def _replies(
    folder: str, asked: Asked, about: Mapping[str, Any], only: Collection[str] | None = None
) -> dict[tuple[str, int], Reply]:
    found = Store(folder, about).read()
    items = asked.prompts if only is None else only
    wanted = [(item, sample) for item in items for sample in range(asked.sampling.samples)]
    missing = [name for name in wanted if (*name, asked.prompts[name[0]]) not in found]
    if missing:
        raise StoreError(
            f"{asked.task}: {len(missing)} of {len(wanted)} replies are not in {folder}; evaluate again, which asks for "
            "the missing ones only"
        )
    replies = {name: found[*name, asked.prompts[name[0]]] for name in wanted}
    if asked.thinking:  # the prompt opened the thought, which the graders must see
        replies = {name: dataclasses.replace(r, text=f"<think>{r.text}") for name, r in replies.items()}
    return replies


def graded(task: Task, items: Sequence[Item], replies: Replies, samples: int) -> dict[str, list[Graded]]:
    """item id -> a graded reply for each sample."""
    found: dict[str, list[Graded]] = {}
    for item in items:
        several = [replies[item.id, sample] for sample in range(samples)]
        found[item.id] = [
            Graded(task.grade(item, r.text), r.text, r.tokens, r.finish == "length", r.sample) for r in several
        ]
    return found


def _analysed(session: Session, one: Answered) -> TaskResult:
    samples = one.asked.sampling.samples
    tables = {name: graded(one.task, one.items, replies, samples) for name, replies in one.replies.items()}
    given = one.asked.sampling, one.asked.notes
    found = analyse(one.task, one.items, tables, session.subjects, *given)
    if session.judge is not None:
        found = _with_judge(found, session.judge, one, tables)
    if one.control is None:
        return found
    base, control = session.subjects[0], dataclasses.replace(session.subjects[0], name="grammar control")
    items = [item for item in one.items if item.id in one.asked.controlled]
    pair = {base.name: tables[base.name], control.name: graded(one.task, items, one.control, samples)}
    beside = analyse(one.task, items, pair, [base, control], *given)
    return dataclasses.replace(found, control=beside.scores[1], control_versus=beside.versus[0])


def _with_judge(found: TaskResult, name: str, one: Answered, tables: Mapping[str, Any]) -> TaskResult:
    from trl_ext.rewards import make_reward

    reward = make_reward(name)
    curves = {subject: judged(one.task, one.items, table, reward) for subject, table in tables.items()}
    words = [f"{subject} under {name}: {curve.words}" for subject, curve in curves.items() if curve is not None]
    best = tuple(None if curve is None else best_of(curve) for curve in curves.values())
    return dataclasses.replace(found, notes=(*found.notes, *words), best_of=best)


def lm_eval_results(
    answered: Sequence[Answered], subject: Subject, tokenizer: Any, settings: Any, backend: str
) -> dict[str, Any]:
    """What lm-eval's engine finds for one subject, from the same replies with the same graders, in its layout.

    Its `evaluate` is called, not `simple_evaluate`, which would spend half a second on listing installed packages.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    from evals.tasks.lm_eval import as_lm_eval

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it greets every task object with advice on its options
    objects = [as_lm_eval(one.task, one.items, one.asked.sampling.samples, one.asked.sampling) for one in answered]
    replies = {one.task.name: one.replies[subject.name] for one in answered}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        found = evaluate(
            lm=StoredLM(replies, tokenizer, settings),
            task_dict=TaskManager(include_defaults=False).load(objects),
            apply_chat_template=True,
            log_samples=False,
            bootstrap_iters=0,
        )
    assert found is not None, "lm-eval returns nothing on other ranks only, and it runs on one"
    return {**found, "config": config_of(subject, backend), "date": time.time()}


def config_of(subject: Subject, backend: str) -> dict[str, Any]:
    """lm-eval's `config`, as far as it holds here: the model and what it was loaded with."""
    arguments = {"pretrained": subject.model, "dtype": subject.dtype}
    arguments |= {"peft": subject.adapter} if subject.adapter else {}
    arguments |= {"quantization": subject.quantization} if subject.quantization else {}
    return {"model": backend, "model_args": arguments, "model_dtype": subject.dtype, "bootstrap_iters": 0}
