"""Base against candidate for two runs that other tools made, paired by document and prompt, never by position."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evals.analysis.task import oriented
from evals.compare import Mismatch
from evals.imports import ForeignRun, ImportProblem, read_runs
from evals.result import Paired
from evals.statistics.multiple import holm
from evals.stats import ALPHA, Scores, compare, fixed_interval
from evals.task import Metric


@dataclass(frozen=True)
class ForeignComparison:
    """One task: the comparison, what was left out, which settings differ, and all of it in words.

    `dropped`: questions that only one of the runs has, (first, second).
    """

    task: str
    metric: str
    paired: Paired
    dropped: tuple[int, int]
    mismatches: tuple[str, ...]
    words: str


def compare_files(
    a: str | Path,
    b: str | Path,
    metric: str | None = None,
    choice: str | None = None,
    allow_mismatch: bool = False,
) -> list[ForeignComparison]:
    """Every task that both runs have: base `a`, candidate `b`, files or folders. Holm over these tasks.

    Questions are paired by document hash; where their prompt hashes differ the runs were asked different things, which
    is a `Mismatch`, as are other settings in lm-eval's results file. `allow_mismatch` compares anyway and says so; pairs
    with differing prompts are then kept. Raises ImportProblem when the runs share no task, or a task fewer than two
    questions.
    """
    first = {run.task: run for run in read_runs(a, metric, choice)}
    second = {run.task: run for run in read_runs(b, metric, choice)}
    shared = [task for task in first if task in second]
    if not shared:
        raise ImportProblem(f"no task in common: {', '.join(first)} in {a}, {', '.join(second)} in {b}")
    mismatches = {task: _mismatches(first[task], second[task]) for task in shared}
    found = [f"{task}: {reason}" for task in shared for reason in mismatches[task]]
    if found and not allow_mismatch:
        raise Mismatch(found)
    tables = [_tables(first[task], second[task]) for task in shared]
    comparisons = [compare(before, after) for before, after in tables]
    adjusted = holm([found.p for found in comparisons])
    made = []
    for task, table, comparison, p in zip(shared, tables, comparisons, adjusted, strict=True):
        reading = Metric("", higher_is_better=_higher(first[task]))
        verdict = oriented(comparison, reading) if p < ALPHA else "no evidence"
        paired = Paired(comparison, verdict, p, fixed_interval(*table))
        made.append(_made(first[task], second[task], paired, tuple(mismatches[task])))
    return made


def _higher(run: ForeignRun) -> bool:
    """As lm-eval's results file says; better when higher where there is none."""
    return bool((run.settings.get("higher_is_better") or {}).get(run.metric, True))


def _mismatches(a: ForeignRun, b: ForeignRun) -> list[str]:
    found = [f"metric: {a.metric} against {b.metric}"] if a.metric != b.metric else []
    names = sorted(set(a.settings) & set(b.settings))
    found += [f"{n}: {a.settings[n]} against {b.settings[n]}" for n in names if a.settings[n] != b.settings[n]]
    changed = sum(a.rows[d].prompt != b.rows[d].prompt for d in a.rows if d in b.rows)
    return found + ([f"prompts: {changed} of the shared questions were asked in other words"] if changed else [])


def _tables(a: ForeignRun, b: ForeignRun) -> tuple[Scores, Scores]:
    shared = [document for document in a.rows if document in b.rows]
    if len(shared) < 2:
        raise ImportProblem(
            f"task {a.task}: {a.path} and {b.path} share {len(shared)} questions; at least 2 are needed"
        )
    return [a.rows[document].scores for document in shared], [b.rows[document].scores for document in shared]


def _made(a: ForeignRun, b: ForeignRun, paired: Paired, mismatches: tuple[str, ...]) -> ForeignComparison:
    found, shared = paired.comparison, sum(document in b.rows for document in a.rows)
    dropped = len(a.rows) - shared, len(b.rows) - shared
    words = (
        f"{a.task} ({a.metric}): {paired.verdict}, {100 * found.difference:+.1f} points "
        f"[{100 * found.low:.1f}, {100 * found.high:.1f}] on {found.n} questions, p (Holm) {paired.p_holm:.3f}, "
        f"{found.wins} won, {found.losses} lost, {found.ties} equal; could have seen {100 * found.detectable:.1f} points."
    )
    if any(dropped):
        words += (
            f" Left out: {dropped[0]} questions that only the first run has, {dropped[1]} that only the second has."
        )
    if mismatches:
        words += f" Not the same settings: {'; '.join(mismatches)}."
    return ForeignComparison(a.task, a.metric, paired, dropped, mismatches, words)
