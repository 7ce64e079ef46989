"""From graded replies to what a report says about one task. Pure: a better grader needs no new replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from evals.analysis.breakdown import letter_note, parts, shown
from evals.analysis.split import split_change
from evals.analysis.tables import Graded, Table, build_tables, clusters, vote, weighted_mean
from evals.result import Paired, Scores, Split, Subject, TaskResult, Versus
from evals.statistics.curves import g_pass_at_k, majority, pass_curve
from evals.statistics.ratio import compare_ratio, estimate_ratio
from evals.stats import Comparison, Estimate, compare, estimate, fixed_interval
from evals.task import Item, Metric, Sampling, Task

TRUNCATED = 0.05
"""Share of replies at the token limit above which the reader is told."""

RELIABLE = 8
"""Replies to a question from which G-Pass is reported."""

Groups = Sequence[str] | None


def analyse(
    task: Task,
    items: Sequence[Item],
    graded: Mapping[str, Mapping[str, Sequence[Graded]]],
    subjects: Sequence[Subject],
    sampling: Sampling,
    notes: Sequence[str] = (),
) -> TaskResult:
    """Scores of every subject, and every other subject against `subjects[0]`, on the same questions and replies.

    A gated task's prompts, golds and replies are left out. `graded`: subject
    name -> item id -> its replies. Holm's p and the verdicts that use it come later, in
    `verdict.finish_result`, which sees all tasks. A ratio without denominators is left out and noted. Raises ValueError
    for replies that are missing, in unequal numbers, or without a score of the task; and for a headline that is a ratio
    or better when lower.
    """
    metric = task.metrics[task.headline]
    if metric.ratio is not None or not metric.higher_is_better:
        raise ValueError(f"task {task.name}: the headline must be a mean that is better when higher")
    names = [subject.name for subject in subjects]
    tables = build_tables(items, graded, names)
    groups, cluster_note = clusters(tables[0].firsts, task.generated)
    metrics = _with_content(task, tables)
    voting = any(reply.grade.answer is not None for table in tables for _, reply in table.flat)
    remarks = [
        task.memorable,
        cluster_note,
        *_truncation(tables, names, sampling),
        *_undivided(metrics, tables, names),
    ]
    if task.kind == "choice":
        remarks.append(letter_note(tables, names))
    remarks.append(_reliability(task, tables, names))
    return TaskResult(
        name=task.name,
        title=task.title,
        kind=task.kind,
        generated=task.generated,
        gated=task.gated,
        version=task.version,
        origin=task.origin,
        headline=task.headline,
        metrics={name: metric.doc for name, metric in metrics.items()},
        sampling=asdict(sampling),
        samples=len(tables[0].cells[0]),
        chance=task.chance,
        scores=tuple(subject_scores(task, metrics, table, groups, voting) for table in tables),
        versus=tuple(
            versus(task, metrics, name, tables[0], table, groups)
            for name, table in zip(names[1:], tables[1:], strict=True)
        ),
        parts=parts(task, tables),
        questions=shown(task, tables, not task.gated),
        notes=(*notes, *(remark for remark in remarks if remark)),
    )


def _reliability(task: Task, tables: Sequence[Table], names: Sequence[str]) -> str | None:
    """G-Pass at half of the replies: how often at least half of K/2 drawn replies are right. From `RELIABLE` replies on."""
    scores = [table.scores(task.headline) for table in tables]
    replies = scores[0].shape[1]
    if replies < RELIABLE or not all(np.isin(s, (0, 1)).all() for s in scores):
        return None
    k = replies // 2
    shares = [np.mean([g_pass_at_k(int(right), replies, k, 0.5) for right in s.sum(1)]) for s in scores]
    found = ", ".join(f"{name} {share:.1%}" for name, share in zip(names, shares, strict=True))
    return f"G-Pass@{k}, at least half of {k} replies right: {found}."


def _with_content(task: Task, tables: Sequence[Table]) -> dict[str, Metric]:
    """The task's metrics, and the content factor, headline given format, as one more ratio: so that it gets an interval."""
    metrics = dict(task.metrics)
    if task.format_metric != task.headline and all(len(np.unique(t.scores(task.format_metric))) <= 2 for t in tables):
        name = f"{task.headline} given {task.format_metric}"
        metrics[name] = Metric(
            f"{task.headline} among the replies that pass {task.format_metric}",
            ratio=(task.headline, task.format_metric),
        )
    return metrics


