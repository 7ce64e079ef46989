"""The default recipe's two rewards, in TRL's signature: is the reply strict JSON, and is the answer right?"""

from __future__ import annotations

import json
from typing import Any

MAX_CHARACTERS = 2000
MAX_STEPS = 16
MAX_DIGITS = 9
Completion = str | list[dict[str, Any]]


def reply_text(completion: Completion) -> str:
    """The text of a completion: the string itself, or the content of its last assistant turn."""
    if isinstance(completion, str):
        return completion
    turns = [turn for turn in completion if turn.get("role") == "assistant"]
    content = turns[-1].get("content") if turns else None
    return content if isinstance(content, str) else ""


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError("number too large")
    return int(digits)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def parse_reply(text: str) -> dict[str, Any] | None:
    """`{"steps": [str, ...], "answer": int}` if `text` is exactly one such JSON object, else None.

    Strict: no other key, no repeated key, no NaN, at most `MAX_STEPS` steps, `MAX_DIGITS` digits and
    `MAX_CHARACTERS` characters.
    """
    # The depth of the one legal shape is two; a deeper text is refused before the parser could recurse into it.
    if len(text) > MAX_CHARACTERS or text.count("[") + text.count("{") > MAX_CHARACTERS // 4:
        return None
    try:
        value = json.loads(text, parse_int=_integer, parse_constant=_refuse, object_pairs_hook=_once)
    except ValueError:
        return None
    if not isinstance(value, dict) or value.keys() != {"steps", "answer"}:
        return None
    steps = value["steps"]
    if not isinstance(steps, list) or len(steps) > MAX_STEPS or not all(isinstance(step, str) for step in steps):
        return None
    return value if type(value["answer"]) is int else None


def json_valid(completions: list[Completion], **kwargs: Any) -> list[float]:
    """1.0 for each completion that `parse_reply` accepts, else 0.0."""
    return [float(parse_reply(reply_text(completion)) is not None) for completion in completions]


def answer_correct(completions: list[Completion], answer: list[str], **kwargs: Any) -> list[float]:
    """1.0 for each completion that is valid and whose answer equals `answer` (an integer as text), else 0.0."""
    values = [parse_reply(reply_text(completion)) for completion in completions]
    return [float(v is not None and str(v["answer"]) == a) for v, a in zip(values, answer, strict=True)]
