"""Graded replies as tables of questions x replies, checked to be complete and equal for all subjects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evals.task import Grade, Item

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Graded:
    """A reply and its verdict. `sample`: its number within the item, from 0. `truncated`: the token limit ended it."""

    grade: Grade
    text: str
    tokens: int
    truncated: bool
    sample: int


Cell = tuple[Item, Graded]


def vote(item: Item, reply: Graded) -> str | None:
    """What a reply votes for. The letter of a choice item stands for its option (`details["options"]`, letter -> option):
    the same letter means something else once the options are rotated.
    """
    answer = reply.grade.answer
    return answer if answer is None else item.details.get("options", {}).get(answer, answer)


def letter(item: Item, reply: Graded) -> str | None:
    """The letter that a reply to a choice item gave, whether its grade names the letter or the option."""
    options = item.details.get("options", {})
    return next((name for name, option in options.items() if reply.grade.answer in (name, option)), None)


@dataclass(frozen=True)
class Table:
    """One subject's replies, [question][reply], N x K. Items of one question (rotated options) are merged in the order of
    (sample, item); questions keep the order of the task.
    """

    cells: tuple[tuple[Cell, ...], ...]

    def scores(self, name: str) -> Array:
        """(N, K) values of a score or a count. Raises ValueError naming the item whose grade lacks it."""
        for row in self.cells:
            for item, reply in row:
                if name not in reply.grade.scores:
                    raise ValueError(f"item {item.id}, sample {reply.sample}: the grader gave no {name!r}")
        return np.array([[float(reply.grade.scores[name]) for _, reply in row] for row in self.cells])

    @property
    def flat(self) -> list[Cell]:
        """All replies, question by question."""
        return [cell for row in self.cells for cell in row]

    @property
    def firsts(self) -> list[Item]:
        """The first item of each question."""
        return [row[0][0] for row in self.cells]


def build_table(items: Sequence[Item], replies: Mapping[str, Sequence[Graded]], subject: str) -> Table:
    """The table of one subject.

    Raises ValueError when an item has no replies or not the same sample numbers as the first item, when ids repeat, and
    when questions have different numbers of items: every question must weigh the same.
    """
    ids = [item.id for item in items]
    if not ids or len(set(ids)) < len(ids):
        raise ValueError(f"subject {subject}: {'no items' if not ids else 'item ids repeat'}")
    wanted = sorted(reply.sample for reply in replies.get(ids[0], ()))
    questions: dict[str, list[tuple[int, int, Cell]]] = {}
    for position, item in enumerate(items):
        given = replies.get(item.id, ())
        samples = sorted(reply.sample for reply in given)
        if not samples or samples != wanted or len(set(samples)) < len(samples):
            raise ValueError(
                f"subject {subject}, item {item.id}: samples {samples} where {wanted} are expected; "
                "run the evaluation again to complete it"
            )
        questions.setdefault(item.question, []).extend((reply.sample, position, (item, reply)) for reply in given)
    rows = [tuple(cell for *_, cell in sorted(row, key=lambda entry: entry[:2])) for row in questions.values()]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"subject {subject}: questions have different numbers of items, hence of replies")
    return Table(tuple(rows))


def build_tables(
    items: Sequence[Item], graded: Mapping[str, Mapping[str, Sequence[Graded]]], subjects: Sequence[str]
) -> list[Table]:
    """A table for each subject, in order; all must have the same number of replies, since maj@K and pass@k depend on it."""
    missing = [name for name in subjects if name not in graded]
    if missing:
        raise ValueError(f"no replies of {', '.join(missing)}")
    tables = [build_table(items, graded[name], name) for name in subjects]
    counts = {name: len(table.cells[0]) for name, table in zip(subjects, tables, strict=True)}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"subjects have different numbers of replies to a question: {counts}; complete the shorter runs"
        )
    return tables


CLUSTERS = 8
"""Fewest templates that may stand for "templates like these": with fewer, a t quantile for them says little."""


def clusters(items: Sequence[Item], generated: bool) -> tuple[list[str] | None, str | None]:
    """(group of each question or None, note): `items` are the first items of the questions.

    Generated questions of one template are correlated, so that the template is the unit. With fewer than `CLUSTERS`
    templates questions stay the unit, and the interval then holds for questions of these templates only.
    """
    named = {item.group for item in items if item.group}
    if not generated or not named or len(named) == len(items):
        return None, None
    groups = [f"group {item.group}" if item.group else f"question {item.question}" for item in items]
    count = len(set(groups))
    if count < CLUSTERS:
        return None, (
            f"The questions come from {count} {'template' if count == 1 else 'templates'}: intervals speak of questions "
            "from these templates, not of other ones."
        )
    return (
        groups,
        f"Questions of one template count as one: {count} templates are the unit of all intervals and tests.",
    )


def weighted_mean(per_question: Array, groups: Sequence[str] | None) -> float:
    """Mean over questions, or over clusters of their means."""
    if groups is None:
        return float(per_question.mean())
    _, index, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    return float((per_question / (len(sizes) * sizes[index])).sum())
