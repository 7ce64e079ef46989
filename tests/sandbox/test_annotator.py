from __future__ import annotations

import time

import pytest

from trl_ext.annotate.base import ERROR_TYPES, STEP_TYPES, Request, Span
from trl_ext.sandbox import rule_annotator

GOOD = '{"steps": [\n"3*4=12",\n"12+5=17"],\n"answer": 17}'
ROW = {"solution": GOOD}


def annotate(text: str, correct: bool = False) -> list[Span]:
    return rule_annotator([Request("problem", tuple(text.split("\n")), correct, ROW)])[0]


@pytest.mark.parametrize(
    ("text", "segment", "label"),
    [
        (GOOD.replace("12", "13"), 1, "arithmetic_slip"),  # 3*4=13, 13+5=17: the first is the root cause
        (GOOD.replace("17", "18"), 2, "arithmetic_slip"),
        (GOOD.replace("3*4=12", "3+4=7").replace("12+5=17", "7+5=12"), 1, "wrong_equivalence"),
        (GOOD.replace("12+5=17", "12+6=18"), 2, "wrong_constraint"),
        (GOOD.replace('",\n"12+5=17', ""), 1, "premature_conclusion"),
        (GOOD.replace("17}", "18}"), 3, "wrong_equivalence"),
        (GOOD[:-1], 3, "format_error"),
        (GOOD.replace("17}", "17,}"), 3, "format_error"),
        (GOOD.replace('12",', '12"'), 1, "format_error"),  # comma left out: the segment before the gap
        (GOOD.replace('"],', '"]'), 2, "format_error"),
        (GOOD.replace('"],', '",'), 2, "format_error"),  # bracket left out
        (GOOD.replace('17"]', "17]"), 2, "format_error"),
        (GOOD.replace('"3*4', "3*4"), 1, "format_error"),
        (GOOD.replace('"answer"', '"result"'), 3, "format_error"),  # JSON, but not the asked object
        (GOOD[:-1].replace("12+5=17", "12+5=16"), 2, "arithmetic_slip"),  # both: the earlier root cause
    ],
)
def test_wrong_replies(text: str, segment: int, label: str) -> None:
    assert annotate(text) == [Span((segment,), label)]
    assert label in ERROR_TYPES


def test_right_replies_name_the_equation_that_changes_the_value_most() -> None:
    assert annotate(GOOD, correct=True) == [Span((1,), "key_formula")]  # +9 against +5
    row = {"solution": '{"steps": [\n"9-2=7",\n"7*8=56"],\n"answer": 56}'}
    request = Request("problem", tuple(row["solution"].split("\n")), True, row)
    assert rule_annotator([request]) == [[Span((2,), "final_verification")]]
    assert {"key_formula", "final_verification"} <= set(STEP_TYPES)


def test_unsure_gives_no_span() -> None:
    assert annotate(GOOD) == []  # nothing is wrong that the rules can see
    assert annotate("Answer: 17", correct=True) == []
    assert rule_annotator([Request("problem", (), False, ROW)]) == [[]]
    assert rule_annotator([]) == []


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 100_000, "1+1=" * 50_000, '{"answer": ' + "9" * 5000 + "}"])
def test_hostile_text_costs_no_time(text: str) -> None:
    start = time.process_time()
    spans = annotate(text)
    assert time.process_time() - start < 2
    assert all(0 <= i < 1 for span in spans for i in span.segment_ids)
