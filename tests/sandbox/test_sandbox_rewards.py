from __future__ import annotations

import pytest

from trl_ext.sandbox import answer_correct, json_valid

GOOD = '{"steps": [\n"3*4=12",\n"12+5=17"],\n"answer": 17}'


@pytest.mark.parametrize("text", [GOOD, f" {GOOD}\n", '{"answer": 17, "steps": []}', '{"steps": ["a"], "answer": -3}'])
def test_valid(text: str) -> None:
    assert json_valid([text]) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        GOOD[:-1],
        GOOD + "}",
        f"```json\n{GOOD}\n```",
        GOOD.replace("17}", "17,}"),
        GOOD.replace("17}", '"17"}'),
        GOOD.replace("17}", "17.0}"),
        GOOD.replace("17}", "true}"),
        GOOD.replace("17}", "NaN}"),
        GOOD.replace("17}", "1234567890}"),
        GOOD.replace("17}", "9" * 1900 + "}"),
        GOOD.replace("17}", '17, "note": 1}'),
        GOOD.replace("17}", '17, "answer": 17}'),
        '{"answer": 17}',
        '{"steps": "3*4=12", "answer": 12}',
        '{"steps": [12], "answer": 12}',
        '{"steps": [' + ", ".join(['"a"'] * 17) + '], "answer": 12}',
        '["steps", "answer"]',
        "17",
        "null",
        "[" * 1900,
        '{"steps": ' * 190,
        '{"steps": ["' + "a" * 2000 + '"], "answer": 1}',
    ],
)
def test_not_valid(text: str) -> None:
    assert json_valid([text]) == [0.0]
    assert answer_correct([text], answer=["17"]) == [0.0]


def test_correct_needs_a_valid_reply_and_the_right_number() -> None:
    completions = [GOOD, GOOD.replace("17}", "18}"), GOOD[:-1]]
    assert answer_correct(completions, answer=["17"] * 3) == [1.0, 0.0, 0.0]


def test_conversations_count_by_their_last_assistant_turn() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": []}
    tool = {"role": "tool", "name": "calculator", "content": GOOD}
    reply = {"role": "assistant", "content": GOOD}
    completions = [[reply], [call, tool, reply], [call, tool], [{"role": "assistant", "content": None}], []]
    assert json_valid(completions, prompts=[], anything=1) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_rows_and_answers_must_match_in_number() -> None:
    with pytest.raises(ValueError):
        answer_correct([GOOD, GOOD], answer=["17"])
