"""The report as one HTML page: verdict, table, a section for each task, environment. No script, nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evals.report import charts, svg, words
from evals.report.clean import publishable
from evals.report.html_overview import overview
from evals.report.html_task import section
from evals.report.pieces import key, row, table
from evals.report.style import CSS
from evals.report.svg import element, escape
from evals.result import Result


def page(result: Result, title: str) -> str:
    """One self-contained page without script, encodable as UTF-8; foreign text is escaped, gated text left out."""
    result = publishable(result)
    body = [
        element("h1", escape(title)),
        _verdict(result),
        overview(result),
        *(section(result, task) for task in result.tasks),
        _training(result),
        _beside(result),
        _environment(result),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _verdict(result: Result) -> str:
    lines = []
    index = {subject.name: i for i, subject in enumerate(result.subjects)}
    for name, sentence in words.verdicts(result):
        who = element("span", escape(name), kind=f"who {svg.colour(index[name])}") if name else ""
        lines.append(element("p", who, escape(sentence), kind="verdict"))
    return "\n".join(lines)


def _training(result: Result) -> str:
    """Spread over training runs, and checkpoints of one run as a curve."""
    parts = []
    if result.spread:
        span = svg.span_around_zero(v for s in result.spread for v in (*s.gains, s.low, s.high))
        lines = []
        for spread in result.spread:
            text = f"{words.points(spread.mean)} [{words.points(spread.low)}, {words.points(spread.high)}]"
            name = f"{spread.task}: mean gain {text} points over {len(spread.gains)} runs"
            plot = svg.spread_row(name, spread.gains, spread.mean, spread.low, spread.high, span)
            label = f"{spread.task}, {words.count(len(spread.gains), 'run')}, SD {100 * spread.sd:.1f}"
            lines.append(row(label, plot, words.points(spread.mean), text))
        parts += [
            element("h3", "Several training runs of one recipe"),
            element(
                "p", "Each dot is one run's gain, in points; below, their mean with its 95% interval.", kind="note"
            ),
            element("div", *lines, kind="rows"),
        ]
    parts += _checkpoints(result)
    if not parts:
        return ""
    return _simple("Training", "training", "".join(parts))


def _checkpoints(result: Result) -> list[str]:
    saved = [(s.step, i) for i, s in enumerate(result.subjects) if s.step is not None]
    if len(saved) < 2:
        return []
    figures = []
    for task in result.tasks:
        points = [(step, i, task.scores[i].metrics[task.headline]) for step, i in saved]
        chart = charts.steps(task.scores[0].metrics[task.headline], points)
        figures.append(element("figure", element("h4", escape(task.title)), chart))
    legend = key([(0, result.subjects[0].name)]) + element(
        "p", "The level line is the base; bars are 95% intervals.", kind="note"
    )
    return [element("h3", "Checkpoints of one run"), legend, element("div", *figures, kind="charts")]


def _beside(result: Result) -> str:
    """Forgetting guard, and tasks that were not run."""
    parts = []
    if result.guard:
        parts.append(_simple("Forgetting", "forgetting", element("p", escape(result.guard))))
    if result.skipped:
        lines = [element("li", element("b", escape(s.name)), ": ", escape(s.reason)) for s in result.skipped]
        parts.append(_simple("Tasks that were not run", "skipped", element("ul", *lines, kind="notes")))
    return "".join(parts)


def _simple(heading: str, place: str, body: str) -> str:
    return element("section", element("h2", heading, id=place), body, aria_labelledby=place)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return _list([(str(name), _plain(item)) for name, item in value.items()])
    if isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(item, Mapping | list) for item in value):
            return "".join(_plain(item) for item in value)
        return escape(", ".join(map(str, value)))
    return escape(value)


def _list(pairs: Sequence[tuple[str, str]]) -> str:
    """Names with values that are markup already."""
    return element("dl", *(element("dt", escape(name)) + element("dd", markup) for name, markup in pairs))


def _environment(result: Result) -> str:
    subjects = [
        [
            escape(s.name),
            escape(words.model(s)),
            element("code", escape(s.key)),
        ]
        for s in result.subjects
    ]
    pairs = []
    for name, value in result.environment.items():
        shown = (
            element("code", _plain(value))
            if isinstance(value, str) and str(name).startswith("command")
            else _plain(value)
        )
        pairs.append((str(name), shown))
    parts = [
        element("h2", "Models, versions, seeds, hardware", id="environment"),
        table("Models", ["Name", "Model", "Key of weights, precision and template"], subjects),
        _list(pairs) if pairs else "",
    ]
    return element("section", *parts, aria_labelledby="environment")
