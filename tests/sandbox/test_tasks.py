from __future__ import annotations

import json
import random

import pytest

from trl_ext.annotate.base import ERROR_TYPES
from trl_ext.annotate.prompts import teacher_note
from trl_ext.sandbox import dataset, json_valid
from trl_ext.sandbox.demos import CURRICULUM, Stage, conversations
from trl_ext.sandbox.problems import LEVELS, MAX_VALUE, Problem, draw, hints, render
from trl_ext.sandbox.slips import malform, slip_lines
from trl_ext.sandbox.tasks import DEFAULT_MIX, KINDS, rows

# (3 - 1 is not drawn: operands start at 2.) 8+4=12, 12*2=24, 24-9=15
PROBLEM = Problem("Sam", "pens", 8, (("+", 4), ("*", 2), ("-", 9)), (0, 1, 0), 4)


def test_text_solution_and_hints_of_one_problem() -> None:
    assert PROBLEM.text == "Sam has 8 pens, buys 4 more, then has 2 times that, loses 9. How many pens?"
    assert PROBLEM.lines == ["8+4=12", "12*2=24", "24-9=15"]
    assert PROBLEM.answer == 15
    assert hints(PROBLEM) == ["use + then * then -", "8 then +4 then *2 then -9", "8+4=12, 12*2=24, 24-9"]
    text = '{"steps": [\n"8+4=12",\n"12*2=24",\n"24-9=15"],\n"answer": 15}'
    assert render(PROBLEM.lines, PROBLEM.answer) == text
    assert json.loads(text) == {"steps": PROBLEM.lines, "answer": 15}


@pytest.mark.parametrize("level", LEVELS)
def test_drawn_problems_keep_to_their_level(level: int) -> None:
    rng = random.Random(level)
    for _ in range(300):
        problem = draw(rng, level)
        assert len(problem.steps) == LEVELS[level].steps
        assert all(2 <= n <= (9 if op == "*" else LEVELS[level].largest) for op, n in problem.steps)
        assert all(1 <= int(line.split("=")[1]) <= MAX_VALUE for line in problem.lines)
        assert all(eval(left) == int(right) for left, right in (line.split("=") for line in problem.lines))


@pytest.mark.parametrize("kind", [*KINDS, "labels"])
def test_rows_depend_on_the_seed_alone_and_grow_by_appending(kind: str) -> None:
    assert rows(kind, 30, seed=1) == rows(kind, 30, seed=1)
    assert rows(kind, 30, seed=1)[:10] == rows(kind, 10, seed=1)
    assert rows(kind, 30, seed=1) != rows(kind, 30, seed=2)
    assert dataset(kind, 5, seed=1).to_list() == rows(kind, 5, seed=1)


def test_splits_share_no_problem_for_any_seed_and_rows_repeat_none() -> None:
    train = [row["problem"] for seed in range(3) for row in rows("math", 1500, seed)]
    test = [row["problem"] for seed in range(3) for row in rows("mcq", 500, seed, "test")]
    assert not set(train) & set(test)
    assert len(set(train[:1500])) == 1500
    demonstrated = {chat[0]["content"].split("\n")[0] for _, chat in conversations(CURRICULUM[-1], 0)}
    assert not demonstrated & set(test)


def test_difficulty_is_a_level_or_weights() -> None:
    assert {row["level"] for row in rows(n=50, difficulty=4)} == {4}
    assert {row["level"] for row in rows(n=50, difficulty={1: 1, 5: 1})} == {1, 5}
    shares = [row["level"] for row in rows(n=2000)]
    assert all(abs(shares.count(level) / 2000 - weight) < 0.04 for level, weight in DEFAULT_MIX.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "maths"}, "unknown kind 'maths'"),
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"difficulty": 9}, "unknown level 9"),
        ({"kind": "math", "bad_share": 0.5}, "bad_share: only labels have thumbs-down rows"),
        ({"kind": "labels", "bad_share": -0.1}, "bad_share -0.1 is not a share"),
    ],
)
def test_unknown_names_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows(n=1, **arguments)


