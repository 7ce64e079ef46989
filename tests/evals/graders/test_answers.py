"""Which part of a reply is its answer, and what a plain number is worth: the contract of EVALS.md 4, case by case."""

from __future__ import annotations

from fractions import Fraction

import pytest

from evals.graders.answers import final_answer
from evals.graders.text import after_thought, clean
from evals.graders.values import exact_value, percent_value, right_side


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\0b", "ab"),
        ("4\u200b2\ufeff", "42"),  # zero-width space, byte order mark
        ("4\ud8002", "42"),
        ("\u22125", "-5"),
        ("４２％", "42%"),
        ("𝟒𝟐", "42"),
        ("10²", "10^{2}"),
        ("10⁻¹²", "10^{-12}"),
        ("3½", "3 1/2"),
        ("90º", "90°"),
        ("1\u2009234", "1 234"),
        ("x ≠ 5", "x ≠ 5"),
        ("plain", "plain"),
    ],
)
def test_clean(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_cleaning_a_long_run_of_combining_marks_ends() -> None:
    marks = "\u0301" * 200_000 + "\u0327" * 200_000  # NFKC alone would move each of the latter past all of the former
    assert len(clean("a" + marks)) <= 9


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<think>a</think>b", "b"),
        ("a</think>b</think>c", "c"),
        ("<think>a", None),
        ("<think>a</think> b <think> c", None),
        ("a", "a"),
        ("</think>", ""),
    ],
)
def test_after_thought(text: str, rest: str | None) -> None:
    assert after_thought(text) == rest


BOXES = [
    (r"so \boxed{42}", "42"),
    (r"so \boxed {42}", "42"),
    (r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"\boxed{a{b}c}", "a{b}c"),
    (r"\boxed{\left\{1,2\right\}}", r"\left\{1,2\right\}"),
    (r"\boxed{1", None),
    (r"\boxed{5} and later \boxed{7", None),
    (r"\boxed{}", None),
    (r"\boxed{5} \boxed{ }", None),
    (r"\boxed", None),
    (r"answer is 4 \boxed{", None),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{x=\boxed{5}}", "5"),
    (r"\boxed{3} or \boxed{4}", "3, 4"),
    (r"\boxed{3}, \boxed{4}", "3, 4"),
    (r"$\boxed{3}$ and $\boxed{4}$", "3, 4"),
    (r"\boxed{3}/\boxed{4}", "3, 4"),
    (r"\boxed{3}\boxed{4}", "3, 4"),
    (r"\boxed{3} \text{ or } \boxed{4}", "3, 4"),
    (r"\boxed{3}, \boxed{4}, and \boxed{5}", "3, 4, 5"),
    (r"\boxed{0.5} or \boxed{\frac12}", r"\frac12"),
    (r"11 fails: \boxed{11}, so the correct value is \boxed{33}", "33"),
    (r"\boxed{11}, so \boxed{33}", "33"),
    (r"\boxed{1/2} = \boxed{0.5}", "0.5"),
    (r"The answer is 4. I hope. \boxed{5}", "5"),
    (r"\boxed{33.}", "33"),
    (r"\boxed{" + "1+" * 200 + "1}", None),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"),
    (r"<think>\boxed{33}</think> So I give up.", None),
    (r"<think> it must be \boxed{1}", None),
    (r"\boxed{4" + "\u200b" + "2}", "42"),
    (r"\boxed{1}" + " x" * 20_000, None),  # only the end of a reply is read
]
ANCHORS = [
    ("She pays 3 and 4.\n#### 1,234", "1,234"),
    ("The answer is $7$.", "7"),
    (r"The answer is \(7\), as shown.", "7"),
    ("answer: 12\nmore text", "12"),
    ("Answer: 3\nNo.\nAnswer: 4", "4"),
    ("**Answer:** 42", "42"),
    ("**Answer**: **42**", "42"),
    ("The answer is:\n\n42", "42"),
    ("The answer is 42. It took 3 steps.", "42"),
    ("The answer is 42 because 6*7=42.", "42"),
    ("The answer is 42 apples in total.", "42 apples in total"),
    ("The answer is $18 per day.", "$18 per day"),
    ("The answer is 42 apples, which is a lot of fruit.", "42 apples"),
    ("The answer is 42 for the whole of the long first week.", "42"),
    ("The answer is 5 less than that.", None),
    ("The answer is 4 million dollars.", None),
    ("The answer is 5 or 6.", None),
    ("The answer is 5, or maybe 6.", None),
    ("The answer is $5$ or $6$.", None),
    ("The answer is not 5.", None),
    ("The answer is about 5.", None),
    ("The answer is 5 apples and 6 pears.", None),
    ("The answer is 5?", None),
    ("The answer is x = 5.", "x = 5"),
    ("The answer is \\frac{3}{4}.", "\\frac{3}{4}"),
    ("The answer is 3, 4.", "3, 4"),
    ("The answer is", None),
    ("The answer is:\n$$\n42\n$$", "42"),
    ("The answer is:\n\\[ 42 \\]", "42"),
    ("The answer is $$", None),
    ("#### Step 1: compute\n5", None),
    ("##### 5", None),
    ("My answers: 5 and 7\nthat is all", None),
]
WHOLE = [
    ("42", "42"),
    (" $42$ \n", "$42$"),
    ("x = 42", "x = 42"),
    ("18 dollars", "18 dollars"),
    ("\\sqrt{2}", "\\sqrt{2}"),
    ("sin(3)", "sin(3)"),
    ("I take 42", None),
    ("I take 42 and\nthen 17 more", None),
    ("It is 42", None),
    ("5 or 6", None),
    ("42\n43", None),
    ("", None),
    (" \n", None),
    ("\0", None),
]


