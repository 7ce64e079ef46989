"""How each kind of task is graded: one line each to the graders, with the schema and the gold from the item."""

from __future__ import annotations

import functools
import json
from typing import Any

from evals.data import gsm8k, sandbox_json
from evals.graders.choice import grade_choice
from evals.graders.math import grade_math
from evals.graders.schema import Schema
from evals.graders.structured import NEEDS_GOLD, STRUCTURED_METRICS, grade_structured
from evals.task import Grade, Item, Metric


def mathematics(item: Item, text: str) -> Grade:
    """The final answer against the gold."""
    return grade_math(text, item.gold)


def choice(item: Item, text: str) -> Grade:
    """The letter against the gold letter; what votes is the option, whatever letter it stands at."""
    return grade_choice(text, item.gold, item.details["options"])


@functools.lru_cache(maxsize=4096)
def _schema(text: str) -> Schema:
    return Schema(json.loads(text))


def own_schema(item: Item, text: str) -> Grade:
    """Against the schema that the item carries; with a gold, the whole value is the answer."""
    return grade_structured(text, _schema(item.details["schema"]), item.gold)


def word_problem(item: Item, text: str) -> Grade:
    """An object with `reasoning` and `answer`."""
    return grade_structured(text, _schema(json.dumps(gsm8k.SCHEMA)), item.gold, answer_key="answer")


def schema_in_item(item: Item) -> Any:
    """The schema that the item carries."""
    return json.loads(item.details["schema"])


def schema_of_word_problems(item: Item) -> Any:
    """The same for all items."""
    return gsm8k.SCHEMA


def schema_of_sandbox(item: Item) -> Any:
    """The same for all items."""
    return sandbox_json.SCHEMA


def sandbox(item: Item, text: str) -> Grade:
    """An object with `steps` and `answer`."""
    return grade_structured(text, _schema(json.dumps(sandbox_json.SCHEMA)), item.gold, answer_key="answer")


# For tasks that ask for any value of a schema, so that no content is right or wrong.
SCHEMA_METRICS: dict[str, Metric] = {
    name: metric for name, metric in STRUCTURED_METRICS.items() if name not in NEEDS_GOLD
}
