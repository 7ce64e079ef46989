"""From a data set's column to the object that a reply is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evals.data.gsm8k import split_answer
from evals.graders.strict_json import load
from evals.task import DataError


def _json_gold(value: Any) -> Any:
    parsed = load(value) if isinstance(value, str) else None
    return value if parsed is None else parsed.value


def _gsm8k_gold(value: Any) -> dict[str, Any] | None:
    try:
        reasoning, answer = split_answer("gold", str(value))
    except DataError:
        return None
    return {"reasoning": reasoning, "answer": float(answer) if "." in answer else int(answer)}


GOLD_FORMATS: Mapping[str, Callable[[Any], Any]] = {"json": _json_gold, "gsm8k": _gsm8k_gold}
"""Name of a format -> a column's value to the gold value; None when it cannot be read."""


def kept(gold: Any, keys: Sequence[str] | None) -> Any:
    """`gold` with only `keys` in it; None if there is nothing to compare with."""
    if keys is None or gold is None:
        return gold
    kept = {key: gold[key] for key in keys if key in gold} if isinstance(gold, dict) else {}
    return kept or None
