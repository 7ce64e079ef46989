"""Ladders of hints: their order and text, their place in a prompt, and which trial of a prompt is taken."""

from __future__ import annotations

import copy

import pytest

from trl_ext.rollouts.hints import Rung, first_solved, hinted, ladder

ROW = {"k": ["K1.", "K2.", "K3."], "p": ["P1.", " ", "P3."], "s": [], "one": "all of it", "none": None}


def test_levels_are_cumulative_inside_a_column_and_columns_are_not_mixed():
    """Card: the prompt of level c has parts 1..c and not part c + 1; the tiers do not repeat one another."""
    found = ladder(ROW, {"k": "Know", "p": "Plan", "s": "Solve", "absent": "No", "none": "No", "one": "Last"})
    assert [(r.number, r.label, r.text) for r in found] == [
        (1, "Know", "K1."),
        (2, "Know", "K1. K2."),
        (3, "Know", "K1. K2. K3."),
        (4, "Plan", "P1."),
        (5, "Plan", "P1. P3."),
        (6, "Last", "all of it"),
    ]
    assert ladder(ROW, {"s": "Solve", "absent": "No"}) == []


def test_one_column_may_be_a_ladder_of_its_own():
    found = ladder(ROW, {"k": ["Knowledge", "Planning", "Solution"]}, cumulative=False)
    assert found == [Rung(1, "Knowledge", "K1."), Rung(2, "Planning", "K2."), Rung(3, "Solution", "K3.")]
    assert [r.text for r in ladder(ROW, {"p": "Hint"}, cumulative=False)] == ["P1.", "P3."]
    assert ladder({"k": ["K1."]}, {"k": ["A", "B"]}) == [Rung(1, "A", "K1.")]
    with pytest.raises(ValueError, match="3 hints in the column 'k', for which there are 2 labels"):
        ladder(ROW, {"k": ["A", "B"]})


def test_the_hint_ends_the_last_user_turn():
    rung = Rung(1, "Hint", "count")
    prompt = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "{"},
    ]
    before = copy.deepcopy(prompt)
    assert hinted(prompt, rung) == [prompt[0], {"role": "user", "content": "q\nHint: count"}, prompt[2]]
    assert prompt == before
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert [turn["content"] for turn in hinted(turns, rung)] == ["a", "b\nHint: count"]
    assert hinted("q", rung) == "q\nHint: count"
    for wrong in ([{"role": "system", "content": "s"}], [{"role": "user", "content": [{"type": "image"}]}]):
        with pytest.raises(ValueError, match="the last user turn, which must be a text"):
            hinted(wrong, rung)


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_the_lowest_level_that_succeeds_is_taken(first):
    """Card: a generator that succeeds from level l on -> level l."""
    solved = [level >= first for level in range(1, 5)]
    assert first_solved([7] * 4, solved) == {7: first - 1}
    assert first_solved([7] * 4 + [2] * 4, [False] * 4 + solved) == {2: 4 + first - 1}
