"""Ladders of hints, from abstract to concrete: which hints a row has, and how one stands in a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Columns = Mapping[str, str | Sequence[str]]
"""Column of hints -> its label in the prompt, or one label for each of its parts; in the order of the ladder."""


@dataclass(frozen=True)
class Rung:
    """One hint of a row: `number` 1, 2, ... in its ladder, the `label` that names its tier, and its text."""

    number: int
    label: str
    text: str


def ladder(row: Mapping[str, Any], columns: Columns, cumulative: bool = True) -> list[Rung]:
    """The hints of `row`, least informative first: column after column, part after part.

    A column holds a list of parts, or a text, which is one part; what is empty or absent is passed over. `cumulative`:
    level c of a column shows its parts 1..c joined with a space; else part c alone, where parts are rungs of their own.

    >>> [rung.text for rung in ladder({"plan": ["Add.", "Then halve."]}, {"plan": "Planning Hints"})]
    ['Add.', 'Add. Then halve.']

    Raises ValueError if a column has labels for its parts and the row has more parts than that.
    """
    found: list[Rung] = []
    for column, labels in columns.items():
        value = row.get(column) or []
        parts = [value] if isinstance(value, str) else list(value)
        if not isinstance(labels, str) and len(labels) < len(parts):
            raise ValueError(
                f"a row has {len(parts)} hints in the column '{column}', for which there are {len(labels)} labels: give "
                "as many, or one label for all of them"
            )
        shown: list[str] = []
        for label, part in zip([labels] * len(parts) if isinstance(labels, str) else labels, parts, strict=False):
            text = (part or "").strip()
            if text:
                shown = [*shown, text] if cumulative else [text]
                found.append(Rung(len(found) + 1, label, " ".join(shown)))
    return found


def hinted(prompt: Any, rung: Rung) -> Any:
    """`prompt` with the line "{label}: {text}" at the end of its last user turn, or of a text; the input is left alone.

    >>> hinted([{"role": "user", "content": "1 + 2?"}], Rung(1, "Hint", "count on"))
    [{'role': 'user', 'content': '1 + 2?\\nHint: count on'}]

    Raises ValueError for a conversation without a user turn of plain text.
    """
    line = f"\n{rung.label}: {rung.text}"
    if isinstance(prompt, str):
        return prompt + line
    places = [i for i, turn in enumerate(prompt) if turn["role"] == "user"]
    if not places or not isinstance(prompt[places[-1]]["content"], str):
        raise ValueError(
            "a hint goes to the end of the last user turn, which must be a text, and this prompt has none; leave such rows out, "
            "or empty their columns of hints"
        )
    last = prompt[places[-1]]
    return [*prompt[: places[-1]], {**last, "content": last["content"] + line}, *prompt[places[-1] + 1 :]]


def first_solved(prompts: Iterable[int], solved: Iterable[bool]) -> dict[int, int]:
    """For trials in the order of each prompt's ladder: prompt -> the number of its first trial that was solved.

    >>> first_solved([3, 3, 3, 5, 5], [False, True, True, False, False])
    {3: 1}
    """
    found: dict[int, int] = {}
    for number, (prompt, right) in enumerate(zip(prompts, solved, strict=True)):
        if right:
            found.setdefault(prompt, number)
    return found
