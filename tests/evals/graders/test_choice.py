"""Which option a reply takes, case by case, and votes over options instead of letters."""

from __future__ import annotations

import pytest

from evals.graders.choice import CHOICE_METRICS, chosen_letter, grade_choice

CASES = [
    ("Answer: C", "C"),
    ("The answer is C.", "C"),
    ("The correct answer is (C).", "C"),
    ("**Answer: C**", "C"),
    ("**Answer:** **C**", "C"),
    ("**Answer**: C", "C"),
    ("answer: c", "C"),
    ("Answer: $C$", "C"),
    (r"Answer: \boxed{C}", "C"),
    (r"Answer: $\boxed{\text{C}}$", "C"),
    (r"The answer is \(\mathbf{C}\)", "C"),
    ("Answer: option C", "C"),
    ("The answer is the letter C", "C"),
    ("Answer:\n\nC", "C"),
    ("Answer: Ｃ", "C"),  # full-width, the same letter in NFKC
    ("Answer: C) A decrease in pressure", "C"),
    ("Answer: C. A gas", "C"),
    ("Answer: (C) 5 and 6", "C"),
    ("Answer: C because of the heat", "C"),
    ("A is wrong. Answer: B", "B"),
    ("Answer: A\nNo, wait.\nAnswer: B", "B"),
    ("<think>Answer: A</think>Answer: B", "B"),
    (r"\boxed{A} but then Answer: B", "B"),
    ("The answer is C. A is wrong", "C"),
    # several letters, or none that is legal
    ("Answer: B or C", None),
    ("Answer: B/C", None),
    ("Answer: B, C", None),
    ("Answer: B and C", None),
    ("Answer: (B) or (C)", None),
    ("Answer: B) heat, or C) cold", None),
    ("Answer: B, not C", None),
    ("Answer: B C", None),
    ("Answer: BC", None),
    ("Answer: E", None),
    ("Answer: 42", None),
    ("Answer: Beryllium", None),
    ("The answer is a bit unclear", None),
    ("The answer is A's neighbour", None),
    ("Answer: С", None),  # Cyrillic
    ("Answer: Β", None),  # Greek
    ("Answer:", None),
    ("Answer: A\nThe answer is unclear", None),
    (r"Answer: 42 \boxed{C}", None),
    (r"\boxed{C} The answer is unknown.", None),
    # boxes
    (r"so \boxed{C}", "C"),
    (r"so \boxed{\text{(C)}}", "C"),
    (r"so \boxed{C) heat}", "C"),
    (r"so \boxed{A}, no, thus \boxed{B}", "B"),
    (r"so \boxed{A} or \boxed{B}", None),
    (r"so \boxed{A, B}", None),
    (r"so \boxed{Carbon}", None),
    (r"so \boxed{5}", None),
    (r"so \boxed{C", None),
    # only a letter
    ("C", "C"),
    (" (C)\n", "C"),
    ("**C**", "C"),
    ("c.", "C"),
    ("E", None),
    ("C D", None),
    ("I take C", None),
    ("C is right", None),
    ("<think>Answer: C", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "letter"), CASES)
def test_chosen_letter(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


def test_the_legal_letters_are_the_options() -> None:
    assert chosen_letter("Answer: J", "ABCDEFGHIJ") == "J"
    assert chosen_letter("Answer: J") is None
    assert chosen_letter("Answer: C", "AB") is None


def test_votes_are_over_options() -> None:
    first = {"A": "heat", "B": "cold", "C": "wind"}
    rotated = {"A": "wind", "B": "heat", "C": "cold"}
    one, other = grade_choice("Answer: A", "A", first), grade_choice("Answer: B", "B", rotated)
    assert one.answer == other.answer == "heat"
    assert one.scores == other.scores == {"accuracy": 1.0, "answered": 1.0}
    wrong = grade_choice("Answer: C", "A", first)
    assert (wrong.scores, wrong.answer) == ({"accuracy": 0.0, "answered": 1.0}, "wind")
    none = grade_choice("no idea", "A", first)
    assert (none.scores, none.answer) == ({"accuracy": 0.0, "answered": 0.0}, None)
    assert none.scores.keys() == CHOICE_METRICS.keys()
    with pytest.raises(ValueError, match="gold letter 'D' is none of A, B, C"):
        grade_choice("Answer: A", "D", first)
