"""The exact value of a plain number as people write it: 1,234 or 1\\,234, $5, 3/4, 3 1/2, x = 7, 90^\\circ, 5 cm."""

from __future__ import annotations

import re
from fractions import Fraction

DIGITS = re.compile(r"[0-9]{40}")
"""A run of digits that is too long to be a value."""
MAX_ANSWER = 300
"""Characters of an answer; a longer one is no answer."""

_WRAP = r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|hbox|operatorname)\s*\{([^{}]*)\}"
_WHOLE_WRAP = re.compile(rf"(?:{_WRAP}|\{{([^{{}}]*)\}})")
_SIZES = re.compile(r"\\(?:left|right|displaystyle|big|Big|bigl|bigr|Bigl|Bigr)(?![A-Za-z])")
_SPACES = re.compile(r"(?:(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])|\s)+")
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"
_NUMBER = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
_DECIMAL = re.compile(rf"([-+]?) ?({_NUMBER})(?:[eE]([-+]?[0-9]{{1,3}}))?")
_TIMES_TEN = re.compile(
    rf"([-+]?) ?({_NUMBER}) ?(?:\\times|\\cdot|[*x×·]) ?10 ?\^ ?(?:\{{([-+]?[0-9]{{1,3}})\}}|([0-9]))"
)
_SLASH = re.compile(rf"([-+]?) ?({_NUMBER}) ?/ ?([-+]?{_NUMBER})")
_MIXED = re.compile(r"([-+]?) ?([0-9]+) ([0-9]+) ?/ ?([0-9]+)")
_FRAC = re.compile(
    rf"([-+]?) ?([0-9]*) ?\\frac ?(?:\{{ ?([-+]?{_NUMBER}) ?\}}|([0-9])) ?(?:\{{ ?({_NUMBER}) ?\}}|([0-9]))"
)
_CURRENCY = re.compile(r"([-+]?) ?(?:US)?(?:\\?\$|[£€¥]) ?")
_CURRENCY_AFTER = re.compile(r" ?(?:\\?\$|[£€¥])$")
_DEGREES = re.compile(r" ?(?:\^ ?(?:\\circ|\{ ?\\circ ?\})|\\degree|\\circ|°) ?[CF]?$")
_UNIT = re.compile(
    rf"(?<=[0-9}}.])((?: ?/? ?{_WRAP}(?:\^\{{?[1-4]\}}?)?)+"
    r"| ?[A-Za-z]{2,}(?:[ /][A-Za-z]+){0,3}(?:\^\{?[1-4]\}?)?)$"
)
_SHORT_UNIT = re.compile(r"cm|mm|km|kg|mg|ml|mi|ft|lbs?|oz|hrs?|min|mph|sec", re.IGNORECASE)
_NO_UNIT = re.compile(
    r"(?:hundred|thousand|million|billion|trillion|dozen|score|half|halve|third|quarter|fourth|fifth|tenth)s?"
    r"|squared|cubed|factorial|percent|mod|and|or|not|to|plus|minus|times|over|choose|less|more|than|of|off"
    r"|pi|sqrt|sin|cos|tan|log|ln|exp|infinity|inf|nan",
    re.IGNORECASE,
)
"""Words after a number that change its value or its number."""
_GREEK = r"\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|ell|angle|triangle|overline|text|mathrm)(?![A-Za-z])"
_NOT_IN_A_NAME = re.compile(rf"_(?:\{{[^{{}}]*\}}|\w)|\([^()]*\)|{_GREEK}")
_NAME = re.compile(r"(?!\s*[-+])[A-Za-z{}+' -]*[A-Za-z}'][ {}]*|\s*")


def normal(answer: str) -> str:
    """`answer` without mathematics delimiters, sizes, needless spaces, a whole text wrapper or a last full stop."""
    text = _SIZES.sub("", answer.replace("\\!", "").replace("{,}", ","))
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text).replace("\\%", "%")
    text = re.sub(r"\\[()\[\]]|\*\*|`|\$\$", " ", text)
    text = _SPACES.sub(" ", text).strip().rstrip(". ")
    while match := _WHOLE_WRAP.fullmatch(text):
        text = (match[1] or match[2] or "").strip().rstrip(". ")
    return text[1:-1].strip().rstrip(". ") if len(text) > 1 and text[0] == text[-1] == "$" else text


def compact(answer: str) -> str:
    """`normal(answer)` without spaces, but for those between two digits: 5 6 is not 56."""
    return re.sub("(?<![0-9]) | (?![0-9])", "", normal(answer))


def right_side(text: str) -> str:
    """`v` of `x = v`, where `x` is a name such as `m+n`, `x_1`, `f(2)`; any other text as it is."""
    left, equals, right = text.partition("=")
    if not equals or "=" in right or not re.search("[A-Za-z]", left):
        return text
    return right.strip() if _NAME.fullmatch(_NOT_IN_A_NAME.sub("", left)) else text


def exact_value(answer: str) -> Fraction | None:
    """The value of an integer, decimal, fraction or mixed number, units and currency dropped; None for all else.

    A percentage is no plain number (see `percent_value`).
    """
    return _value(_bare(answer))


def percent_value(answer: str) -> Fraction | None:
    """`v` of `v%` or `v percent`; None for all else."""
    text = re.sub(r" ?(?:\\text\{ ?percent\}|percent)$", "%", right_side(normal(answer)))
    return _value(text[:-1].rstrip()) if text.endswith("%") else None


def _bare(answer: str) -> str:
    text = right_side(normal(answer))
    text = _CURRENCY.sub(r"\1", text, count=1) if _CURRENCY.match(text) else _CURRENCY_AFTER.sub("", text)
    text = _DEGREES.sub("", text)
    unit = _UNIT.search(text)
    return text[: unit.start()].rstrip() if unit and _is_unit(unit[1]) else text


def _is_unit(text: str) -> bool:
    words = re.findall("[A-Za-z]+", re.sub(r"\\[a-z]+", "", text))
    if any(_NO_UNIT.fullmatch(word) for word in words):
        return False
    if "\\" in text or " or " in text:
        return not re.search("[0-9]", re.sub(r"\^\{?[1-4]\}?", "", text))
    return _SHORT_UNIT.fullmatch(words[0]) is not None or (text.startswith(" ") and len(words[0]) > 2)


def _value(text: str) -> Fraction | None:
    if len(text) > MAX_ANSWER or DIGITS.search(text):
        return None
    if match := _DECIMAL.fullmatch(text) or _TIMES_TEN.fullmatch(text):
        sign, number, *powers = match.groups()
        power = next((int(p) for p in powers if p), 0)
        return _signed(sign, _fraction(number) * Fraction(10) ** power)
    if match := _MIXED.fullmatch(text):
        sign, whole, top, bottom = match.groups()
        if int(top) < int(bottom):
            return _signed(sign, int(whole) + Fraction(int(top), int(bottom)))
    if match := _SLASH.fullmatch(text):
        return _ratio(match[1], "", match[2], match[3])
    if match := _FRAC.fullmatch(text):
        return _ratio(match[1], match[2], match[3] or match[4], match[5] or match[6])
    return None


def _fraction(number: str) -> Fraction:
    return Fraction(number.replace(",", "").replace(" ", ""))


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _ratio(sign: str, whole: str, top: str, bottom: str) -> Fraction | None:
    divisor = _fraction(bottom)
    return _signed(sign, int(whole or 0) + _fraction(top) / divisor) if divisor else None
