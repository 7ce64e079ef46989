"""A fixed random subset of JSONSchemaBench (arXiv:2501.10868): real schemas from GitHub in three sizes.

From the test splits of Github_easy, Github_medium and Github_hard come the first `PER_CONFIG` schemas each in the order
of SHA-256(unique_id), one config after the other in turn. Schemas that the validator refuses (malformed, or with
references to other files) and schemas of more than `MAX_CHARACTERS` are left out, and counted in `details`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from evals.data.build import conversation, first
from evals.data.hub import HubData, rows
from evals.graders.schema import Schema
from evals.task import DataError, Item, Source

NAME = "structured"
DATA = HubData("epfl-dlab/JSONSchemaBench", "test", None, {"schema": ("json_schema",), "id": ("unique_id",)})
CONFIGS = {"Github_easy": 1, "Github_medium": 2, "Github_hard": 3}  # and the level of each
PER_CONFIG = 100
MAX_CHARACTERS = 16_000  # about 5,000 tokens: a prompt that fits beside a reply of 2,048 in a window of 8,192
SYSTEM = "You write JSON. Reply with one JSON value that is valid under the given JSON Schema, and nothing else."


def usable(text: str) -> bool:
    """Whether a schema is short enough, is JSON, and compiles without any other file."""
    if len(text) > MAX_CHARACTERS:
        return False
    try:
        Schema(json.loads(text))
    except ValueError:
        return False
    return True


def select(schemas: Sequence[dict[str, str]], n: int) -> tuple[list[dict[str, str]], int]:
    """(the first `n` usable rows in the order of SHA-256(id), the number of rows passed over on the way)."""
    ordered = sorted(schemas, key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
    chosen: list[dict[str, str]] = []
    for seen, row in enumerate(ordered):
        if len(chosen) == n:
            return chosen, seen - n
        if usable(row["schema"]):
            chosen.append(row)
    return chosen, len(ordered) - len(chosen)


def load(source: Source) -> list[Item]:
    """Easy, medium and hard in turn. `details`: the schema, its config, and how many the config's choice left out."""
    columns = []
    for config, level in CONFIGS.items():
        chosen, left_out = select(rows(NAME, DATA, source, config), PER_CONFIG)
        columns.append([_item(row, config, level, left_out) for row in chosen])
    turns = [column[i] for i in range(PER_CONFIG) for column in columns if i < len(column)]
    if not turns:
        raise DataError(f"{NAME}: none of the schemas can be used; expected the files of {DATA.page}")
    return first(turns, source.limit)


def _item(row: dict[str, str], config: str, level: int, left_out: int) -> Item:
    details = {"schema": row["schema"], "config": config, "left_out": left_out}
    messages = conversation(f"JSON Schema:\n{row['schema']}", SYSTEM)
    name = f"{NAME}-{config}-{row['id']}"
    return Item(name, name, messages, None, "", level, details)
