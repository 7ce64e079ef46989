"""The terminal's report and the words that all reports share."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evals.report import words
from evals.report.text import COLUMNS, clip, text, width
from tests.evals.report.example import HOSTILE, result


@pytest.mark.parametrize(
    ("value", "shown"), [(0.075, "+7.5"), (-0.0114, "-1.1"), (0.0004, "0.0"), (-0.0004, "0.0"), (float("nan"), "–")]
)
def test_points(value, shown):
    assert words.points(value) == shown


def test_numbers_in_words():
    assert [words.p_value(p) for p in (0.0009999, 0.001, 0.15625, 1.0, None)] == [
        "< 0.001",
        "0.001",
        "0.156",
        "1.000",
        "–",
    ]
    assert [words.p_text(p) for p in (0.0001, 0.04)] == ["p < 0.001", "p = 0.040"]
    assert [words.percent(v) for v in (0.4125, 0.0, None, float("nan"))] == ["41.2%", "0.0%", "–", "–"]
    assert [words.count(1, "reply"), words.count(2, "reply"), words.count(1319, "question")] == [
        "1 reply",
        "2 replies",
        "1,319 questions",
    ]


def test_protocol_says_greedy_and_unknown_settings():
    task = replace(result(1).tasks[0], samples=1, sampling={"samples": 1, "temperature": 0.0, "penalty": 1.5})
    assert words.protocol(task) == "60 questions × 1 reply, greedy, penalty 1.5"


def test_moved_questions_crossed_one_half_and_come_by_size():
    task = result(2).tasks[0]
    scores = [(0.0, 0.5), (0.25, 1.0), (0.5, 1.0), (1.0, 0.25), (0.5, 0.49), (0.0, 0.4)]
    questions = tuple(replace(task.questions[i], id=str(i), scores=pair) for i, pair in enumerate(scores))
    solved, broken = words.moved(replace(task, questions=questions), 1)
    assert [q.id for q in solved] == ["1", "0"] and [q.id for q in broken] == ["3", "4"]


def test_verdict_comes_first_and_a_name_is_not_said_twice():
    assert text(result(2)).startswith("dapo-r16 is better on Competition integers")
    assert text(replace(result(2), verdict=("Nothing to tell.",))).startswith("dapo-r16: Nothing to tell.")
    assert text(replace(result(3), verdict=("One for both.",))).startswith("One for both.\n")


def test_table_says_the_numbers_and_is_aligned():
    made = result(2)
    lines = text(made).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("task "))
    head, *rows = lines[start : start + 4]
    for task, row in zip(made.tasks, rows, strict=True):
        c = task.versus[0].metrics[task.headline].comparison
        assert f"{100 * c.difference:+.1f} [{100 * c.low:+.1f}, {100 * c.high:+.1f}]" in row
        assert f"{100 * c.detectable:.1f}" in row
        assert f"{100 * task.scores[0].metrics[task.headline].mean:.1f}%" in row
        assert row[head.index("verdict") :] == task.versus[0].metrics[task.headline].verdict
    assert "(generated)" in rows[0] and "(generated)" not in rows[1]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_no_line_is_wider_than_the_terminal_and_none_holds_control_characters(number):
    made = result(number)
    long = HOSTILE + "数" * 300 + " word" * 60
    tasks = tuple(replace(t, title=long, notes=(long,)) for t in made.tasks)
    skipped = (replace(made.skipped[0], reason=long),)
    shown = text(replace(made, tasks=tasks, verdict=(long,), notes=(long,), guard=long, skipped=skipped))
    assert max(map(width, shown.splitlines())) <= COLUMNS
    assert not [c for c in shown if c != "\n" and not c.isprintable()]
    shown.encode("utf-8")


def test_clip_counts_wide_characters_twice():
    assert clip("数学数学", 8) == "数学数学"
    assert clip("数学数学", 7) == "数学数…"
    assert clip("a\nb", 9) == "a b"


def test_no_text_of_a_question_on_the_terminal():
    made = result(2)
    shown = text(made)
    assert "lattice" in made.tasks[0].questions[0].prompt and "lattice" not in shown
    assert "aime25 was not run" in shown and "3 training runs of one recipe gain +8.9 [+2.5, +15.3]" in shown
