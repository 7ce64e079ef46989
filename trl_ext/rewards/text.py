"""Form and length of a reply as reward functions. Ours, no paper; bounded in time for any text and any pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evals.graders.schema import Schema, matches
from trl_ext.rewards.checked import Reward
from trl_ext.sandbox.rewards import reply_text

MAX_CHARACTERS = 1_000_000
"""A longer reply matches no pattern."""


def make_text_format(pattern: str) -> Reward:
    """`text_format`: 1 if `pattern` is found in the reply, else 0.

    The syntax is that of JSON Schema's `pattern` (ECMA 262): ^ and $ for the ends, [\\s\\S] for any character. Time is
    linear in the text. With look-around or back-references it is about half a second at the most: such a pattern is
    tried everywhere in a reply of up to 8,000 characters, in a longer one near the beginning alone unless ^ anchors it;
    where the steps do not suffice nothing is found (see `evals.graders.schema`).
    """
    try:
        Schema({"pattern": pattern})
    except ValueError as error:
        raise ValueError(f"pattern: {pattern!r} cannot be used: {error}") from error

    def text_format(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        texts = map(reply_text, completions)
        return [float(len(text) <= MAX_CHARACTERS and matches(pattern, text)) for text in texts]

    return text_format


def make_text_length(least: int = 0, most: int = 2000, ramp: int = 0, unit: str = "characters") -> Reward:
    """`text_length`: 0 for a reply of `least` to `most` units; outside -d/ramp, d units away, and not below -1.

    `ramp` 0: -1 everywhere outside. `unit`: characters of the reply, or tokens of the whole completion.
    """
    if not 0 <= least <= most or ramp < 0:
        raise ValueError(f"least {least}, most {most}, ramp {ramp}: expected 0 <= least <= most and ramp >= 0")
    if unit not in ("characters", "tokens"):
        raise ValueError(f"unit: {unit!r} is neither characters nor tokens")

    def text_length(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        measured = map(reply_text, completions) if unit == "characters" else kwargs["completion_ids"]
        away = [max(least - len(value), len(value) - most, 0) for value in measured]
        return [-min(d / ramp if ramp else float(d > 0), 1.0) for d in away]

    return text_length
