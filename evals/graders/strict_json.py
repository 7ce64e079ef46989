"""JSON as RFC 8259 has it, and nothing more: no NaN, no duplicate keys, no lone surrogates. Bounded in time and depth.

The raw form is the text itself. The tolerant form drops a thought before it and one Markdown fence around it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from evals.graders.text import after_thought

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 200
MAX_DIGITS = 1_000
"""Digits of an integer; reading one takes quadratic time."""
_WHITE = " \t\n\r"
# A string is one token, so that brackets in it do not count. `*+` never backtracks: linear time.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]', re.DOTALL)
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")


@dataclass(frozen=True)
class Parsed:
    """`value` of a text that is JSON; else `problem` says in words why it is none."""

    value: Any = None
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the text is JSON."""
        return self.problem is None


def load(text: str) -> Parsed:
    """The one JSON value that `text` is, up to white space (space, tab, line feed, carriage return)."""
    problem = _problem_before(text)
    if problem is not None:
        return Parsed(problem=problem)
    try:
        value = _DECODER.decode(text)
        if _ESCAPED_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Parsed(problem="an unpaired surrogate in a string")
    except json.JSONDecodeError as error:
        return Parsed(problem=f"{error.msg} at character {error.pos}")
    except ValueError as error:
        return Parsed(problem=str(error))
    return Parsed(value)


def load_inner(text: str) -> Parsed:
    """`load` of what is left of `text` without its thought and its fence."""
    rest = after_thought(text)
    return Parsed(problem="the thought never ends") if rest is None else load(unfence(rest))


def load_tolerant(text: str) -> Parsed:
    """`load(text)` if that is JSON, so that a think tag in a string does no harm; else `load_inner(text)`."""
    raw = load(text)
    return raw if raw.ok else load_inner(text)


def unfence(text: str) -> str:
    """`text` without the one Markdown fence that surrounds it; any other text as it is, without outer white space."""
    body = text.strip(_WHITE)
    if len(body) < 6 or not body.startswith("```") or not body.endswith("```"):
        return body
    body = body[3:-3]
    tag, newline, rest = body.partition("\n")
    if newline and (not tag.strip() or tag.strip().isalnum()):
        return rest.strip(_WHITE)
    return (body[4:] if body[:4].lower() == "json" else body).strip(_WHITE)


def _problem_before(text: str) -> str | None:
    """What is wrong with a text before it is parsed."""
    if len(text) > MAX_CHARACTERS:
        return f"longer than {MAX_CHARACTERS:,} characters"
    if not text.strip(_WHITE):
        return "empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "an unpaired surrogate"
    depth = 0
    for token in _TOKEN.finditer(text):
        character = token[0][0]
        depth += (character in "[{") - (character in "]}")
        if depth > MAX_DEPTH:
            return f"nested deeper than {MAX_DEPTH}"
    return None


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key[:80]!r} occurs twice in one object")
        result[key] = value
    return result


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of more than {MAX_DIGITS:,} digits")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number too large to be finite")
    return value


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_real, parse_constant=_constant)
