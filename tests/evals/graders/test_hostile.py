"""Any text gets a verdict from every grader, in bounded time and without an exception."""

from __future__ import annotations

import random
import threading

import pytest

from evals.graders.choice import grade_choice
from evals.graders.math import grade_math
from evals.graders.schema import Schema, matches
from evals.graders.structured import grade_structured
from evals.task import Grade

VOTES = {"A": "a", "B": "b", "C": "c", "D": "d"}
SCHEMA = Schema(
    {
        "type": "object",
        "properties": {
            "a": {"$ref": "#"},
            "b": {"type": "array", "items": {"$ref": "#"}},
            "answer": {"type": "string", "format": "date", "pattern": "^(a+)+$"},
        },
        "patternProperties": {"^(x+)+$": {}},
        "required": ["answer"],
    }
)
# Pieces that the graders react to, mixed with noise: pure noise hardly ever reaches their depths.
PIECES = [
    r"\boxed{",
    "}",
    "{",
    "[",
    "]",
    '"',
    "\\",
    "answer is ",
    "Answer: ",
    "####",
    "<think>",
    "</think>",
    "```",
    "json",
]
PIECES += [
    "1",
    "9" * 45,
    ",",
    ".",
    "/",
    "%",
    "$",
    "^",
    r"\frac",
    r"\text{",
    " or ",
    " and ",
    "=",
    ":",
    "A",
    "B",
    "\n",
    " ",
]
PIECES += ['"answer": ', '"a": {', "\ud800", "\0", "\u0301", "½", "²", "e9", "-", "NaN", "true", "'", "!", r"\sqrt"]


def grades(text: str) -> list[Grade]:
    return [
        grade_math(text, "7"),
        grade_math(text, r"2\sqrt{2}"),
        grade_choice(text, "A", VOTES),
        grade_structured(text, SCHEMA, {"answer": "a"}, answer_key="answer"),
        grade_structured(text, SCHEMA, {"answer": 7}, style="fenced"),
    ]


def hostile(seed: int) -> str:
    rng = random.Random(seed)
    if seed % 2:
        return rng.randbytes(rng.randrange(200)).decode("utf-8", "surrogateescape")
    parts = [
        rng.choice(PIECES) if rng.random() < 0.9 else chr(rng.randrange(0x3000)) for _ in range(rng.randrange(40))
    ]
    return "".join(parts)


def test_ten_thousand_random_texts() -> None:
    answered = 0
    for seed in range(10_000):
        for grade in grades(hostile(seed)):
            assert all(0 <= v <= 1 or name.startswith("keys_") for name, v in grade.scores.items())
            answered += grade.answer is not None
    assert answered > 100, "the texts reach the graders' depths"


N = 100_000
LONG = [
    r"\boxed{" * N,
    r"\boxed{" * N + "}" * N,
    r"\boxed{1}" * N,
    r"\boxed{1} or " * N,
    r"\boxed{" + "(" * N + ")" * N + "}",
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{100000000!}",
    r"\boxed{" + "9" * 5000 + "}",
    r"\boxed{" + "1," * 140 + "}",
    r"\boxed{" + " " * 280 + "}",
    r"\boxed{" + "\\text{a}" * 37 + "1}",
    "answer is " * N,
    "answer is " + "1," * N,
    "answer is " + "a " * 9_000 + "1",
    "answer: $" + "a" * N,
    "#" * N,
    "Answer: " + "A " * N,
    "<think>" * N,
    "</think>" * N,
    "[" * N,
    '{"a":' * N,
    '{"answer": "' + "\\" * N,
    '{"answer": "' + "a" * N + 'b"}',
    '{"' + "x" * N + 'y": 1}',
    '{"answer": ' + "9" * N + "}",
    '{"answer": 1e' + "9" * N + "}",
    '{"a": ' * 190 + "1" + "}" * 190,
    '{"b": [' + "{}," * N + "{}]}",
    "```" * N,
    " " * N,
    "\n" * N,
    "\0" * N,
    "a" + "\u0301" * N + "\u0327" * N,
    "\ufdfa" * N,  # NFKC makes 18 characters of one
    "½" * N,
    "{'" * N,
    "1 " * N,
    "1," * N,
    "x" * N + "=1",
    "-" * N,
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_long_and_malicious_texts(text: str) -> None:
    found = grades(text)
    assert [grade.scores.get("accuracy", 0.0) for grade in found[:3]] == [0.0] * 3


LOOKING = [r"(?=.*b.*c)d", r"(?=[\s\S]*(b|c)d)e", r"^(?:(?=.*z)a|.)*$", r"(?=\w*é)(\w)\1x", r"(?!(.*,){20}z)q"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pattern", LOOKING)
def test_patterns_with_look_around_end(pattern: str) -> None:
    """Each step may read the whole text, so 100,000 of them would take minutes: in texts, in many texts, and in keys."""
    assert not matches(pattern, "a" * 900_000 + "!")
    assert not matches(pattern, "é" * 900_000 + "!")
    texts = Schema({"items": {"pattern": pattern}})
    assert not texts.valid(["a" * 20_000 + "!"] * 40)
    keys = Schema({"patternProperties": {pattern: {}}, "additionalProperties": False})
    value = {f"{'a' * 20_000}!{i}": 1 for i in range(40)}
    assert keys.key_counts(value) == (40, 40) and not keys.valid(value)


def test_look_around_still_finds() -> None:
    """Everywhere in 8,000 characters; where ^ anchors it, in any text. Texts without such a pattern have no limit."""
    assert matches(r"(?<!a)b", "a" * 7_998 + "cb") and not matches(r"(?<!a)b", "a" * 7_999 + "b")
    assert matches(r"^(?!.*bad)[\s\S]*end$", "a" * 900_000 + "end")
    assert not matches(r"^(?!.*bad)[\s\S]*end$", "a" * 900_000 + "bad end")
    assert matches(r"ab", "a" * 900_000 + "b")
    assert Schema({"items": {"pattern": "^(?!b)"}}).valid(["a" * 900_000] * 3)


def test_a_thread_gives_the_verdicts_of_the_main_thread() -> None:
    texts = [hostile(seed) for seed in range(300)]
    here = [grades(text) for text in texts]
    there: list[list[Grade]] = []
    thread = threading.Thread(target=lambda: there.extend(grades(text) for text in texts))
    thread.start()
    thread.join()
    assert there == here
