"""Which option of a multiple-choice question a reply takes. Source of the contract: EVALS.md section 4.

The last anchored statement ("answer is", "answer:") decides; without one the last box; without a box a reply that is
only a letter. A letter somewhere in prose is never taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from evals.graders.answers import last_boxes, statement, visible
from evals.task import Grade, Metric

CHOICE_METRICS: dict[str, Metric] = {
    "accuracy": Metric("The letter that the reply takes is the gold letter."),
    "answered": Metric("One letter of an option could be read from the reply."),
}
_WRAPPERS = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf|left|right)(?![A-Za-z])|\\[()\[\]]|[{}$*`\"]")
_LEAD = re.compile(r"(?:the\s+)?(?:option|choice|letter)?\s*", re.IGNORECASE)


def grade_choice(text: str, gold_letter: str, votes: Mapping[str, str]) -> Grade:
    """Metrics `CHOICE_METRICS`. `votes`: letter to a name of its option that stays when the options are rotated.

    The name is the answer that votes: letters of different rotations cannot be counted together. ValueError if
    `gold_letter` is none of the letters, which a reply cannot cause.
    """
    if gold_letter not in votes:
        raise ValueError(f"gold letter {gold_letter!r} is none of {', '.join(votes)}")
    letter = chosen_letter(text, "".join(votes))
    if letter is None:
        return Grade({"accuracy": 0.0, "answered": 0.0}, None)
    return Grade({"accuracy": float(letter == gold_letter), "answered": 1.0}, votes[letter])


def chosen_letter(text: str, letters: str = "ABCD") -> str | None:
    """The option that a reply takes; None for no legal letter or several in the statement that decides.

    `letters`: the legal capitals. A small letter counts only where it stands alone.
    """
    rest = visible(text)
    if not rest:
        return None
    stated = statement(rest)
    if stated is not None:
        return _stated_letter(stated, letters)
    boxes = last_boxes(rest)
    if boxes is not None:
        return _stated_letter(boxes[0], letters) if len(boxes) == 1 else None
    alone = re.fullmatch(rf"[\W_]*([{letters}{letters.lower()}])[\W_]*", rest)
    return alone[1].upper() if alone else None


def _stated_letter(line: str, letters: str) -> str | None:
    """The letter at the start of a statement, if no other letter is stated with it.

    After "C)", "C." or "C:" comes the text of the option; there only a joined letter ("or D", "/ D") is a second one.
    """
    text = re.sub(r"\s+", " ", _WRAPPERS.sub(" ", line)).strip()
    text = text[_LEAD.match(text).end() :]  # type: ignore[union-attr]  # it matches the empty text
    if alone := re.fullmatch(rf"[\W_]*([{letters.lower()}])[\W_]*", text):
        return alone[1].upper()
    first = re.match(rf"[(\['‘]? ?([{letters}])(?!['’]?\w)['’]?( ?[)\].:])?", text)
    if first is None:
        return None
    rest = text[first.end() :]
    joined = rf"(?:\b(?:or|and|not|but|nor|maybe|either)\b|[,/&|;+-])[^\w]*(?:option |choice )?[^\w]*[{letters}](?!\w)"
    other = joined if first[2] else rf"(?<![\w'’])[{letters}](?![\w'’])"
    if re.search(joined, rest) or re.match(r"\W*(?:or|and|nor|not)\b", rest):
        return None
    return None if re.search(other, _first_sentence(rest)) else first[1]


def _first_sentence(text: str) -> str:
    return re.split(r"[.;!?] ", text + " ")[0]
