from __future__ import annotations

import time

import pytest
from transformers.utils import get_json_schema

from trl_ext.sandbox.calculator import calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3*4+5", "17"),
        ("3+4*5", "23"),
        ("(3+4)*5", "35"),
        ("10-2-3", "5"),
        (" 7 ", "7"),
        ("-3*-2", "6"),
        ("2-9", "-7"),
    ],
)
def test_values(expression: str, value: str) -> None:
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "", "1+", "*2", "1 2", "1 + 2 3", "()", "(1", "1)", "2**3", "9/3", "1.5", "1e9", "0x10", "a", "__import__('os')",
        "9999999999", "999999999*999999999", "9" * 64, "9" * 10_000, "(" * 40 + "1" + ")" * 20, "-" * 60 + "1",
        "١+١", "²", "1\n+1\x00", "𝟙+𝟙",
    ],
)  # fmt: skip
def test_hostile_input_gives_an_error_text_quickly(expression: str) -> None:
    start = time.process_time()
    assert calculator(expression).startswith("error: ")
    assert time.process_time() - start < 1


@pytest.mark.parametrize("expression", [None, 12, ["1"], {"a": 1}, b"1"])
def test_what_is_not_text_gives_an_error_text(expression: object) -> None:
    assert calculator(expression) == "error: expression must be text"  # type: ignore[arg-type]


def test_schema_for_the_chat_template() -> None:
    function = get_json_schema(calculator)["function"]
    assert function["name"] == "calculator"
    assert function["description"] == "Work out an integer expression."
    assert function["parameters"]["properties"]["expression"]["type"] == "string"
    assert function["parameters"]["required"] == ["expression"]
