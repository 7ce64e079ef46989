"""Which part of a reply is its final answer. Source: EVALS.md section 4.

The last `\\boxed{...}`; without a box what the last `####`, "answer is" or "answer:" states; without an anchor the
reply itself when it is one number or expression. The last number of a text is never taken: a cut-off thought must not
score.
"""

from __future__ import annotations

import re

from evals.graders.text import after_thought, clean
from evals.graders.values import MAX_ANSWER, exact_value, normal, percent_value

MAX_REPLY = 20_000
"""Characters of a reply that are read, counted from its end: the answer stands there."""
ANCHOR = re.compile(r"(?<!#)####(?!#)|\banswer[*_` ]*(?:\bis\b|:)[*_` ]*:?", re.IGNORECASE)
_BOX = re.compile(r"\\boxed\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_JOINT = re.compile(
    r"(?:[,/\s$~*]|\\[()\[\],; ]|\\q?quad|\\(?:text|mathrm)\{\s*(?:,?\s*or|,?\s*and|,)\s*\}|\b(?:or|and)\b)*"
)
_HEDGE = re.compile(r"\b(?:or|maybe|perhaps|possibly|either|not|unknown|unsure)\b|\?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.;!?](?=\s|$)|,?\s(?:because|since|which|as)\b", re.IGNORECASE)
_MATHS = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_NUMBER_IN_PROSE = re.compile(r"([-+]?\s?\\?[$£€¥]?\s?[-+]?[0-9][0-9,./]*%?)(?:\s+([^0-9\\=<>+*/^]*))?")
_SCALE = re.compile(
    r"\b(?:and|hundred|thousand|million|billion|trillion|dozen|percent|half|thirds?|quarters?|less|more)\b"
)
_FUNCTION = re.compile(r"pi|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|max|min|gcd|lcm|mod|cup|cap", re.IGNORECASE)


def visible(text: str) -> str | None:
    """The cleaned end of the reply after its thought; None when the thought never ends."""
    rest = after_thought(clean(text))
    return None if rest is None else rest[-MAX_REPLY:].strip()


def final_answer(text: str) -> str | None:
    """The answer that a reply or a written solution states; None if it states none, or hedges.

    Neighbouring boxes with different values give their list, "3, 4".
    """
    rest = visible(text)
    if not rest:
        return None
    boxes = last_boxes(rest)
    if boxes is not None:
        found: str | None = ", ".join(boxes)
    elif anchored := statement(rest):
        found = _stated(anchored)
    else:
        found = rest if is_expression(rest) or _is_number(rest) else None
    found = None if found is None else found.strip().rstrip(".").strip()
    return found if found and len(found) <= MAX_ANSWER else None


def last_boxes(text: str) -> list[str] | None:
    """Contents of the last box and of the boxes joined to it, without repeated values; None if there is no box.

    A list is joined by "or", "and", comma, slash or nothing. Of nested boxes the inner one counts. [""] when the last
    box is empty or never closed. Takes linear time: each box is read once, up to the next.
    """
    starts = list(_BOX.finditer(text))
    if not starts:
        return None
    found: list[str] = []
    after = len(text)
    for start in reversed(starts):
        end = _closing(text, start.end(), after)
        if end is None or (found and not _JOINT.fullmatch(text, end + 1, after)):
            break
        content = text[start.end() + 1 : end].strip()
        if content and not any(_same(content, other) for other in found):
            found.insert(0, content)
        if not found or len(found) > MAX_ANSWER:
            break
        after = start.start()
    return found or [""]


def _closing(text: str, start: int, stop: int) -> int | None:
    """Where the brace that opens at `start` is closed before `stop`."""
    if text[start : start + 1] != "{":
        return None
    depth = 0
    for brace in _BRACE.finditer(text, start, stop):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return brace.start()
    return None


def _same(one: str, other: str) -> bool:
    first, second = exact_value(one), exact_value(other)
    return first == second if first is not None and second is not None else normal(one) == normal(other)


def statement(text: str) -> str | None:
    """The line after the last anchor (the next line with text, if the anchor ends its own); None without an anchor."""
    end = max((match.end() for match in ANCHOR.finditer(text)), default=None)
    if end is None:
        return None
    lines = (line.strip(" \t\r*_:") for line in text[end:].split("\n", 9)[:9])
    return next((line for line in lines if line not in ("", "$$", "\\[")), " ")


def _stated(line: str) -> str | None:
    """The one number or expression that an anchored line states."""
    line = line.replace("**", "").strip(" `")
    if _HEDGE.search(line):
        return None
    if maths := _MATHS.match(line):
        tail = line[maths.end() :]
        inner = next(group for group in maths.groups() if group is not None)
        if is_expression(inner) or _is_number(inner):
            return None if re.search("[0-9]", _SENTENCE_END.split(tail)[0]) or _SCALE.search(tail) else inner
    sentence = _SENTENCE_END.split(line)[0].strip()
    if is_expression(sentence) or _is_number(sentence):
        return sentence
    number = _NUMBER_IN_PROSE.fullmatch(sentence)
    return None if number is None or _SCALE.search(number[2] or "") else number[1].strip(" ,./")


def is_expression(text: str) -> bool:
    """Whether `text` is a formula on one line, with no words but names of functions and text wrappers."""
    if not text or "\n" in text or len(text) > MAX_ANSWER or _HEDGE.search(text):
        return False
    bare = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+", " ", text)
    return all(_FUNCTION.fullmatch(word) for word in re.findall("[^\\W\\d_]{2,}", bare)) and (
        "#" not in bare and re.search(r"\w", text) is not None
    )


def _is_number(text: str) -> bool:
    return exact_value(text) is not None or percent_value(text) is not None
