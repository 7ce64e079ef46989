"""The report on a terminal: the verdict first, an aligned table, then what a reader must know. At most 100 columns."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence

from evals.report import words
from evals.report.clean import publishable, visible
from evals.result import Result, TaskResult

COLUMNS = 100
NAME = 28
"""Columns of a task's name in the table; a longer one is cut."""
NOTES = 4
"""Notes of tasks that are shown; the page has all."""


def width(text: str) -> int:
    """Columns that `text` takes: wide East Asian characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def clip(text: str, limit: int) -> str:
    """One line of at most `limit` columns, "…" for what was cut."""
    text = " ".join(visible(text).split())
    if width(text) <= limit:
        return text
    while width(text) > limit - 1:
        text = text[:-1]
    return text + "…"


def wrap(text: str, first: str = "", rest: str = "  ") -> list[str]:
    """Lines of at most `COLUMNS` columns; `first` and `rest` stand before the first and the other lines."""
    line = " ".join(visible(text).split())
    room = COLUMNS if line.isascii() or width(line) == len(line) else COLUMNS // 2  # wide characters take two each
    return textwrap.wrap(line, room, initial_indent=first, subsequent_indent=rest) or [first.rstrip()]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned, two spaces apart; the first and the last to the left, numbers between to the right."""
    widths = [max(width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = []
        for i, cell in enumerate(row):
            gap = " " * (widths[i] - width(cell))
            cells.append(cell + gap if i in (0, len(row) - 1) else gap + cell)
        lines.append("  ".join(cells).rstrip())
    return lines


def _name(task: TaskResult) -> str:
    mark = f" ({words.GENERATED})" if task.generated else ""
    return clip(task.name, NAME - len(mark)) + mark


def _compared(result: Result, index: int) -> list[str]:
    """The table of one candidate, under its name."""
    head = ["task", "base", "now", "difference", "p (Holm)", "could see", "verdict"]
    body = []
    for row in words.rows(result):
        if row.index != index:
            continue
        scores, key, found = row.task.scores, row.task.headline, row.paired
        body.append(
            [
                _name(row.task),
                words.percent(scores[0].metrics[key].mean),
                words.percent(scores[index].metrics[key].mean),
                words.change(found.comparison),
                words.p_value(found.p_holm),
                words.detectable(found.comparison),
                found.verdict,
            ]
        )
    base, candidate = result.subjects[0].name, result.subjects[index].name
    return ["", *wrap(f"{candidate} against {base}"), *table([head, *body])] if body else []


def _alone(result: Result) -> list[str]:
    body = [[_name(task), words.estimate(task.scores[0].metrics[task.headline]), ""] for task in result.tasks]
    return ["", *table([["task", "score", ""], *body])] if body else []


def _notes(result: Result) -> list[str]:
    """What a reader must know at once, then up to `NOTES` of the tasks' own notes."""
    lines = [f"{skipped.name} was not run: {skipped.reason}" for skipped in result.skipped]
    lines += [result.guard] if result.guard else []
    lines += [
        f"{spread.task}: {words.count(len(spread.gains), 'training run')} of one recipe gain "
        f"{words.points(spread.mean)} [{words.points(spread.low)}, {words.points(spread.high)}] points, "
        f"SD {100 * spread.sd:.1f}"
        for spread in result.spread
    ]
    lines += [
        f"{row.task.name}, {row.versus.candidate}: {row.versus.split.words}"
        for row in words.rows(result)
        if row.versus.split is not None and row.paired.verdict != "no evidence"
    ]
    lines += [f"{task.name}: {found}" for task in result.tasks if (found := words.grammar(task))]
    lines += result.notes
    rest = [f"{task.name}: {note}" for task in result.tasks for note in task.notes]
    lines += rest[:NOTES]
    lines += [f"{words.count(len(rest) - NOTES, 'more note')} on the page"] if len(rest) > NOTES else []
    return [line for note in lines for line in wrap(note, "- ")]


def text(result: Result) -> str:
    """The report for a terminal, without texts of questions, paths or tokens. Lines hold at most 100 columns."""
    result = publishable(result)
    lines = []
    for name, sentence in words.verdicts(result):
        lines += wrap(f"{name}: {sentence}" if name else sentence, rest="")
    if len(result.subjects) > 1:
        for index in range(1, len(result.subjects)):
            lines += _compared(result, index)
    else:
        lines += _alone(result)
    lines += ["", *wrap(words.method(result), rest=""), *_notes(result)]
    return "\n".join(lines) + "\n"
