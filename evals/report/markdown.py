"""A report for a model card: a short Markdown text, and the Hub's `model-index` metadata. No texts of questions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from evals.report import words
from evals.report.clean import publishable, visible
from evals.result import Paired, Result, TaskResult
from evals.stats import Estimate

ESCAPED = re.compile(r"([\\`*\[\]|#~$]|(?<![^\W_])_|_(?![^\W_]))")
HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def escape(text: object) -> str:
    """Foreign text on one line, without meaning in Markdown or HTML."""
    line = " ".join(visible(str(text)).split())
    return ESCAPED.sub(r"\\\1", line.translate(HTML))


def _table(head: list[str], texts: tuple[int, ...], body: list[list[str]]) -> list[str]:
    """`texts`: columns to the left; the others are numbers, to the right."""
    rule = ["---" if i in texts else "---:" for i in range(len(head))]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *body)]


def _comparisons(result: Result) -> list[str]:
    base = result.subjects[0].name
    head = ["task", "candidate", base, "candidate's score", "difference", "p (Holm)", "could have seen", "verdict"]
    body = []
    for row in words.rows(result):
        found, scores, key = row.paired, row.task.scores, row.task.headline
        body.append(
            [
                words.label(row.task),
                row.versus.candidate,
                words.estimate(scores[0].metrics[key]),
                words.estimate(scores[row.index].metrics[key]),
                words.change(found.comparison),
                words.p_value(found.p_holm),
                words.detectable(found.comparison),
                found.verdict,
            ]
        )
    return _table([escape(cell) for cell in head], (0, 1, 7), [[escape(cell) for cell in row] for row in body])


def _scores(result: Result) -> list[str]:
    body = [
        [escape(words.label(task)), escape(words.estimate(task.scores[0].metrics[task.headline]))]
        for task in result.tasks
    ]
    return _table(["task", "score"], (0,), body)


def _flat(environment: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for key, value in environment.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key} ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append((f"{prefix}{key}", text))
    return found


def markdown(result: Result) -> str:
    """Verdict, table, protocol and versions, for a model card. Nothing of any question's text, paths or tokens."""
    result = publishable(result)
    lines = [f"## {escape(words.default_title(result))}", ""]
    for name, sentence in words.verdicts(result):
        lines += [f"**{escape(name)}:** {escape(sentence)}" if name else f"**{escape(sentence)}**", ""]
    lines += _comparisons(result) if len(result.subjects) > 1 else _scores(result)
    lines += ["", escape(words.method(result)), ""]
    if any(task.generated for task in result.tasks):
        lines += ["Tasks marked “generated” are made by a program; their scores are not those of a benchmark.", ""]
    for task in result.tasks:
        told = [f"headline {task.headline}; {words.protocol(task)}", words.facts(task), *task.notes]
        told += filter(None, [words.grammar(task)])
        lines.append(f"- {escape(words.label(task))}: {escape('. '.join(text.rstrip('.') for text in told))}.")
    lines += [f"- {escape(note)}" for note in (*([result.guard] if result.guard else []), *result.notes)]
    lines += [f"- {escape(task.name)} was not run: {escape(task.reason)}" for task in result.skipped]
    lines += ["", "<details><summary>Versions, seeds, hardware, command</summary>", ""]
    lines += [f"- {escape(subject.name)}: {escape(words.model(subject))}" for subject in result.subjects]
    lines += [f"- {escape(key)}: {escape(value)}" for key, value in _flat(result.environment)]
    return "\n".join([*lines, "", "</details>", ""])


def _subject(result: Result, name: str | None) -> int:
    names = [subject.name for subject in result.subjects]
    if name is None and len(names) <= 2:
        return len(names) - 1
    if name not in names:
        raise ValueError(f"model_index: which of {', '.join(names)} is the model of the card? subject is {name!r}")
    return names.index(name)


def model_index(result: Result, model_name: str, subject: str | None = None) -> list[dict[str, Any]]:
    """The Hub's `model-index`: one entry for each task with the headline of `subject` in percent, and its difference.

    `subject` may be left out when there is the base alone or one candidate. A generated task says so in its name and
    type. Raises ValueError when it is not clear which subject is meant.
    """
    result = publishable(result)
    index = _subject(result, subject)
    gains = {row.task.name: row.paired for row in words.rows(result) if row.index == index}
    found = []
    for task in result.tasks:
        metrics = [_score(task, task.scores[index].metrics[task.headline])]
        if task.name in gains:
            metrics.append(_gain(task, gains[task.name], result.subjects[0].name))
        kind = f"{words.GENERATED}/{task.name}" if task.generated else task.name
        dataset = {"name": visible(words.label(task)), "type": visible(kind), "revision": str(task.version)}
        found.append({"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics})
    return [{"name": model_name, "results": found}]


def _percent(low: float, high: float) -> list[float]:
    return [round(100 * low, 2), round(100 * high, 2)]


def _score(task: TaskResult, score: Estimate) -> dict[str, Any]:
    return {
        "type": task.headline,
        "name": f"{task.headline}, mean of {words.count(task.samples, 'reply')}, %",
        "value": round(100 * score.mean, 2),
        "args": {"interval_95": _percent(score.low, score.high), **task.sampling},
    }


def _gain(task: TaskResult, paired: Paired, base: str) -> dict[str, Any]:
    moved = paired.comparison
    return {
        "type": f"{task.headline}_gain",
        "name": f"gain over {visible(base)}, points: {paired.verdict}",
        "value": round(100 * moved.difference, 2),
        "args": {"interval_95": _percent(moved.low, moved.high)},
    }
