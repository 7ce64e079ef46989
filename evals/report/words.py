"""Numbers and rows that the page, the Markdown and the terminal say in the same words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from evals.result import Paired, Result, Scores, Shown, Subject, TaskResult, Versus
from evals.stats import Comparison, Estimate

NONE = "–"
GENERATED = "generated"
"""The label of every task whose questions a program wrote: its score is no score on the benchmark it resembles."""


@dataclass(frozen=True)
class Row:
    """A headline comparison: one task, one candidate. `index`: of the candidate among the report's subjects."""

    task: TaskResult
    index: int
    versus: Versus

    @property
    def paired(self) -> Paired:
        """The comparison on the task's headline."""
        return self.versus.metrics[self.task.headline]


def rows(result: Result) -> Iterator[Row]:
    """Tasks in order, in each the candidates in order. None for a report of the base alone."""
    index = {subject.name: i for i, subject in enumerate(result.subjects)}
    for task in result.tasks:
        for versus in task.versus:
            yield Row(task, index[versus.candidate], versus)


def default_title(result: Result) -> str:
    """ "Evaluation of a, b against base"."""
    base, *candidates = (subject.name for subject in result.subjects)
    return f"Evaluation of {', '.join(candidates)} against {base}" if candidates else f"Evaluation of {base}"


def percent(share: float | None) -> str:
    """0.413 -> "41.3%"; "–" for None and NaN."""
    return NONE if share is None or math.isnan(share) else f"{100 * share:.1f}%"


def estimate(found: Estimate | None) -> str:
    """ "41.3% [35.0, 47.8]"."""
    return NONE if found is None else f"{percent(found.mean)} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def points(difference: float) -> str:
    """0.075 -> "+7.5"; what rounds to zero is "0.0", without a sign."""
    if math.isnan(difference):
        return NONE
    value = round(100 * difference, 1)
    return f"{value:+.1f}" if value else "0.0"


def change(found: Comparison) -> str:
    """ "+7.5 [-1.1, +16.1]", in points."""
    return f"{points(found.difference)} [{points(found.low)}, {points(found.high)}]"


def p_value(p: float | None) -> str:
    """ "< 0.001" or "0.042"."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_text(p: float) -> str:
    """ "p < 0.001" or "p = 0.042"."""
    return f"p {p_value(p)}" if p < 0.001 else f"p = {p_value(p)}"


def detectable(found: Comparison) -> str:
    """The smallest difference that could have been seen, in points; "–" where all questions moved alike: no spread."""
    return NONE if found.detectable == 0 else f"{100 * found.detectable:.1f}"


def tokens(mean: float | None) -> str:
    """ "1,234"."""
    return NONE if mean is None else f"{mean:,.0f}"


def mean_length(scores: Scores) -> float | None:
    """Mean tokens of a reply, None without replies."""
    return sum(scores.lengths) / len(scores.lengths) if scores.lengths else None


def label(task: TaskResult) -> str:
    """The task's title, and the word "generated" where it applies."""
    return f"{task.title} ({GENERATED})" if task.generated else task.title


def count(number: int, noun: str) -> str:
    """ "1 question", "2 questions", "3 replies"."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def protocol(task: TaskResult) -> str:
    """How the replies were drawn: "60 questions x 8 replies, temperature 0.6, top_p 0.95, ..."."""
    settings = dict(task.sampling)
    settings.pop("samples", None)
    parts = [f"{count(len(task.questions), 'question')} × {count(task.samples, 'reply')}"]
    temperature = settings.pop("temperature", None)
    if temperature is not None:
        parts.append("greedy" if temperature == 0 else f"temperature {temperature}")
    longest = settings.pop("max_new_tokens", None)
    if longest is not None:
        parts.append(f"up to {count(longest, 'token')}")
    return ", ".join(parts + [f"{name} {value}" for name, value in settings.items()])


def facts(task: TaskResult) -> str:
    """Kind, version, chance level and origin, in one line."""
    chance = "" if task.chance is None else f"; chance {percent(task.chance)}"
    return f"{task.name} version {task.version}; {task.kind}{chance}; {task.origin}"


def model(subject: Subject) -> str:
    """Base model, adapter, quantisation, dtype and step, in one line."""
    adapter = f" + {subject.adapter}" if subject.adapter else ""
    step = "" if subject.step is None else f"step {subject.step:,}"
    return ", ".join(part for part in (subject.model + adapter, subject.quantization, subject.dtype, step) if part)


def verdicts(result: Result) -> list[tuple[str, str]]:
    """(name of the candidate, its sentence); the name is empty where there is not one sentence for each candidate."""
    names = [subject.name for subject in result.subjects[1:]]
    if len(names) != len(result.verdict):
        names = [""] * len(result.verdict)
    return [
        ("" if sentence.startswith(name) else name, sentence)
        for name, sentence in zip(names, result.verdict, strict=True)
    ]


def method(result: Result) -> str:
    """How to read the numbers."""
    reading = "Scores are means over questions with 95% intervals."
    family = sum(len(task.versus) for task in result.tasks)
    if not family:
        return reading
    return (
        f"{reading} Differences are in points, paired by question; p values are two-sided sign-flip tests, adjusted "
        f"(Holm) over {'the only comparison' if family == 1 else f'all {family} comparisons'}. “Could have seen” is "
        "the smallest true difference found in 80% of such comparisons. The noise of training seeds is not in these "
        "intervals."
    )


def grammar(task: TaskResult) -> str | None:
    """What the base gains from the task's grammar alone, as a sentence; None where that was not tried."""
    if task.control is None:
        return None
    text = f"A grammar alone gives the base {estimate(task.control.metrics[task.headline])}"
    if task.control_versus is None:
        return f"{text}."
    paired = task.control_versus.metrics[task.headline]
    return f"{text}: {change(paired.comparison)} points, {p_text(paired.comparison.p)}, {paired.verdict}."


def moved(task: TaskResult, index: int) -> tuple[list[Shown], list[Shown]]:
    """(newly solved, newly broken) by subject `index`: the score crossed one half; largest changes first."""

    def gain(question: Shown) -> float:
        return question.scores[index] - question.scores[0]

    def right(question: Shown, subject: int) -> bool:
        return question.scores[subject] >= 0.5

    ordered = sorted(task.questions, key=lambda question: -abs(gain(question)))
    solved = [q for q in ordered if right(q, index) and not right(q, 0)]
    return solved, [q for q in ordered if right(q, 0) and not right(q, index)]
