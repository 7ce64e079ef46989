"""Newly solved and newly broken questions side by side: prompt, gold answer, the base's reply and the candidate's."""

from __future__ import annotations

from collections.abc import Sequence

from evals.report import words
from evals.report.clean import cut
from evals.report.svg import element, escape
from evals.result import Shown, TaskResult

MOST_QUESTIONS = 15
"""Newly solved, and newly broken, questions that are shown of each task and candidate."""
PROMPT, GOLD, REPLY = 4_000, 1_000, 4_000
"""Characters shown of each text."""


def moved(task: TaskResult, names: Sequence[str], index: int) -> str:
    """The questions whose score crossed one half between the base and subject `index`."""
    solved, broken = words.moved(task, index)
    halves = "".join(
        element("div", element("h4", f"{heading}: {len(found):,}"), _shown(task, found, names, index))
        for heading, found in (("Newly solved", solved), ("Newly broken", broken))
    )
    note = (
        "Newly solved: below half of the score before, at least half now. Largest changes first, first replies shown."
    )
    if task.gated:
        note += " The data set is gated: ids and scores only."
    heading = element("h3", f"Questions that moved: {escape(names[index])}")
    return heading + element("p", note, kind="note") + element("div", halves, kind="pair")


def _shown(task: TaskResult, questions: Sequence[Shown], names: Sequence[str], index: int) -> str:
    lines = [_question(task, question, names, index) for question in questions[:MOST_QUESTIONS]]
    more = len(questions) - len(lines)
    if more:
        lines.append(element("p", f"and {more:,} more, in results.json", kind="note"))
    return "".join(lines) or element("p", "none", kind="note")


def _question(task: TaskResult, question: Shown, names: Sequence[str], index: int) -> str:
    scores = f"{words.percent(question.scores[0])} → {words.percent(question.scores[index])}"
    details = [question.group] if question.group else []
    details += [f"level {question.level}"] if question.level is not None else []
    about = element("span", escape(f" {', '.join(details)}"), kind="soft") if details else ""
    top = element("span", escape(scores), kind="value") + element("code", escape(question.id)) + about
    if task.gated or question.prompt is None or question.replies is None:
        return element("p", top, kind="plain")
    replies = "".join(
        element("div", _text(f"{names[i]}, first reply", question.replies[i], REPLY)) for i in (0, index)
    )
    inside = (
        _text("Prompt", question.prompt, PROMPT)
        + _text("Gold answer", question.gold or words.NONE, GOLD)
        + element("div", replies, kind="replies")
    )
    return element("details", element("summary", top), element("div", inside))


def _text(heading: str, text: str, limit: int) -> str:
    return element("p", escape(heading), kind="what") + element("pre", escape(cut(text, limit)), tabindex=0)
