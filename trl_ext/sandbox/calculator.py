"""A calculator tool for language models: integers, + - * and brackets, no `eval`."""

from __future__ import annotations

import re
from itertools import pairwise

MAX_CHARACTERS = 64
MAX_MAGNITUDE = 10**9
MAX_DEPTH = 8
_TOKEN = re.compile(r"[0-9]{1,10}|[-+*()]")


class _Fault(Exception):
    """A reason, in words, why an expression has no value."""


def calculator(expression: str) -> str:
    """Work out an integer expression.

    Args:
        expression: Numbers with + - * and brackets, such as 12+5

    Returns:
        The value, or a text that starts with error.
    """
    if not isinstance(expression, str):
        return "error: expression must be text"
    if len(expression) > MAX_CHARACTERS:
        return f"error: at most {MAX_CHARACTERS} characters"
    try:
        return str(_Parser(_tokens(expression)).value())
    except _Fault as fault:
        return f"error: {fault}"


def _tokens(expression: str) -> list[str]:
    """The expression's numbers, operators and brackets."""
    # ASCII only: `str.isdigit` and `\d` would let other scripts' digits through.
    tokens = _TOKEN.findall(expression)
    adjacent = any(a.isdigit() and b.isdigit() for a, b in pairwise(tokens))
    if adjacent or "".join(tokens) != expression.replace(" ", ""):
        raise _Fault("only integers, + - * and brackets")
    return tokens


def _bounded(value: int) -> int:
    """`value`, if its magnitude is at most MAX_MAGNITUDE."""
    if abs(value) > MAX_MAGNITUDE:
        raise _Fault("number too large")
    return value


class _Parser:
    """Recursive descent over `sum = product {(+|-) product}`, `product = factor {* factor}`."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._at = 0

    def value(self) -> int:
        """Value of the whole expression."""
        value = self._sum(0)
        if self._at < len(self._tokens):
            raise _Fault("cannot read the expression")
        return value

    def _take(self, *options: str) -> str | None:
        if self._at < len(self._tokens) and self._tokens[self._at] in options:
            self._at += 1
            return self._tokens[self._at - 1]
        return None

    def _sum(self, depth: int) -> int:
        value = self._product(depth)
        while op := self._take("+", "-"):
            right = self._product(depth)
            value = _bounded(value + right if op == "+" else value - right)
        return value

    def _product(self, depth: int) -> int:
        value = self._factor(depth)
        while self._take("*"):
            value = _bounded(value * self._factor(depth))
        return value

    def _factor(self, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise _Fault("too many brackets")
        if self._take("-"):
            return -self._factor(depth + 1)
        if self._take("("):
            value = self._sum(depth + 1)
            if not self._take(")"):
                raise _Fault("a bracket is not closed")
            return value
        if self._at < len(self._tokens) and self._tokens[self._at].isdigit():
            self._at += 1
            return _bounded(int(self._tokens[self._at - 1]))
        raise _Fault("cannot read the expression")
