"""What all suites share: draw distinct questions from a seed, cut to the first n, and name a data set by its content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from evals.task import Item, Message

T = TypeVar("T")
DEFAULT_QUESTIONS = 200  # of a generated suite when the source sets no limit
MAX_TRIES = 2_000  # draws for one question


class Redraw(Exception):
    """A draw that cannot be used (a repeat, a number out of range); the next one is tried."""


def draw_all(name: str, n: int, draw: Callable[[int], T]) -> list[T]:
    """`n` questions, the i-th from `draw(i)`, called again while it raises `Redraw`.

    `draw` may look back but never ahead, so the first m of n questions do not depend on n. A family that has run out
    of variants ends in a ValueError after `MAX_TRIES` draws.
    """
    questions: list[T] = []
    for i in range(n):
        for _ in range(MAX_TRIES):
            try:
                questions.append(draw(i))
                break
            except Redraw:
                continue
        else:
            raise ValueError(f"{name}: no new question {i + 1} in {MAX_TRIES} draws: ask for {i} or fewer")
    return questions


def count(limit: int | None, default: int = DEFAULT_QUESTIONS) -> int:
    """The number of questions that `limit` asks for; ValueError unless it is a whole number of at least 1.

    1.0 is refused, because lm-eval reads it as one document and its users as 100 %.
    """
    if limit is None:
        return default
    if type(limit) is not int or limit < 1:
        raise ValueError(f"limit is {limit!r}: give the number of questions, a whole number of at least 1")
    return limit


def first(rows: Sequence[T], limit: int | None) -> list[T]:
    """The first `limit` rows, all without a limit."""
    return list(rows[: count(limit, default=len(rows))])


def agree(where: str, first_value: Any, second_value: Any) -> Any:
    """The value on which two independent solvers agree; RuntimeError otherwise, for one of them is wrong."""
    if first_value != second_value:
        raise RuntimeError(f"{where}: the two solvers disagree, {first_value!r} against {second_value!r}")
    return first_value


def conversation(user: str, system: str = "") -> list[Message]:
    """One user turn, after a system turn if there is one."""
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": user}]


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(items: Sequence[Item]) -> str:
    """SHA-256 (hex) over the items' canonical JSON, one line each: prompts, golds, ids, groups, levels and details."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(canonical(dataclasses.asdict(item)).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
