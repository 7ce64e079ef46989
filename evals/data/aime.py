"""AIME 2024 and 2025: 30 competition problems each, with integer answers from 0 to 999."""

from __future__ import annotations

import re

from evals.data.aime_synth import INSTRUCTION
from evals.data.build import conversation, first
from evals.data.hub import HubData, rows
from evals.task import DataError, Item, Source

# Capitalised in Maxwell-Jia/AIME_2024, small in math-ai/aime25 and in the copies HuggingFaceH4/aime_2024 and
# yentinglin/aime_2025. The ids of math-ai/aime25 are running numbers.
COLUMNS = {
    "id": ("ID", "id", "problem_idx"),
    "problem": ("Problem", "problem", "question"),
    "answer": ("Answer", "answer"),
}
AIME24 = HubData("Maxwell-Jia/AIME_2024", "train", None, COLUMNS)
AIME25 = HubData("math-ai/aime25", "test", None, COLUMNS)


def load(name: str, data: HubData, source: Source) -> list[Item]:
    """One item for each problem; DataError for an answer that is no integer from 0 to 999, or an id that repeats."""
    questions = rows(name, data, source)
    if len({row["id"] for row in questions}) < len(questions):
        raise DataError(f"{name}: two rows have the same id; is another year or edition in the folder?")
    return [_item(name, row) for row in first(questions, source.limit)]


def _item(name: str, row: dict[str, str]) -> Item:
    # Leading zeros as on the competition's form; 204.0 is how a reader that guesses types spells 204.
    answer = re.fullmatch(r"0*(\d{1,3})(?:\.0+)?", row["answer"].strip())
    if not answer:
        raise DataError(f"{name}: the answer of problem {row['id']} is no integer from 0 to 999")
    identifier = f"{name}-{row['id']}"
    return Item(identifier, identifier, conversation(f"{row['problem'].strip()}\n\n{INSTRUCTION}"), answer[1])
