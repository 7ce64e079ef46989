"""RL-Struct's worked example to six decimals, and what each structured metric counts."""

from __future__ import annotations

import json
import statistics

import pytest

from evals.graders import rl_struct
from evals.graders.schema import Schema
from evals.graders.structured import NEEDS_GOLD, STRUCTURED_METRICS, grade_structured, has_type

GSM = Schema(
    {
        "type": "object",
        "properties": {"reasoning": {"type": "string"}, "answer": {"type": "number"}},
        "required": ["reasoning", "answer"],
        "additionalProperties": False,
    }
)
GOLD = {"reasoning": "2+2 is 4", "answer": 4}
ONE = '{"reasoning": "2+2 is 4", "answer": 4}'
SIX = [
    ONE,
    f"```json\n{ONE}\n```",
    ONE[:-1],
    '{"reasoning": "2+2 is 5", "answer": 5, "note": "x"}',
    '{"answer": 4}',
    "The answer is 4.",
]


def scores(text: str, gold: object = GOLD, key: str | None = "answer", **options: object) -> dict[str, float]:
    return dict(grade_structured(text, GSM, gold, answer_key=key, **options).scores)  # type: ignore[arg-type]


# The worked example of the method card


def test_the_terms_of_the_worked_example() -> None:
    keys = ["reasoning", "answer"]
    found = [rl_struct.terms(text, keys, GOLD, limits=(10, 200)) for text in SIX]
    expected = {
        "struct": [1, 1, 1, 1, 0, 0],
        "format": [0, 0.8, 0, 0, 0, 0],
        "valid": [1, 1, 0, 1, 1, 0],
        "correct": [1, 1, 0, 0.5, 0.4, 0],
        "length": [0] * 6,
    }
    for name, values in expected.items():
        assert [terms[name] for terms in found] == pytest.approx(values, abs=1e-6)
    totals = [rl_struct.total(terms) for terms in found]
    assert totals == pytest.approx([2.5, 2.9, 1.0, 2.25, 1.2, 0.0], abs=1e-6)
    mean, std = statistics.fmean(totals), statistics.stdev(totals)
    advantages = [(value - mean) / (std + 1e-4) for value in totals]
    card = [0.783993, 1.149350, -0.586092, 0.555646, -0.403414, -1.499482]
    assert advantages == pytest.approx(card, abs=1e-6)


def test_the_metrics_of_the_worked_example() -> None:
    found = [scores(text, style="fenced") for text in SIX]
    expected = {
        "structural_accuracy": 0.666667,
        "structural_accuracy_strict": 0.5,
        "json_validity": 0.666667,
        "json_validity_raw": 0.5,
        "key_recall": 0.583333,
        "content_f1": 0.483333,
        "answer_accuracy": 0.5,
        "format_consistency": 1 / 6,
        "schema_valid": 1 / 3,
        "valid_and_correct": 1 / 3,
        "answer_accuracy_lenient": 2 / 3,  # the third, closed
        "key_precision": (1 + 1 + 0 + 2 / 3 + 1 + 0) / 6,
        "type_accuracy": (1 + 1 + 0 + 1 + 1 / 2 + 0) / 6,
    }
    for name, value in expected.items():
        assert statistics.fmean(s[name] for s in found) == pytest.approx(value, abs=1e-6), name
    assert sum(s["keys_invented"] for s in found) / sum(s["keys_all"] for s in found) == 1 / 8
    # content accuracy, Eq. 7, with the card's stand-in for a judge: 5 if the number matches, else 1
    content = [0.4 * s["content_f1"] + 0.6 * (5 if s["answer_accuracy"] else 1) / 5 for s in found]
    assert statistics.fmean(content) == pytest.approx(0.553333, abs=1e-6)


# The terms