def test_asking_for_more_problems_than_exist_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_ext.sandbox.problems.NAMES", ("Sam",))
    monkeypatch.setattr("trl_ext.sandbox.problems.ITEMS", ("pens",))
    with pytest.raises(ValueError, match="ask for fewer rows"):
        rows(n=1000, difficulty=1)


def test_preference_rejects_something_worse() -> None:
    faults = {"format": 0, "sum": 0}
    for row in rows("preferences", 200):
        chosen, rejected = (row[key][0]["content"] for key in ("chosen", "rejected"))
        assert json.loads(chosen)["answer"] == int(row["answer"])
        assert chosen != rejected
        faults["sum" if json_valid([rejected]) == [1.0] else "format"] += 1
    assert min(faults.values()) > 60


def test_labels_tell_careful_from_faulty_answers() -> None:
    sample = rows("labels", 300)
    for row in sample:
        text = row["completion"][0]["content"]
        right = json_valid([text]) == [1.0] and json.loads(text) == json.loads(rows_solution(row))
        assert row["label"] == right
    assert 120 < sum(row["label"] for row in sample) < 180
    assert sum(row["label"] for row in rows("labels", 300, bad_share=0.1)) > 240
    assert not any(row["label"] for row in rows("labels", 10, bad_share=1.0))
    assert len({row["problem"] for row in sample}) == 300


def rows_solution(row: dict) -> str:
    """The solution of a labelled row's problem, from the `math` rows."""
    return SOLUTIONS[row["problem"]]


SOLUTIONS = {row["problem"]: row["solution"] for row in rows("math", 300)}


def test_thumbs_down_prompts_may_come_from_elsewhere() -> None:
    sample = rows("labels", 200, difficulty=1, bad_difficulty={4: 1, 5: 1})
    assert {row["level"] for row in sample if row["label"]} == {1}
    assert {row["level"] for row in sample if not row["label"]} == {4, 5}


def test_demonstrations_for_sft_are_the_solutions() -> None:
    for demo, row in zip(rows("demos", 20), rows("math", 20), strict=True):
        assert demo["prompt"] == row["prompt"] and demo["completion"][0]["content"] == row["solution"]


def test_mcq_letter_points_at_the_answer_and_every_letter_occurs() -> None:
    numbers = {row["problem"]: row["answer"] for row in rows("math", 200)}
    sample = rows("mcq", 200)
    for row in sample:
        assert len(set(row["choices"])) == 4
        assert row["choices"]["ABCD".index(row["answer"])] == numbers[row["problem"]]
        assert row["solution"].endswith(f"\nAnswer: {row['answer']}")
    assert {row["answer"] for row in sample} == set("ABCD")


def test_each_json_fault_breaks_strict_parsing_and_each_slip_is_off() -> None:
    good = render(PROBLEM.lines, PROBLEM.answer)
    texts = {malform(good, random.Random(i)) for i in range(100)}
    assert len(texts) == 7
    assert json_valid(list(texts)) == [0.0] * 7
    for i in range(100):
        lines = slip_lines(PROBLEM, random.Random(i))
        assert len(lines) == 3
        assert lines != PROBLEM.lines


def test_demonstrations_with_a_note_are_clean_and_notes_never_hold_the_answer() -> None:
    stage = Stage(400, shares=(("plain", 1), ("note", 1)), wrong=0.5, malformed=0.5)
    for kind, chat in conversations(stage, 3):
        valid = json_valid([chat[-1]["content"]])[0]
        if kind == "note":
            note = chat[0]["content"].split("\n\n")[1]
            assert valid == 1.0
            assert not any(character.isdigit() for character in note)
    assert conversations(stage, 3) == conversations(stage, 3)
    assert "arithmetic slip" in teacher_note([ERROR_TYPES[6]], False)
