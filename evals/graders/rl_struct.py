"""The five reward terms of RL-Struct (arXiv 2512.00319, Eqs. 1 to 5) as pure functions of one completion.

R_total = 1.0 R_valid + 1.0 R_struct + 0.5 R_format + 0.5 R_correct + 0.1 R_length, in [-0.01, 2.9]. Where the paper is
silent, the decisions are those of our method card: keys as quoted text, fence-tolerant validity, whitespace tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from evals.graders.strict_json import load, load_tolerant

Style = Literal["raw", "fenced"]
WEIGHTS: dict[str, float] = {"valid": 1.0, "struct": 1.0, "format": 0.5, "correct": 0.5, "length": 0.1}
"""Card: paper section 3, stated."""
LENGTH = (10, 2000)
"""L_min and L_max in characters. Card: ours, the paper gives none."""


def struct(text: str, keys: Iterable[str]) -> float:
    """R_struct: 1 if each of `keys` stands in the text as a quoted key, parseable or not (Eq. 1)."""
    return float(all(json.dumps(key, ensure_ascii=False) in text for key in keys))


def form(text: str, style: Style = "fenced") -> float:
    """R_format: 0.5 for a closed Markdown code block, 0.3 more if one is tagged json (Eq. 2).

    `style` "raw", ours: 0.8 if the text as it stands is JSON.
    """
    if style == "raw":
        return 0.8 * load(text).ok
    parts = text.split("```")
    blocks = parts[1 : len(parts) - 1 : 2]  # what stands after an odd fence, where another follows
    tagged = any(block[:4].lower() == "json" for block in blocks)
    return (0.5 if blocks else 0.0) + (0.3 if tagged else 0.0)


def valid(text: str) -> float:
    """R_valid: 1 if the text, without thought and fence, is JSON (Eq. 3)."""
    return float(load_tolerant(text).ok)


def correct(text: str, gold: Any) -> float:
    """R_correct: `content_f1` of the parsed text; 0 if it cannot be parsed (Eq. 4)."""
    parsed = load_tolerant(text)
    return content_f1(parsed.value, gold) if parsed.ok else 0.0


def length(text: str, low: int = LENGTH[0], high: int = LENGTH[1]) -> float:
    """R_length: -0.1 if the text has fewer than `low` or more than `high` characters (Eq. 5)."""
    return 0.0 if low <= len(text) <= high else -0.1


def terms(
    text: str, keys: Iterable[str], gold: Any, style: Style = "fenced", limits: tuple[int, int] = LENGTH
) -> dict[str, float]:
    """All five terms by name."""
    return {
        "valid": valid(text),
        "struct": struct(text, keys),
        "format": form(text, style),
        "correct": correct(text, gold),
        "length": length(text, *limits),
    }


def total(values: Mapping[str, float]) -> float:
    """R_total: the terms of one completion weighted by `WEIGHTS`."""
    return sum(weight * values[name] for name, weight in WEIGHTS.items())


def content_f1(value: Any, gold: Any) -> float:
    """Token F1 = 2 PR/(P + R) of values; keys do not count.

    If `gold` is an object, of `value` only the keys that `gold` has are read. Tokens: leaf values as text, in small
    letters, split at white space, counted with repetition. 1 if neither has a token.
    """
    if isinstance(gold, dict):
        value = {key: value[key] for key in gold if key in value} if isinstance(value, dict) else {}
    found, wanted = Counter(_tokens(value)), Counter(_tokens(gold))
    if not found and not wanted:
        return 1.0
    return 2 * (found & wanted).total() / (found.total() + wanted.total())


def _tokens(value: Any) -> Iterator[str]:
    if isinstance(value, (dict, list)):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _tokens(below)
    elif isinstance(value, str):
        yield from value.lower().split()
    else:
        number = int(value) if isinstance(value, float) and value.is_integer() else value
        yield json.dumps(number)
