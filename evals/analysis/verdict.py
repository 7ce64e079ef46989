"""From the results of all tasks to the sentence at the top: what may be said, after all that was compared."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from evals.analysis.split import split_words
from evals.analysis.tables import clusters
from evals.result import Curve, Paired, Result, Skipped, Spread, Subject, TaskResult, Versus
from evals.statistics.multiple import band, holm, spread
from evals.statistics.planning import variances_of_means
from evals.statistics.quantiles import t_quantile
from evals.statistics.sequential import information_fraction, look_levels
from evals.stats import ALPHA, Comparison, compare, estimate, question_scores, standard_error
from evals.task import Item

AIME = ("aime24", "aime25")
"""Two years of one competition: the older one may be in training data (arXiv 2505.23281)."""


def finish_result(
    subjects: Sequence[Subject],
    tasks: Sequence[TaskResult],
    environment: Mapping[str, Any],
    skipped: Sequence[Skipped] = (),
    targets: Collection[str] = (),
    notes: Sequence[str] = (),
    repeats: bool = True,
    looks: Sequence[int] = (),
) -> Result:
    """Holm over the headlines of all tasks and candidates, verdicts in words, spread over training runs, checkpoints,
    the guard against forgetting (`targets`: names of the tasks that were trained for; none: no guard) and notes.
    `repeats`: whether the candidates are training runs of one recipe, without which a spread over them says nothing.
    `looks`: the numbers of samples at which these replies are or will be looked at, the planned total last; none: once.

    Raises ValueError for a target that was not evaluated and not skipped.
    """
    unknown = set(targets) - {task.name for task in tasks} - {skip.name for skip in skipped}
    if unknown:
        raise ValueError(f"targets {sorted(unknown)} are not among the tasks {[task.name for task in tasks]}")
    judged = adjusted(tasks, looks)
    return Result(
        subjects=tuple(subjects),
        tasks=judged,
        verdict=tuple(sentence(subject.name, judged) for subject in subjects[1:]),
        environment=environment,
        skipped=tuple(skipped),
        spread=training_spread(subjects, judged) if repeats else (),
        guard=guard(subjects, judged, targets),
        notes=(
            *notes,
            *aime_gap(subjects, judged),
            *aime_pooled(subjects, judged),
            *checkpoint_notes(subjects, judged),
        ),
    )


def adjusted(tasks: Sequence[TaskResult], looks: Sequence[int] = ()) -> tuple[TaskResult, ...]:
    """The tasks with `p_holm`, and verdicts that use it, in their headlines; a look before the last is judged strictly."""
    p_values = iter(holm([v.metrics[task.headline].comparison.p for task in tasks for v in task.versus]))
    return tuple(
        _looked_at(
            replace(
                task,
                versus=tuple(
                    _with_holm(v, task.headline, next(p_values), look_level(task, i, looks))
                    for i, v in enumerate(task.versus, 1)
                ),
            ),
            looks,
        )
        for task in tasks
    )


def look_level(task: TaskResult, index: int, looks: Sequence[int]) -> float:
    """The p below which candidate `index` counts at this look: all looks together err in 5 %. The information at each
    look follows from the task's own scores; `ALPHA` without looks, or where no question differs.
    """
    samples = int(task.sampling["samples"])
    if not looks or task.samples < 2:
        return ALPHA
    before, after = ([shown.scores[i] for shown in task.questions] for i in (0, index))
    found = variances_of_means(before, after, task.samples)
    if found.within == 0:
        return ALPHA  # more replies say nothing new
    fractions = {information_fraction(found.between, found.within, k, looks[-1]) for k in looks if k <= samples}
    return look_levels(sorted(fractions))[-1]


def _looked_at(task: TaskResult, looks: Sequence[int]) -> TaskResult:
    if not looks:
        return task
    levels = ", ".join(f"{v.candidate} p < {look_level(task, i, looks):.2g}" for i, v in enumerate(task.versus, 1))
    now, total = sum(k <= int(task.sampling["samples"]) for k in looks), len(looks)
    note = f"Look {now} of {total} ({', '.join(map(str, looks))} samples): better or worse needs {levels}."
    return replace(task, notes=(*task.notes, note))


def _with_holm(versus: Versus, headline: str, p: float, level: float) -> Versus:
    paired = versus.metrics[headline]
    verdict = paired.comparison.verdict if p < level else "no evidence"
    metrics = dict(versus.metrics) | {headline: replace(paired, p_holm=p, verdict=verdict)}
    split = versus.split
    if split is not None:
        split = replace(split, words=split_words(split.base, split.candidate, verdict != "no evidence"))
    return replace(versus, metrics=metrics, split=split)


def headline(task: TaskResult, candidate: str) -> Paired:
    """A candidate's comparison on the task's headline."""
    return next(v.metrics[task.headline] for v in task.versus if v.candidate == candidate)


def sentence(candidate: str, tasks: Sequence[TaskResult]) -> str:
    """ "name: better on x: +12.3 points [8.1, 16.5], p (Holm) = 0.002; no evidence on y (could have seen 9.0 points)"."""
    order = {"better": 0, "worse": 1, "no evidence": 2}
    found = sorted(((headline(task, candidate), task) for task in tasks), key=lambda pair: order[pair[0].verdict])
    clauses = [_clause(paired, task.name) for paired, task in found if paired.verdict != "no evidence"]
    unseen: dict[str, list[str]] = {}
    for paired, task in found:
        if paired.verdict == "no evidence":
            unseen.setdefault(_seen(paired.comparison), []).append(task.name)
    clauses += [f"no evidence on {', '.join(names)} ({why})" for why, names in unseen.items()]
    return f"{candidate}: {'; '.join(clauses)}"


def _clause(paired: Paired, task: str) -> str:
    return f"{paired.verdict} on {task}: {_points(paired.comparison)}, p (Holm) {_p(paired.p_holm)}"


def _seen(found: Comparison) -> str:
    if found.detectable == 0:
        return "no question changed" if found.ties == found.n else "too few questions"
    return f"could have seen {100 * found.detectable:.1f} points"


def _points(found: Comparison) -> str:
    return f"{100 * found.difference:+.1f} points [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _p(p: float | None) -> str:
    assert p is not None
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def training_spread(subjects: Sequence[Subject], tasks: Sequence[TaskResult]) -> tuple[Spread, ...]:
    """For each task the gains of the adapters that are no checkpoints, if two or more; only the caller knows whether they
    come from one recipe.
    """
    runs = [subject.name for subject in subjects[1:] if subject.adapter is not None and subject.step is None]
    if len(runs) < 2:
        return ()
    gains = {task.name: tuple(headline(task, run).comparison.difference for run in runs) for task in tasks}
    return tuple(Spread(task, values, *spread(values)) for task, values in gains.items())


def guard(subjects: Sequence[Subject], tasks: Sequence[TaskResult], targets: Collection[str]) -> str | None:
    """What happened beside the targets: losses named, otherwise the largest loss that could have gone unseen."""
    others = [task for task in tasks if task.name not in targets]
    if not targets or not others or len(subjects) < 2:
        return None
    return " ".join(_guard(subject.name, others) for subject in subjects[1:])


def _guard(candidate: str, others: Sequence[TaskResult]) -> str:
    found = [(headline(task, candidate), task.name) for task in others]
    lost = [f"{name} {_points(paired.comparison)}" for paired, name in found if paired.verdict == "worse"]
    if lost:
        return f"{candidate} lost beside its target: {'; '.join(lost)}."
    blind, where = max((paired.comparison.detectable, name) for paired, name in found)
    return (
        f"{candidate}: no loss seen beside the target on {', '.join(name for _, name in found)} "
        f"(could have seen {100 * blind:.1f} points on {where})."
    )


def aime_gap(subjects: Sequence[Subject], tasks: Sequence[TaskResult]) -> list[str]:
    """AIME 2024 minus AIME 2025 of every subject, with a 95 % interval for two independent sets of questions (t with the
    smaller set's degrees of freedom). Both years are meant to be equally hard.
    """
    years = [next((task for task in tasks if task.name == name and not task.generated), None) for name in AIME]
    if years[0] is None or years[1] is None:
        return []
    lines = []
    for i, subject in enumerate(subjects):
        old, new = (question_scores([shown.scores[i] for shown in year.questions])[:, 0] for year in years if year)
        gap = float(old.mean() - new.mean())
        half = t_quantile(min(len(old), len(new)) - 1) * math.hypot(standard_error(old), standard_error(new))
        signal = "; it may have seen AIME 2024" if gap - half > 0 else ""
        lines.append(
            f"{subject.name}: AIME 2024 minus AIME 2025 is {100 * gap:+.1f} points "
            f"[{100 * (gap - half):.1f}, {100 * (gap + half):.1f}]{signal}."
        )
    return lines


def aime_pooled(subjects: Sequence[Subject], tasks: Sequence[TaskResult]) -> list[str]:
    """Both years as one set of questions, for more of them: every subject's mean, and each candidate's difference."""
    years = [task for task in tasks if task.name in AIME and not task.generated]
    if len(years) < 2:
        return []
    questions = [shown for year in years for shown in year.questions]
    columns = [[shown.scores[i] for shown in questions] for i in range(len(subjects))]
    lines = []
    for subject, column in zip(subjects, columns, strict=True):
        found = estimate(column)
        words = f"{subject.name}: AIME 2024 and 2025 pooled, {found.n} questions: {100 * found.mean:.1f}%"
        if subject is not subjects[0]:
            words += f", {_points(compare(columns[0], column))}"
        lines.append(f"{words}.")
    return lines


def checkpoint_curve(subjects: Sequence[Subject], task: TaskResult) -> Curve | None:
    """Headline minus the base's at each training step, with a 95 % band that holds for all steps at once.

    `Curve.k` holds the steps. None for fewer than two checkpoints, or two of one step: those are not one run's.
    """
    steps = sorted((s.step, i) for i, s in enumerate(subjects) if i and s.step is not None)
    if len(steps) < 2 or len({step for step, _ in steps}) < len(steps):
        return None
    scores = np.array([shown.scores for shown in task.questions])
    differences = np.stack([scores[:, i] - scores[:, 0] for _, i in steps])
    questions = [Item(s.id, s.id, (), None, group=s.group) for s in task.questions]
    low, high = band(differences, groups=clusters(questions, task.generated)[0])
    means = [headline(task, subjects[i].name).comparison.difference for _, i in steps]
    return Curve(tuple(step for step, _ in steps), tuple(means), tuple(low.tolist()), tuple(high.tolist()))


def checkpoint_notes(subjects: Sequence[Subject], tasks: Sequence[TaskResult]) -> list[str]:
    """The checkpoints' curves in words, a line for each task."""
    lines = []
    for task in tasks:
        curve = checkpoint_curve(subjects, task)
        if curve is not None:
            steps = [
                f"step {step:,} {100 * mean:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"
                for step, mean, low, high in zip(curve.k, curve.mean, curve.low, curve.high, strict=True)
            ]
            lines.append(f"{task.name} by checkpoint, points above the base, all at once at 95%: {', '.join(steps)}.")
    return lines
