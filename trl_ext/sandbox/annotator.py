"""A rule-based annotator for the sandbox's replies: where is the root cause, or the decisive step?

It compares the reply's equations with the solution in the row, so it needs no model and gives the same spans always.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from trl_ext.annotate.base import Request, Span
from trl_ext.sandbox.problems import apply
from trl_ext.sandbox.rewards import MAX_CHARACTERS, parse_reply

# Numbers of at most nine digits: what a model wrote must not cost time.
_EQUATION = re.compile(r"(?<![0-9])([0-9]{1,9})([-+*])([0-9]{1,9})=([0-9]{1,9})(?![0-9])")
Equation = tuple[int, str, int, int]


def rule_annotator(requests: Sequence[Request]) -> list[list[Span]]:
    """Spans of each request: at most one error span if wrong, the decisive and the final step if right.

    A request's `row` needs the column `solution`. An empty list means: unsure.
    """
    return [_key_spans(request) if request.correct else _error_spans(request) for request in requests]


def read_equations(segments: Sequence[str]) -> list[tuple[int, Equation]]:
    """(segment id, equation) of every equation such as `3*4=12`, in order."""
    found = []
    for index, segment in enumerate(segments):
        for left, op, right, value in _EQUATION.findall(segment[:MAX_CHARACTERS]):
            found.append((index, (int(left), op, int(right), int(value))))
    return found


def _expected(request: Request) -> list[Equation]:
    return [equation for _, equation in read_equations([str(request.row["solution"])])]


def _error_spans(request: Request) -> list[Span]:
    """The first equation that is off, else where the text stops being the asked JSON, else an answer that is off."""
    span = _wrong_equation(request) or _format_error(request) or _wrong_answer(request)
    return [span] if span else []


def _wrong_equation(request: Request) -> Span | None:
    """The first equation that differs from the solution's in the same place, and why; a missing one counts."""
    found, expected = read_equations(request.segments), _expected(request)
    for (index, (left, op, right, value)), (_, op_, right_, value_) in zip(found, expected, strict=False):
        if apply(op, left, right) != value:
            return Span((index,), "arithmetic_slip")
        if op != op_:
            return Span((index,), "wrong_equivalence")
        if right != right_ or value != value_:
            return Span((index,), "wrong_constraint")
    if found and len(found) < len(expected):
        return Span((found[-1][0],), "premature_conclusion")
    return None


def _format_error(request: Request) -> Span | None:
    """The segment at which strict parsing of the reply fails; for something left out, the segment before the gap."""
    text = "\n".join(request.segments)
    if not request.segments or parse_reply(text) is not None:
        return None
    offset = len(text)  # of a text that is too large, or JSON of another shape: the end
    if len(text) <= MAX_CHARACTERS:
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            offset = error.pos
        except (ValueError, RecursionError):  # a giant number, or nesting without end
            return None
    return Span((_segment_at(request.segments, offset),), "format_error")


def _segment_at(segments: Sequence[str], offset: int) -> int:
    """The segment that holds `offset` of the joined text; the one before if nothing but a key precedes it there."""
    for index, segment in enumerate(segments):
        if offset <= len(segment):
            left_out_before = segment[:offset].strip() in ("", '"answer"')
            return index - 1 if left_out_before and index > 0 else index
        offset -= len(segment) + 1
    return len(segments) - 1


def _wrong_answer(request: Request) -> Span | None:
    """The segment of a final answer that is not the value of the last equation."""
    reply, found = parse_reply("\n".join(request.segments)), read_equations(request.segments)
    if reply is None or not found or reply["answer"] == found[-1][1][3]:
        return None
    return Span((len(request.segments) - 1,), "wrong_equivalence")


def _key_spans(request: Request) -> list[Span]:
    """The equation that changes the value most: `final_verification` if it closes several steps, else `key_formula`."""
    found = read_equations(request.segments)
    if not found:
        return []
    position = max(range(len(found)), key=lambda i: abs(found[i][1][3] - found[i][1][0]))
    closes = 0 < position == len(found) - 1
    return [Span((found[position][0],), "final_verification" if closes else "key_formula")]
