"""DSTC's rows: the instructions of a data set, how long a trained row may be, and what the trainer gets of the pairs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from trl_ext.data_sources import DataError
from trl_ext.loops.building import prompt_of, said

Row = Mapping[str, Any]


def instructions(data: Any, entry_point: str | None) -> list[Row]:
    """The rows of a data set, all with that entry point unless it is None.

    DataError for a row without the name of a function or with tools. A recipe that names a stream does not load.
    """
    rows = [row if entry_point is None else {**row, "entry_point": entry_point} for row in data]
    for number, row in enumerate(rows):
        if row.get("tools"):
            raise DataError(
                f"dstc: row {number} has tools, which no code or test is sampled with here; leave the column out"
            )
        name = row.get("entry_point")
        if not isinstance(name, str) or not name.isidentifier():
            raise DataError(
                f"dstc: row {number} has entry_point {name!r}; every instruction needs the name of the function that solves "
                "it. Map the column in the recipe, e.g. columns: {entry_point: theirs}, or set the loop's entry_point"
            )
    return rows


@dataclass(frozen=True)
class Room:
    """How many tokens of prompt and completion together the trainer sees: what comes after `limit` it cuts off."""

    tokenizer: Any = None
    limit: int | None = None

    def holds(self, row: Row, text: str) -> bool:
        """Whether the row's prompt with this completion is within the limit, as TRL tokenises them."""
        if self.limit is None:
            return True
        turns, settings = [*row["prompt"], *said(text)], row.get("chat_template_kwargs") or {}
        ids = self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **settings)
        return len(ids) <= self.limit


def training_rows(lines: Sequence[Row], kto: bool, seed: int) -> Dataset:
    """A pair for each line that has one; for KTO two labelled rows, shuffled, since TRL reads them in order."""
    pairs = [line for line in lines if line["skipped"] is None]
    # A data set has the columns of its first row, and TRL takes no null for these settings.
    own = ["chat_template_kwargs"] if any("chat_template_kwargs" in pair for pair in pairs) else []
    prompts: list[dict[str, Any]] = [{name: {} for name in own} | prompt_of(pair) for pair in pairs]
    both = list(zip(prompts, pairs, strict=True))
    if not kto:
        return Dataset.from_list([q | {key: said(p[key]) for key in ("chosen", "rejected")} for q, p in both])
    halves = [(q, p[key], key == "chosen") for q, p in both for key in ("chosen", "rejected")]
    random.Random(f"dstc/{seed}").shuffle(halves)
    return Dataset.from_list([q | {"completion": said(text), "label": label} for q, text, label in halves])