@pytest.mark.parametrize(
    ("text", "fenced", "raw"),
    [
        (ONE, 0.0, 0.8),
        (f"```json\n{ONE}\n```", 0.8, 0.0),
        (f"```\n{ONE}\n```", 0.5, 0.0),
        ("x ```python\ny\n``` z ```JSON\n{}\n```", 0.8, 0.0),
        ("```json\n{}", 0.0, 0.0),
        ("``` a ``` ```json", 0.5, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_form(text: str, fenced: float, raw: float) -> None:
    assert rl_struct.form(text) == pytest.approx(fenced)
    assert rl_struct.form(text, "raw") == raw


def test_the_terms_of_an_empty_text_and_of_text_that_is_hardly_json() -> None:
    empty = rl_struct.terms("", ["a"], {"a": 1})
    assert empty == {"valid": 0, "struct": 0, "format": 0, "correct": 0, "length": -0.1}
    assert rl_struct.total(empty) == pytest.approx(-0.01)
    for text in ('{"a": NaN}', '{"a": 1, "a": 1}', '{"a": 1,}'):
        assert rl_struct.valid(text) == rl_struct.correct(text, {"a": 1}) == 0
        assert rl_struct.struct(text, ["a"]) == 1
    for text in ("[1, 2]", "3", '"x"'):
        assert rl_struct.valid(text) == 1
        assert rl_struct.correct(text, {"a": 1}) == 0
    assert rl_struct.valid('{"b":2,   "a":1}') == rl_struct.valid('{"a": 1, "b": 2}') == 1
    assert rl_struct.struct('{"ab": 1}', ["a"]) == 0
    assert rl_struct.struct('{"é": 1}', ["é"]) == 1


def test_the_total_lies_between_its_bounds() -> None:
    best = "```json\n" + ONE + "\n```"
    assert rl_struct.total(rl_struct.terms(best, ["reasoning", "answer"], GOLD)) == pytest.approx(2.9)
    assert rl_struct.length("x" * 10) == rl_struct.length("x" * 2000) == 0
    assert rl_struct.length("x" * 9) == rl_struct.length("x" * 2001) == -0.1


@pytest.mark.parametrize(
    ("value", "gold", "f1"),
    [
        ({"a": "x y", "z": "w"}, {"a": "X Y"}, 1.0),  # keys that gold does not have are not read
        ({"a": "x"}, {"a": "x y z"}, 0.5),
        ({"a": "x x"}, {"a": "x"}, 2 / 3),
        ({"a": {"b": [1, "two"]}}, {"a": {"c": "two", "d": 1.0}}, 1.0),
        ({"a": True, "b": None}, {"a": True, "b": False}, 0.5),
        ({"b": "x"}, {"a": "x"}, 0.0),
        (["x"], {"a": "x"}, 0.0),
        (["x"], ["x", "y"], 2 / 3),
        ({"a": ""}, {"a": ""}, 1.0),
    ],
)
def test_content_f1(value: object, gold: object, f1: float) -> None:
    assert rl_struct.content_f1(value, gold) == pytest.approx(f1)


# The metrics


@pytest.mark.parametrize(
    ("answer", "right"),
    [("18", 1), ("18.0", 1), ('"18"', 1), ('"$18"', 1), ('"18%"', 1), ('"18.00"', 1), ("1.8e1", 1), ('" 18 "', 1)]
    + [("17", 0), ('"18 or 17"', 0), ('"x = 18"', 0), ('"18 dollars"', 0), ("true", 0), ("null", 0), ("[18]", 0)]
    + [('{"v": 18}', 0), ('"0.18"', 0), ('""', 0), ("18.0000001", 0)],
)
def test_answers(answer: str, right: float) -> None:
    found = scores(f'{{"reasoning": "r", "answer": {answer}}}', {"reasoning": "r", "answer": 18})
    assert found["answer_accuracy"] == found["answer_accuracy_lenient"] == right
    is_number = isinstance(json.loads(answer), (int, float)) and answer != "true"
    assert found["valid_and_correct"] == right * is_number


def test_true_is_not_one_and_thousands_are_read() -> None:
    assert scores('{"answer": true}', {"answer": 1})["answer_accuracy"] == 0
    assert scores('{"answer": "1,200"}', {"answer": 1200})["answer_accuracy"] == 1
    assert scores('{"answer": 1,200}', {"answer": 1200})["answer_accuracy_lenient"] == 1
    assert scores('{"answer": 1,200}', {"answer": 1200})["answer_accuracy"] == 0
    long = "7" * 60
    assert scores(f'{{"answer": {long}}}', {"answer": int(long)})["answer_accuracy"] == 1
    assert scores(f'{{"answer": {long}}}', {"answer": int(long) + 1})["answer_accuracy"] == 0


def test_without_an_answer_key_the_whole_value_is_the_answer() -> None:
    same, other = '{"answer": 4.0, "reasoning": "2+2 is 4"}', '{"answer": 4, "reasoning": ""}'
    assert scores(same, key=None)["valid_and_correct"] == 1
    assert scores(other, key=None)["valid_and_correct"] == 0
    assert scores('{"a": [1, true]}', {"a": [True, 1]}, key=None)["answer_accuracy"] == 0
    assert scores('{"a": [1, {"b": null}]}', {"a": [1.0, {"b": None}]}, key=None)["answer_accuracy"] == 1
    assert scores('{"a": [1]}', {"a": [1, 1]}, key=None)["answer_accuracy"] == 0


def test_votes_are_by_value() -> None:
    def vote(text: str, key: str | None = "answer") -> str | None:
        return grade_structured(text, GSM, GOLD, answer_key=key).answer

    assert {vote(f'{{"answer": {v}}}') for v in ("18", "18.0", '"18"', '"$18"')} == {"18"}
    assert vote('{"answer": "x"}') == '"x"'
    assert vote('{"reasoning": "x"}') is None
    assert vote('{"answer": 18') is None
    assert vote('{"b": 1, "a": 2}', None) == vote('{"a": 2, "b": 1}', None) == '{"a": 2, "b": 1}'


def test_without_gold_only_what_needs_none_is_scored() -> None:
    counts = {"keys_invented", "keys_all"}
    pooled = {name for name, metric in STRUCTURED_METRICS.items() if metric.ratio}
    assert scores(ONE).keys() == STRUCTURED_METRICS.keys() - pooled | counts
    assert scores("x").keys() == scores(ONE).keys()
    assert scores(ONE, None).keys() == scores(ONE).keys() - set(NEEDS_GOLD)
    assert pooled == {"hallucination_rate"}


def test_the_reply_is_what_stands_after_the_thought() -> None:
    thought = f"<think>{ONE}</think>"
    assert scores(thought + "I give up")["structural_accuracy"] == 0
    found = scores(thought + ONE)
    assert (found["json_validity_raw"], found["json_validity"], found["format_consistency"]) == (0, 1, 0)
    cut = scores("<think>" + ONE)
    assert (cut["structural_accuracy"], cut["answer_accuracy_lenient"], cut["json_validity"]) == (0, 0, 0)
    inside = '{"reasoning": "</think> {", "answer": 4}'
    assert scores(inside)["valid_and_correct"] == 1


def test_the_style_that_was_asked_for() -> None:
    fenced = f"```json\n{ONE}\n```"
    assert scores(ONE, style="raw")["format_consistency"] == 1
    assert scores(fenced, style="raw")["format_consistency"] == 0
    assert scores(fenced, style="fenced")["format_consistency"] == 1
    assert scores(ONE, style="fenced")["format_consistency"] == 0


def test_nested_keys_count_by_path() -> None:
    schema = Schema(
        {
            "properties": {
                "authors": {
                    "type": "array",
                    "minItems": 1,
                    "items": {"properties": {"name": {"type": "string"}}, "required": ["name"]},
                }
            },
            "required": ["authors"],
        }
    )

    def found(text: str) -> tuple[float, float, float]:
        s = grade_structured(text, schema, None).scores
        return s["key_recall"], s["type_accuracy"], s["structural_accuracy"]

    assert found('{"authors": [{"name": "x"}, {"name": "y"}]}') == (1, 1, 1)
    assert found('{"authors": [{"name": "x"}, {"nom": "y"}]}') == (0.5, 0.5, 1)
    assert found('{"authors": [{"name": 1}]}') == (1, 0.5, 1)
    assert found('{"authors": []}') == (0.5, 0.5, 0)
    assert found('{"authors": {"name": "x"}}') == (0.5, 0, 1)
    assert found('["authors", "name"]') == (0, 0, 1)


@pytest.mark.parametrize(
    ("value", "names", "right"),
    [(1.0, "integer", True), (1.5, "integer", False), (1, "number", True), (True, "integer", False)]
    + [
        (True, "number", False),
        (True, "boolean", True),
        (None, "null", True),
        (0, "null", False),
        ("1", "number", False),
    ],
)
def test_types(value: object, names: str, right: bool) -> None:
    assert has_type(value, frozenset([names])) is right is Schema({"type": names}).valid(value)


def test_a_value_without_keys() -> None:
    s = grade_structured("4", Schema({"type": "number"}), 4).scores
    assert s["key_recall"] == s["key_precision"] == s["type_accuracy"] == s["valid_and_correct"] == 1
    assert s["keys_all"] == 0
