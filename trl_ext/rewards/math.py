"""Is the final answer of a solution equal to the gold answer? Exact for plain numbers, math-verify for the rest.

The answer is the last `\\boxed{...}`, else what follows the last `####` or "answer is", else a reply that is one short
line. The last number of a text is never taken: a thought that was cut off must not score. Source: EVALS.md section 4.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from trl_ext.rewards.checked import Reward
from trl_ext.rewards.math_process import MathProcess
from trl_ext.sandbox.rewards import reply_text

MAX_REPLY = 20_000
"""Characters of a reply that are read, counted from its end: the answer stands there."""
MAX_ANSWER = 300
"""Characters of an answer; a longer one is no answer."""
_ANCHOR = re.compile(r"(?:####|\banswer(?:\s+is|:))[ \t]*:?[ \t]*([^\n]{1,400})", re.IGNORECASE)
_NUMBER = re.compile(r"([-+]?)(?:(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?|(\.\d+))")
_FRACTION = re.compile(r"([-+]?)(?:(\d+)/(\d+)|\\[dt]?frac\{(\d+)\}\{(\d+)\})")
_DIGIT_RUN = re.compile(r"\d{40}")


def make_math_correct(seconds: float = 2.0) -> Reward:
    """The reward `math_correct`; an answer that takes math-verify longer than `seconds` counts as wrong."""
    if not 0 < seconds <= 60:
        raise ValueError(f"seconds must be above 0 and at most 60, got {seconds}")
    process = MathProcess(seconds)
    judge = functools.lru_cache(maxsize=10_000)(lambda answer, gold: equal(answer, gold, process))

    def math_correct(
        completions: Sequence[Any],
        answer: Sequence[Any] | None = None,
        solution: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """1.0 right, 0.0 wrong, None without a gold answer that can be read. Gold: column `answer`, else `solution`."""
        golds = answer if answer is not None else solution
        if golds is None:
            return [None] * len(completions)
        return [_reward(reply_text(c), gold, judge) for c, gold in zip(completions, golds, strict=True)]

    math_correct.needs_columns = [("answer", "solution")]  # type: ignore[attr-defined]
    return math_correct


def _reward(reply: str, gold: Any, judge: Any) -> float | None:
    wanted = None if gold is None else final_answer(str(gold))
    if wanted is None:
        return None
    found = final_answer(reply)
    if found is None:
        found = ""  # the gold must still be readable, or the row is left out for every reply
    verdict = judge(found, wanted)
    return None if verdict is None else float(verdict)


def final_answer(text: str) -> str | None:
    """The answer that a reply or a gold solution states, or None. Reads at most `MAX_REPLY` characters."""
    if "</think>" in text:
        text = text.rpartition("</think>")[2]
    elif "<think>" in text:
        return None
    text = text[-MAX_REPLY:].strip()
    found = _last_box(text)
    if found is None:
        anchored = _ANCHOR.findall(text)
        found = anchored[-1] if anchored else text if "\n" not in text else None
    found = None if found is None else found.strip().rstrip(".").strip("$ ")
    return found if found and len(found) <= MAX_ANSWER else None


def _last_box(text: str) -> str | None:
    """Content of the last `\\boxed{...}`, braces matched; "" if it is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + 6, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start + 7 : end]
    return ""


def exact_value(answer: str) -> Fraction | None:
    """The value of an integer, decimal or fraction, thousands separated by commas or not; None for all else."""
    if _DIGIT_RUN.search(answer):
        return None
    text = answer.replace(" ", "").replace("\\,", "").replace("\\$", "").replace("{,}", ",")
    if match := _NUMBER.fullmatch(text):
        return Fraction(text.replace(",", ""))
    if match := _FRACTION.fullmatch(text):
        sign, *parts = match.groups()
        top, bottom = (int(p) for p in parts if p is not None)
        return None if bottom == 0 else Fraction(-top if sign == "-" else top, bottom)
    return None


def equal(answer: str, gold: str, process: MathProcess) -> bool | None:
    """Whether the two denote the same value; None when the gold cannot be read.

    Two plain numbers that differ are different unless one of them may be a rounded fraction, which math-verify judges.
    """
    found, wanted = exact_value(answer), exact_value(gold)
    if wanted is not None and (answer == "" or found == wanted):
        return found == wanted
    if wanted is not None and found is not None and wanted.denominator == found.denominator == 1:
        return False
    if _DIGIT_RUN.search(answer):
        return process.verify("", gold)
    return process.verify(answer, gold)