def _counts(table: Table, metric: Metric) -> tuple[np.ndarray, np.ndarray] | None:
    """Numerators and denominators of a ratio, None where there is nothing to divide by."""
    assert metric.ratio is not None
    part, whole = (table.scores(name) for name in metric.ratio)
    return (part, whole) if whole.sum() else None


def _undivided(metrics: Mapping[str, Metric], tables: Sequence[Table], names: Sequence[str]) -> list[str]:
    return [
        f"{name}: unknown for {subject}, nothing to divide by ({metric.ratio[1]} is 0 in all replies)."
        for name, metric in metrics.items()
        if metric.ratio
        for subject, table in zip(names, tables, strict=True)
        if _counts(table, metric) is None
    ]


def _truncation(tables: Sequence[Table], names: Sequence[str], sampling: Sampling) -> list[str]:
    shares = {name: _share([r.truncated for _, r in table.flat]) for name, table in zip(names, tables, strict=True)}
    return [
        f"{name}: {share:.0%} of replies hit the limit of {sampling.max_new_tokens:,} tokens; a longer limit may change "
        "the score."
        for name, share in shares.items()
        if share > TRUNCATED
    ]


def _share(flags: Sequence[bool]) -> float:
    return float(np.mean(flags))


def subject_scores(
    task: Task, metrics: Mapping[str, Metric], table: Table, groups: Groups, voting: bool = True
) -> Scores:
    """One subject's numbers. Without any vote in the whole task (`voting`), a reply has no answer when its format fails.

    Right means a headline score of 1.
    """
    headline = table.scores(task.headline)
    replies = [reply for _, reply in table.flat]
    lengths = np.array([reply.tokens for reply in replies])
    right = headline.ravel() == 1
    silent = [r.grade.answer is None if voting else r.grade.scores[task.format_metric] == 0 for r in replies]
    binary = bool(np.isin(headline, (0, 1)).all())
    return Scores(
        metrics={name: found for name in metrics if (found := _estimate(metrics[name], name, table, groups))},
        truncated=_share([reply.truncated for reply in replies]),
        no_answer=_share(silent),
        lengths=tuple(lengths.tolist()),
        tokens_right=float(lengths[right].mean()) if right.any() else None,
        tokens_wrong=float(lengths[~right].mean()) if not right.all() else None,
        majority=_majority(table, headline, groups) if voting else None,
        pass_at=pass_curve(headline, groups) if binary else None,
    )


def _estimate(metric: Metric, name: str, table: Table, groups: Groups) -> Estimate | None:
    if metric.ratio is None:
        return estimate(table.scores(name), groups)
    counts = _counts(table, metric)
    return None if counts is None else estimate_ratio(*counts, groups)


def _majority(table: Table, headline: np.ndarray, groups: Groups) -> Estimate:
    votes = [[vote(*cell) for cell in row] for row in table.cells]
    return estimate([majority(row, headline[i].tolist()) for i, row in enumerate(votes)], groups)


def versus(
    task: Task, metrics: Mapping[str, Metric], name: str, base: Table, candidate: Table, groups: Groups
) -> Versus:
    """One candidate against the base on all metrics, and its headline split into format and content."""
    pairs = {name: found for name in metrics if (found := _paired(metrics[name], name, base, candidate, groups))}
    split = None
    if task.format_metric != task.headline:
        split = _split(task, base, candidate, groups, pairs[task.headline].verdict != "no evidence")
    return Versus(name, pairs, split)


def _paired(metric: Metric, name: str, base: Table, candidate: Table, groups: Groups) -> Paired | None:
    if metric.ratio is None:
        before, after = base.scores(name), candidate.scores(name)
        found = compare(before, after, groups=groups)
        return Paired(found, oriented(found, metric), fixed=fixed_interval(before, after, groups))
    first, second = _counts(base, metric), _counts(candidate, metric)
    if first is None or second is None:
        return None
    found = compare_ratio(first, second, groups=groups)
    return Paired(found, oriented(found, metric))


def oriented(found: Comparison, metric: Metric) -> str:
    """The comparison's verdict, turned round for a metric that is better when lower."""
    if metric.higher_is_better:
        return found.verdict
    return {"better": "worse", "worse": "better"}.get(found.verdict, found.verdict)


def _split(task: Task, base: Table, candidate: Table, groups: Groups, real: bool) -> Split:
    sides = [
        (
            weighted_mean(table.scores(task.format_metric).mean(1), groups),
            weighted_mean(table.scores(task.headline).mean(1), groups),
        )
        for table in (base, candidate)
    ]
    return split_change(sides[0], sides[1], real)
