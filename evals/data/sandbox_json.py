"""`sandbox_json`: the project's own arithmetic problems, of the split that no run trains on, prompts as in training."""

from __future__ import annotations

import json
from typing import Any

from evals.data.build import count
from evals.task import Item, Source

NAME = "sandbox_json"
# The limits of the sandbox's own reward: 16 steps, and answers of nine digits.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "items": {"type": "string"}, "maxItems": 16},
        "answer": {"type": "integer", "minimum": -999_999_999, "maximum": 999_999_999},
    },
    "required": ["steps", "answer"],
    "additionalProperties": False,
}


def load(source: Source) -> list[Item]:
    """One item for each test problem; the gold is the parsed solution."""
    from trl_ext.sandbox import tasks

    made = tasks.rows("math", count(source.limit), source.seed, "test")
    return [_item(f"{NAME}-{source.seed}-{i:04d}", row) for i, row in enumerate(made)]


def _item(name: str, row: dict[str, Any]) -> Item:
    return Item(name, name, row["prompt"], json.loads(row["solution"]), "", row["level"])