@pytest.mark.parametrize(("text", "answer"), BOXES + ANCHORS + WHOLE)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


VALUES = [
    ("1,234", 1234),
    ("1{,}234", 1234),
    (r"1\,234\,567", 1234567),
    (r"1,\!234", 1234),
    ("1 234", 1234),
    ("-0.50", Fraction(-1, 2)),
    ("+7", 7),
    ("007", 7),
    ("33.", 33),
    (".5", Fraction(1, 2)),
    (r"\frac{3}{4}", Fraction(3, 4)),
    (r"\dfrac34", Fraction(3, 4)),
    (r"-\tfrac{3}{4}", Fraction(-3, 4)),
    (r"\frac{-3}{4}", Fraction(-3, 4)),
    ("-3/4", Fraction(-3, 4)),
    ("3 1/2", Fraction(7, 2)),
    ("-3 1/2", Fraction(-7, 2)),
    (r"3\frac{1}{2}", Fraction(7, 2)),
    ("1e3", 1000),
    ("1.5E-2", Fraction(3, 200)),
    (r"1.5 \times 10^{3}", 1500),
    (r"2\cdot10^5", 200_000),
    ("$18", 18),
    (r"\$1,080.50", Fraction("1080.5")),
    ("-$5", -5),
    ("€5", 5),
    ("5€", 5),
    ("$42$", 42),
    (r"\(42\)", 42),
    ("**42**", 42),
    (r"90^\circ", 90),
    (r"90^{\circ}", 90),
    ("90°", 90),
    ("90 degrees", 90),
    (r"5\text{ cm}", 5),
    (r"5\,\mathrm{m}^2", 5),
    (r"5 \text{ m}/\text{s}", 5),
    (r"\text{42}", 42),
    ("5 cm", 5),
    ("5cm", 5),
    ("42 apples", 42),
    ("x = 7", 7),
    ("m+n=33", 33),
    ("x_1 = 2", 2),
    ("f(3) = 9", 9),
    (r"\angle ABC = 30^\circ", 30),
    (r"\left(5\right", None),
    # no plain number
    ("12,34", None),
    ("1,00,000", None),
    ("3 4", None),
    ("5..6", None),
    ("1/0", None),
    (r"\frac{1}{0}", None),
    ("9" * 40, None),
    ("1e1000", None),
    ("x", None),
    ("", None),
    ("5x", None),
    ("2 xy", None),
    (r"5\text{ million}", None),
    ("5 million", None),
    ("5 dozen", None),
    ("2 thirds", None),
    (r"5\pi", None),
    ("5 pi", None),
    ("5 factorial", None),
    ("5 less than ten", None),
    ("5!", None),
    ("5 = x", None),
    ("2x = 10", None),
    ("x^2 = 25", None),
    ("|x| = 5", None),
    ("-x = 5", None),
    ("x = y = 5", None),
    (r"\sqrt{x} = 5", None),
    (r"x \neq 5", None),
    (r"\pm 5", None),
    ("(1,2)", None),
    ("50%", None),
    ("٤٢", None),  # other digits than 0 to 9 are left to nobody
]


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_exact_value(text: str, value: Fraction | None) -> None:
    assert exact_value(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("50%", 50),
        (r"50\%", 50),
        ("12.5 %", Fraction(25, 2)),
        ("x = 5%", 5),
        ("50 percent", 50),
        ("50", None),
        ("%", None),
    ]
    + [(r"50\text{ percent}", 50)],
)
def test_percent_value(text: str, value: Fraction | None) -> None:
    assert percent_value(text) == value


def test_right_side_keeps_what_is_no_definition() -> None:
    assert right_side("x = 5") == "5"
    assert right_side("1+4 = 5") == "1+4 = 5"
