"""What is done to a reply before mathematics or a choice is read from it. JSON is judged on the raw text instead.

A thought may stand before the answer, between think tags. Source: EVALS.md section 4.
"""

from __future__ import annotations

import re
import unicodedata

_OPEN, _CLOSE = "<think>", "</think>"
_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUPERS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
_SIGNS = str.maketrans({"\u2212": "-", "\u2044": "/", "º": "°"})


def clean(text: str) -> str:
    """`text` without NUL, format characters and lone surrogates, in NFKC, with U+2212 as "-". Takes linear time.

    Raised digits become `^{2}` and vulgar fractions get a space before them: plain NFKC would turn 10² into 102 and
    3½ into 31/2. Of a run of combining marks the first four stay, since NFKC sorts a run in quadratic time.
    """
    if text.isascii():
        return text.replace("\0", "")
    text = text.translate({ord(c): None for c in set(text) if c == "\0" or unicodedata.category(c) in ("Cf", "Cs")})
    marks = "".join(re.escape(c) for c in set(text) if unicodedata.combining(c))
    if marks:
        text = re.sub(f"([{marks}]{{4}})[{marks}]+", r"\1", text)
    text = _SUPERS.sub(lambda m: f"^{{{m[0].translate(_SUPER)}}}", text.replace("º", "°"))
    text = _VULGAR.sub(lambda m: " " + m[0], text)
    return unicodedata.normalize("NFKC", text).translate(_SIGNS)


def after_thought(text: str) -> str | None:
    """The text after the last `</think>`, all of it without a think tag; None when a thought is left open."""
    rest = text.rpartition(_CLOSE)[2]
    return None if _OPEN in rest else rest
