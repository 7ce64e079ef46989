"""Does a reply give the gold answer? Exact for plain numbers; math-verify, in a process of its own, for the rest.

Source of the contract: EVALS.md sections 4 and 6.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from evals.graders.answers import ANCHOR, final_answer, is_expression
from evals.graders.math_process import MathProcess
from evals.graders.values import DIGITS, MAX_ANSWER, compact, exact_value, normal, percent_value
from evals.task import Grade, Metric

GRADER_VERSION = "math-1"
"""Changes with every change that can change a verdict. Verdicts are kept within one process, thus one version."""
SECONDS = 2.0
"""CPU time that one verdict may take."""
MATH_METRICS: dict[str, Metric] = {
    "accuracy": Metric("The final answer equals the gold answer."),
    "answered": Metric("A final answer could be read from the reply."),
}
_LONG_POWER = re.compile(r"(?:\^|\*\*)[\s{(+-]*[0-9]{5}")
_TOWER = re.compile(r"(?:\^|\*\*)\s*(?:\\?\w+|\([^()]*\))\s*(?:\^|\*\*)|(?:\^|\*\*)\s*(?:\{[^}]*|\([^)]*)(?:\^|\*\*)")
_HEAVY = re.compile(r"!|\\(?:sum|prod|int|iint|oint|lim|Gamma|[dt]?binom|choose)(?![A-Za-z])|\bfactorial\b|\bbinom")
_NOT_SINGLE = re.compile(
    r"[,;:<>=±≤≥≈∪∈…]"
    r"|\\(?:pm|mp|leq?|geq?|lt|gt|neq?|in|cup|cap|to|approx|sim|equiv|infty|[lc]?dots|begin)(?![A-Za-z])"
    r"|\\(?:implies|mapsto|[A-Za-z]*arrow|\\)|(?<!\\sqrt)\[|[0-9] *_|[0-9] +[0-9]|\\[{}]|\.\."
    r"|\\(?:text|mathrm|textbf|mbox)\b"
)
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]{3,}")


def grade_math(text: str, gold: str) -> Grade:
    """Metrics `MATH_METRICS`; the answer that votes is `canonical` of the final answer, so 0.5 and 1/2 vote together.

    `gold`: an answer without its solution, checked once by `check_gold`. Never raises on any text; RuntimeError only
    if math-verify cannot be started at all.
    """
    found = final_answer(text)
    if found is None:
        return Grade({"accuracy": 0.0, "answered": 0.0}, None)
    return Grade({"accuracy": float(equal(found, gold) is True), "answered": 1.0}, canonical(found))


def gold_answer(gold: str) -> str | None:
    """The answer in a gold column: that of a written solution, else the text itself if it is one short line."""
    found = final_answer(gold)
    if found is not None or ANCHOR.search(gold) or "\\boxed" in gold:
        return found
    line = gold.strip()
    return line if line and "\n" not in line and len(line) <= MAX_ANSWER else None


def check_gold(gold: str) -> str:
    """`gold`, if an answer can be compared with it; else ValueError. For whoever loads data."""
    if not gold.strip() or len(gold) > MAX_ANSWER or equal("", gold) is None:
        raise ValueError(f"the gold answer {gold[:80]!r} cannot be read as mathematics")
    return gold


def canonical(answer: str) -> str:
    """The exact value as text ("1/2", "50%"), else `compact` text."""
    value, percent = exact_value(answer), percent_value(answer)
    if value is not None:
        return str(value)
    return f"{percent}%" if percent is not None else compact(answer)


def equal(answer: str, gold: str, process: MathProcess | None = None) -> bool | None:
    """Whether both denote the same value; None when the gold cannot be read. "" equals nothing.

    Plain numbers are compared exactly, but for a decimal that is a fraction rounded to six places. `v%` equals v and
    v/100; 0.5 does not equal 50. A list, interval, relation or plus-minus equals no single number. `process`: the
    worker for the rest, by default one that all share.
    """
    process = process or shared_process()
    wanted, found = numbers(gold), numbers(answer)
    if wanted and (answer == "" or found):
        return equal_numbers(found, wanted)
    if answer and compact(answer) == compact(gold):
        return True
    if wanted and not (is_expression(normal(answer)) and not _NOT_SINGLE.search(normal(answer))):
        return False
    if {_is_set(answer), _is_set(gold)} == {True, False}:
        return False  # math-verify takes {1, 2} for (1, 2)
    if _WORDS.fullmatch(normal(gold)):  # math-verify would compare the products of the letters: east = seat
        return normal(answer).casefold() == normal(gold).casefold()
    return process.verify(normal(answer) if _is_safe(normal(answer), gold) else "", normal(gold))


def _is_set(text: str) -> bool | None:
    """Whether braces surround a list; False for other brackets, None for no brackets."""
    bare = compact(text)
    if bare.startswith("\\{") and bare.endswith("\\}"):
        return True
    return False if bare[:1] in ("(", "[") and bare[-1:] in (")", "]") else None


def numbers(text: str) -> tuple[Fraction, ...]:
    """What a plain number may stand for: its value; of `v%` v and v/100; nothing for any other text."""
    value = exact_value(text)
    if value is not None:
        return (value,)
    percent = percent_value(text)
    return () if percent is None else (percent, percent / 100)


def equal_numbers(found: tuple[Fraction, ...], wanted: tuple[Fraction, ...]) -> bool:
    """`equal` for what `numbers` gives of two texts."""
    if len(found) == len(wanted) == 2:
        return found == wanted
    return any(a == g for a in found for g in wanted) or (
        len(found) == len(wanted) == 1 and (_rounds_to(found[0], wanted[0]) or _rounds_to(wanted[0], found[0]))
    )


def _rounds_to(decimal: Fraction, value: Fraction) -> bool:
    """Whether `decimal`, of six or more places, is `value` rounded, where `value` has no end as a decimal."""
    return not _ends(value) and _ends(decimal) and round(decimal, 6) == round(value, 6) and (decimal * 10**5) % 1 != 0


def _ends(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _is_safe(answer: str, gold: str) -> bool:
    """Whether `answer` may go to sympy. What the gold answer contains itself is allowed."""
    if len(answer) > MAX_ANSWER or DIGITS.search(answer) or _LONG_POWER.search(answer) or _nesting(answer) > 20:
        return False
    return all(pattern.search(gold) or not pattern.search(answer) for pattern in (_TOWER, _HEAVY))


def _nesting(text: str) -> int:
    """Deepest nesting of brackets; 1000 when braces do not match, which could end the box around the text."""
    depth = deepest = braces = 0
    for character in re.sub(r"\\[{}]", "", text):
        depth += (character in "([{") - (character in ")]}")
        braces += (character == "{") - (character == "}")
        deepest = max(deepest, depth)
        if braces < 0:
            return 1000
    return deepest if braces == 0 else 1000


@functools.cache
def shared_process() -> MathProcess:
    """The worker that all threads of this Python process share; it keeps verdicts by gold and answer."""
    return MathProcess(SECONDS)
