"""Overlap of training texts with prompts: planted matches are found, shared instructions are not matches."""

from __future__ import annotations

import pytest

from evals.contamination import contamination, normalised_words


def words(start, count):
    return " ".join(f"w{i}" for i in range(start, start + count))


PROMPTS = {"a": words(0, 20), "b": words(100, 20), "c": words(200, 20)}
QUESTIONS = {"a": words(0, 12), "b": words(100, 12), "c": words(200, 12)}


def test_shares_by_hand():
    # 15 words of a: 3 of its 8 13-grams, all 5 8-grams of the 12-word question; 9 words of b: 2 of 5 8-grams only.
    found = contamination(PROMPTS, QUESTIONS, [f"x {words(0, 15)} y", "nothing", f"{words(102, 9)} z", words(0, 9)])
    assert (found.items["a"].long, found.items["a"].short, found.items["a"].rows) == (3 / 8, 1.0, 2)
    assert (found.items["b"].long, found.items["b"].short, found.items["b"].rows) == (0, 0.4, 1)
    assert not found.items["c"].hit
    assert (found.share, found.rows) == (2 / 3, 4)
    assert found.words == (
        "2 of 3 prompts (67%) share 13 words in a row, or 8 of the question, with the 4 training texts; "
        "most: a (100%), b (40%)."
    )


def test_case_punctuation_and_width_do_not_hide_a_copy():
    text = words(0, 13).upper().replace(" ", ", ").replace("0", "\uff10")  # a full-width zero
    assert contamination(PROMPTS, QUESTIONS, [text]).items["a"].long == 1 / 8
    assert normalised_words("Ärger: 3,5 % \u2014 e\u0301!") == ["ärger", "3", "5", "é"]
    assert normalised_words("हिन्दी") == ["हिन्दी"]  # vowel signs are no separators


def test_no_overlap():
    found = contamination(PROMPTS, QUESTIONS, (words(500 + i, 30) for i in range(3)))  # a stream, read once
    assert found.share == 0
    assert found.words == "No prompt shares 13 words in a row, and no question 8, with the 3 training texts."
    assert contamination(PROMPTS, QUESTIONS, []).rows == 0


def test_seven_words_are_not_enough_unless_they_are_the_question():
    assert contamination(PROMPTS, QUESTIONS, [words(0, 7)]).share == 0
    short = QUESTIONS | {"a": "what is 2 + 3"}
    found = contamination(PROMPTS, short, ["they asked: what is 2 + 3? five"])
    assert found.items["a"].short == 1.0


def test_an_instruction_that_most_prompts_share_is_no_overlap():
    instruction = words(900, 20)
    prompts = {name: f"{text} {instruction}" for name, text in PROMPTS.items()}
    found = contamination(prompts, QUESTIONS, [instruction, f"other {instruction}"])
    assert found.share == 0
    assert contamination(prompts, QUESTIONS, [PROMPTS["a"]]).items["a"].hit


def test_bad_input():
    with pytest.raises(ValueError, match="the same items"):
        contamination({"a": "x"}, {"b": "x"}, [])
    with pytest.raises(ValueError, match="the same items"):
        contamination({}, {}, [])
