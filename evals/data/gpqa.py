"""GPQA-Diamond: 198 graduate questions. Gated, and its users promise not to publish questions: ids carry no text."""

from __future__ import annotations

from evals.data.build import first
from evals.data.choices import COLUMNS, rotations
from evals.data.hub import HubData, rows
from evals.task import Item, Source

NAME = "gpqa_diamond"
DATA = HubData("Idavidrein/gpqa", "train", NAME, COLUMNS, gated=True)


def load(source: Source) -> list[Item]:
    """Four items for each question; DataError without access."""
    questions = first(rows(NAME, DATA, source), source.limit)
    return [item for row in questions for item in rotations(row, source.seed)]
