"""Questions with four options: rows in GPQA's columns become four items each, one for every rotation of the options.

The base order of a question comes from SHA-256 of (seed, record id); rotation j moves every option j places up. So the
right option stands at each letter once, a preference for a letter cancels within a question, and can be measured. Key
and prompt come from the same order in the same call, so they cannot part. A preset's `samples` counts replies per
item, hence a question gets four times as many.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import permutations

from evals.data.build import conversation
from evals.task import Item

LETTERS = "ABCD"
RIGHT = "Correct Answer"
OPTIONS = (RIGHT, "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
COLUMNS: Mapping[str, Sequence[str]] = {name: (name,) for name in ("Record ID", "Question", *OPTIONS)}
ORDERS = tuple(permutations(OPTIONS))
INSTRUCTION = (
    "Answer the following multiple-choice question. Think step by step, then end with a last line of the form "
    "'Answer: X', where X is A, B, C or D."
)


def base_order(seed: int, record: str) -> tuple[str, ...]:
    """The columns of the four options in their base order: permutation number SHA-256(seed/record) mod 24."""
    return ORDERS[int(hashlib.sha256(f"{seed}/{record}".encode()).hexdigest(), 16) % len(ORDERS)]


def rotations(row: Mapping[str, str], seed: int, group: str = "") -> list[Item]:
    """The four items of a row. `details["options"]` maps letters to columns, `position` is the gold letter's index."""
    base = base_order(seed, row["Record ID"])
    return [_item(row, base[j:] + base[:j], j, group) for j in range(len(LETTERS))]


def _item(row: Mapping[str, str], order: Sequence[str], rotation: int, group: str) -> Item:
    listed = "\n".join(f"{letter}) {row[name].strip()}" for letter, name in zip(LETTERS, order, strict=True))
    position = order.index(RIGHT)
    return Item(
        id=f"{row['Record ID']}/r{rotation}",
        question=row["Record ID"],
        messages=conversation(f"{INSTRUCTION}\n\n{row['Question'].strip()}\n\n{listed}"),
        gold=LETTERS[position],
        group=group,
        details={
            "options": dict(zip(LETTERS, order, strict=True)),
            "position": position,
            "rotation": rotation,
        },
    )
