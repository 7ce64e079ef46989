"""GSM8K and its cleaned edition, GSM8K-Platinum: word problems with a number as answer, in prose or as JSON.

Prompt and schema of the JSON form: card rl_struct, evaluation section. Reasoning comes first, as key order is the order
of generation. The gold answer is the text after `####` without commas; the gold reasoning is the text before it without
the calculator marks `<<...>>`.
"""

from __future__ import annotations

import re
from typing import Any

from evals.data.build import conversation, first
from evals.data.hub import HubData, rows
from evals.task import DataError, Item, Source

SYSTEM = (
    "You solve grade-school math problems. Reply with one JSON object and nothing else. Use exactly two keys: "
    '"reasoning", a string with the worked steps, and "answer", a number without unit.'
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"reasoning": {"type": "string"}, "answer": {"type": "number"}},
    "required": ["reasoning", "answer"],
    "additionalProperties": False,
}
BOXED = "Reason step by step, then give the final number without unit in the form \\boxed{answer}."
COLUMNS = {"question": ("question",), "answer": ("answer",)}
GSM8K = HubData("openai/gsm8k", "test", "main", COLUMNS)
PLATINUM = HubData("madrylab/gsm8k-platinum", "test", "main", COLUMNS)
NUMBER = re.compile(r"-?\d+(\.\d+)?")


def split_answer(where: str, text: str) -> tuple[str, str]:
    """(reasoning, answer) of a GSM8K solution; DataError without a number after `####`."""
    reasoning, mark, answer = text.rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not NUMBER.fullmatch(answer):
        raise DataError(f"{where}: the answer column has no number after '####'")
    return re.sub(r"<<.*?>>", "", reasoning).strip(), answer


def json_item(name: str, question: str, gold: dict[str, Any], group: str = "", level: int | None = None) -> Item:
    """A word problem to be answered as a JSON object; `gold` holds `reasoning` and `answer`."""
    return Item(name, name, conversation(question, SYSTEM), gold, group, level)


def load_json(name: str, data: HubData, source: Source) -> list[Item]:
    """Items of the JSON form, one for each row."""
    items = []
    for i, row in enumerate(first(rows(name, data, source), source.limit)):
        reasoning, answer = split_answer(f"{name}, row {i}", row["answer"])
        number = float(answer) if "." in answer else int(answer)
        items.append(json_item(f"{name}-{i:04d}", row["question"], {"reasoning": reasoning, "answer": number}))
    return items


def load_prose(name: str, data: HubData, source: Source) -> list[Item]:
    """Items of the prose form: the number in a box."""
    items = []
    for i, row in enumerate(first(rows(name, data, source), source.limit)):
        _, answer = split_answer(f"{name}, row {i}", row["answer"])
        text = f"{row['question']}\n\n{BOXED}"
        items.append(Item(f"{name}-{i:04d}", f"{name}-{i:04d}", conversation(text), answer))
    return items
