"""Broken JSON made readable, for one purpose: to see what an answer would have been worth in the right format.

One linear pass from the first bracket. Mended: prose around the value, a missing end, trailing commas, single quotes,
bare words and keys, thousands separators, Python's literals, raw line breaks in strings.
"""

from __future__ import annotations

import json
import re
from typing import Any

from evals.graders.strict_json import MAX_CHARACTERS, MAX_DEPTH, MAX_DIGITS

_TOKEN = re.compile(
    r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?'
    r"|(?<![\w])'(?:[^'\\\n]|\\.)*+'"
    r"|[-+]?[0-9]{1,3}(?:,[0-9]{3})++(?:\.[0-9]+)?(?=\s*[,}\]])|[\[\]{}:,]|[^\s\[\]{}:,\"]++",
    re.DOTALL,
)
_LITERALS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_NUMBER = re.compile(rf"-?(?:0|[1-9][0-9]{{0,{MAX_DIGITS}}})(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{{1,3}})?")
_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")


def repaired(text: str) -> Any:
    """The JSON value that `text` was meant to be, or None. A duplicate key keeps its last value."""
    start = min((i for i in (text.find("{"), text.find("[")) if i >= 0), default=-1)
    if start < 0 or len(text) > MAX_CHARACTERS:
        return None
    try:
        return json.loads(_mended(text, start), strict=False)
    except (ValueError, RecursionError):
        return None


def _mended(text: str, start: int) -> str:
    out: list[str] = []
    closers: list[str] = []
    for match in _TOKEN.finditer(text, start):
        token = match[0]
        if token in "]}":
            _drop_comma(out)
            out.append(closers.pop())  # the loop ends with the first bracket, so one is open
        else:
            if token in "[{":
                closers.append("]" if token == "[" else "}")
            if token in "[{:," or token[0] == '"' or not out or out[-1] in "[{:,":  # else a unit, as in `18 dollars`
                out.append(_mended_token(token, in_array=closers[-1] == "]"))
        if not closers or len(closers) > MAX_DEPTH:
            break
    _drop_comma(out)
    return " ".join(out + closers[::-1])


def _drop_comma(out: list[str]) -> None:
    if out and out[-1] == ",":
        out.pop()


def _mended_token(token: str, in_array: bool) -> str:
    if token in "[{:,":
        return token
    if token[0] == '"':
        return token if _is_closed(token) else token.rstrip("\\") + '"'
    if token[0] == "'":
        return json.dumps(token[1:-1])
    if _THOUSANDS.fullmatch(token):
        return token if in_array else token.replace(",", "").lstrip("+")
    return _LITERALS.get(token) or (token if _NUMBER.fullmatch(token) else json.dumps(token))


def _is_closed(token: str) -> bool:
    """Whether a token that ends in a quote after backslashes ends its string: their number is even."""
    body = token[:-1]
    return len(token) > 1 and token[-1] == '"' and (len(body) - len(body.rstrip("\\"))) % 2 == 0
