"""The headline by parts of the questions, and the questions themselves for the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from evals.analysis.tables import Table, letter
from evals.result import Part, Shown
from evals.task import Item, Task


def parts(task: Task, tables: Sequence[Table]) -> dict[str, tuple[Part, ...]]:
    """ "level", "family" and, for choice tasks, "gold letter": each where the items differ in it."""
    keys: dict[str, Callable[[Item], str]] = {
        "level": lambda item: "" if item.level is None else str(item.level),
        "family": lambda item: item.group,
    }
    if task.kind == "choice":
        keys["gold letter"] = gold_letter
    found = {heading: _parts(key, task.headline, tables) for heading, key in keys.items()}
    return {heading: part for heading, part in found.items() if len(part) > 1}


def _parts(key: Callable[[Item], str], headline: str, tables: Sequence[Table]) -> tuple[Part, ...]:
    """Means over replies to the items of a part, then over its questions: a question may be in several parts, once for
    each of its items.
    """
    names = sorted({key(item) for item, _ in tables[0].flat} - {""}, key=lambda name: (len(name), name))
    made = []
    for name in names:
        rows = [[[c for c in row if key(c[0]) == name] for row in table.cells] for table in tables]
        means = [
            np.mean([np.mean([reply.grade.scores[headline] for _, reply in row]) for row in kept if row])
            for kept in rows
        ]
        made.append(Part(name, sum(bool(row) for row in rows[0]), tuple(float(mean) for mean in means)))
    return tuple(made)


def gold_letter(item: Item) -> str:
    """The right letter of a choice item."""
    return str(item.details.get("gold_letter", item.gold))


def letter_note(tables: Sequence[Table], names: Sequence[str]) -> str | None:
    """How often each letter was right and given: a liking for a letter is no knowledge. None if no reply gave any."""
    golds = Counter(gold_letter(item) for item, _ in tables[0].flat)
    given = [Counter(found for cell in table.flat if (found := letter(*cell)) is not None) for table in tables]
    letters = sorted(set(golds).union(*given))
    shares = [f"{name} {_shares(counts, letters)}" for name, counts in zip(names, given, strict=True) if counts]
    return f"Letters: right {_shares(golds, letters)}; given by {'; by '.join(shares)}." if shares else None


def _shares(counts: Counter[str], letters: Sequence[str]) -> str:
    return ", ".join(f"{letter} {counts[letter] / counts.total():.0%}" for letter in letters)


def shown(task: Task, tables: Sequence[Table], keep: bool) -> tuple[Shown, ...]:
    """All questions, with their texts if `keep`."""
    scores = np.stack([table.scores(task.headline).mean(1) for table in tables], axis=1)
    return tuple(
        Shown(
            id=item.question,
            group=item.group,
            level=item.level,
            scores=tuple(scores[i].tolist()),
            prompt=_prompt(item) if keep else None,
            gold=str(item.gold) if keep else None,
            replies=tuple(table.cells[i][0][1].text for table in tables) if keep else None,
        )
        for i, item in enumerate(tables[0].firsts)
    )


def _prompt(item: Item) -> str:
    """The messages as one text; roles are named where there are several."""
    if len(item.messages) == 1:
        return item.messages[0]["content"]
    return "\n\n".join(f"[{message['role']}] {message['content']}" for message in item.messages)
