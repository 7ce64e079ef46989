"""The page's first section: all tasks in one table, how to read it, and the differences as a forest plot."""

from __future__ import annotations

from evals.report import svg, words
from evals.report.pieces import anchor, chip, ends, labels, notes, number, ranged, row, table
from evals.report.svg import element, escape
from evals.result import Result, TaskResult

VERDICTS = {"better": "up", "worse": "down"}


def overview(result: Result) -> str:
    """Table, reading, forest plot, notes."""
    compared = len(result.subjects) > 1
    generated = any(task.generated for task in result.tasks)
    parts = [
        element("h2", "All tasks", id="tasks"),
        _comparisons(result) if compared else _scores(result),
        element("p", escape(words.method(result)), kind="note") if result.tasks else "",
        element(
            "p",
            element("span", words.GENERATED, kind="label"),
            " A program wrote these questions: the score is not that of the benchmark they resemble.",
            kind="note",
        )
        if generated
        else "",
        _forest(result) if compared and result.tasks else "",
        notes(result.notes),
    ]
    return element("section", *parts, kind="first", aria_labelledby="tasks")


def _task_link(task: TaskResult) -> str:
    return element("a", escape(task.title), href=f"#{anchor(task)}") + labels(task)


def _scores(result: Result) -> str:
    if not result.tasks:
        return element("p", "No task was run.")
    body = []
    for task in result.tasks:
        found = task.scores[0].metrics[task.headline]
        chance = words.percent(task.chance)
        cells = [number(words.percent(found.mean)), number(f"{100 * found.low:.1f} to {100 * found.high:.1f}")]
        body.append([_task_link(task), *cells, number(f"{found.n:,} × {found.samples}"), number(chance)])
    return table("Scores of all tasks", ["Task", "Score", "95% interval", "Questions × replies", "Chance"], body)


def _comparisons(result: Result) -> str:
    """One row for each task and candidate."""
    several = len(result.subjects) > 2
    head = [
        "Task",
        *(["Candidate"] if several else []),
        "Base",
        "Candidate" if not several else "Score",
        "Difference",
        "p (Holm)",
        "Could have seen",
        "Verdict",
    ]
    body = []
    for found in words.rows(result):
        base, now = (found.task.scores[i].metrics[found.task.headline] for i in (0, found.index))
        paired = found.paired
        body.append(
            [
                _task_link(found.task),
                *([escape(found.versus.candidate)] if several else []),
                number(words.percent(base.mean)),
                number(words.percent(now.mean)),
                ranged(words.points(paired.comparison.difference), words.change(paired.comparison)),
                number(words.p_value(paired.p_holm)),
                number(words.detectable(paired.comparison)),
                chip(paired.verdict),
            ]
        )
    return table("Base and candidates on all tasks", head, body)


def _forest(result: Result) -> str:
    found = list(words.rows(result))
    span = svg.span_around_zero(v for row in found for v in (row.paired.comparison.low, row.paired.comparison.high))
    several = len(result.subjects) > 2
    parts = []
    for each in found:
        moved = each.paired.comparison
        name = f"{each.task.title}: {each.versus.candidate}" if several else each.task.title
        kind = VERDICTS.get(each.paired.verdict, "flat")
        plot = svg.interval_row(
            f"{name}: {words.change(moved)} points", moved.difference, moved.low, moved.high, span, kind, zero=True
        )
        parts.append(row(name, plot, words.points(moved.difference), words.change(moved)))
    edge = 100 * span.high
    heading = element("h3", "Difference to the base, points, with 95% intervals")
    return heading + element("div", *parts, ends(f"−{edge:.0f}", "0", f"+{edge:.0f}"), kind="rows")
