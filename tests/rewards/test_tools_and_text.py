"""Rewards for tool calls in TRL's messages, and for form and length of a reply; hostile input is bounded."""

from __future__ import annotations

import warnings

import pytest

from trl_ext.rewards import checked, make_reward
from trl_ext.rewards.checked import PATIENCE, columns_of
from trl_ext.rewards.tools import calls_of, make_tool_call_format
from trl_ext.sandbox.calculator import calculator

SCHEMA = {
    "type": "object",
    "properties": {"expression": {"type": "string"}},
    "required": ["expression"],
    "additionalProperties": False,
}


def call(name: object = "calculator", arguments: object = None, kind: str = "function") -> dict:
    return {
        "type": kind,
        "function": {"name": name, "arguments": {"expression": "1+1"} if arguments is None else arguments},
    }


def asked(*calls: dict, text: str = "") -> dict:
    return {"role": "assistant", "content": text, "tool_calls": list(calls)}


def told(content: object) -> dict:
    return {"role": "tool", "name": "calculator", "content": content}


DONE = {"role": "assistant", "content": "2"}
NONE = [DONE]
ONE = [asked(call()), told("2"), DONE]
TWO = [asked(call(), call()), told("2"), told("{'error': 'no'}"), asked(call()), told("3"), DONE]
CUT = [asked(call())]


def test_calls_are_counted_over_all_turns() -> None:
    assert [len(calls_of(c)) for c in (NONE, ONE, TWO, CUT, "text")] == [0, 1, 3, 1, 0]
    count = make_reward("tool_call_count", {"least": 1, "most": 2})
    assert count(completions=[NONE, ONE, TWO, CUT, "text"]) == [0, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="least <= most"):
        make_reward("tool_call_count", {"least": 3, "most": 2})


def test_share_of_successful_calls() -> None:
    success = make_reward("tool_call_success")
    assert success(completions=[NONE, ONE, TWO, CUT, "text"]) == [None, 1, pytest.approx(2 / 3), 0, None]


@pytest.mark.parametrize(
    ("content", "good"),
    [
        ("12", True),
        (str({"error": "Tool x not found."}), False),  # what TRL writes
        ('{"error": "x"}', False),
        (calculator("1+"), False),
        (calculator("1+1"), True),
        ("no errors", True),
        ("{'errors': 0}", True),
        ([{"type": "text", "text": "error"}], True),
        (" " * 1_000_000, True),
    ],
)
def test_what_counts_as_an_error(content: object, good: bool) -> None:
    assert make_reward("tool_call_success")(completions=[[asked(call()), told(content)]]) == [float(good)]


def test_called_when_needed() -> None:
    reward = make_reward("tool_called_when_needed", {"column": "hard"})
    assert columns_of(reward) == [("hard",)]
    assert reward(completions=[NONE, NONE, ONE, ONE, ONE], hard=[True, False, True, False, None]) == [0, 1, 1, 0, None]


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([call()], 1),
        ([call(arguments='{"expression": "1"}')], 1),
        ([call("other")], 0),
        ([call(["calculator"])], 0),
        ([call(kind="code")], 0),
        ([call(arguments={"expression": 1})], 0),
        ([call(arguments={"expression": "1", "more": 1})], 0),
        ([call(arguments="{")], 0),
        ([call(arguments=[])], 0),
        ([call(arguments={"expression": float("nan")})], 0),
        (["calculator"], 0),
        ([{"type": "function", "function": None}], 0),
        ([call(), call("other"), call()], 2 / 3),
    ],
)
def test_format_of_calls(calls: list, expected: float) -> None:
    reward = make_reward("tool_call_format", {"tools": {"calculator": SCHEMA}})
    assert reward(completions=[[asked(*calls)]]) == [pytest.approx(expected)]


def test_a_call_that_could_not_be_read_counts_as_tried() -> None:
    reward = make_reward("tool_call_format", {"tools": ["calculator"]})
    broken = "<tool_call>\n{"
    found = reward(completions=[NONE, [asked(call(), text=broken)], broken, [asked(call(arguments={"x": 1}))]])
    assert found == [None, 0.5, 0, 1], "a list of names takes any object as arguments"
    for tools in ([], "calculator"):
        with pytest.raises(ValueError, match="expected a list of names"):
            make_reward("tool_call_format", {"tools": tools})


@pytest.mark.parametrize("schema", [5, "object", ["x"], {"type": 5}, {"type": "objekt"}])
def test_a_tool_without_a_usable_schema_is_named(schema: object) -> None:
    with pytest.raises(ValueError, match="tools: the JSON Schema of 'f'"):
        make_tool_call_format({"g": None, "f": schema})


def test_deeply_nested_arguments_are_refused() -> None:
    deep: object = []
    for _ in range(5_000):
        deep = [deep]
    reward = make_reward("tool_call_format", {"tools": ["calculator"]})
    given = [deep, {"expression": deep}, "[" * 100_000, {"expression": {1, 2}}]
    assert reward(completions=[[asked(call(arguments=a))] for a in given]) == [0, 0, 0, 0]


# Text


def test_format_by_pattern() -> None:
    reward = make_reward("text_format", {"pattern": r"^<think>[\s\S]*</think>\n[^<]+$"})
    chat = [{"role": "assistant", "content": "<think>a\nb</think>\nc"}]
    assert reward(completions=[chat, "<think>a</think>", "x<think>a</think>\nb", ""]) == [1, 0, 0, 0]
    with pytest.raises(ValueError, match="'\\(' cannot be used"):
        make_reward("text_format", {"pattern": "("})


@pytest.mark.parametrize("pattern", [r"^(a+)+$", r"^(?=(a|aa)+$)b", r"^(a|aa)+\1$", r"^(a|a?)+$", r"(?=.*b.*c)d"])
def test_patterns_that_explode_elsewhere_end(pattern: str) -> None:
    """Python's `re` would take longer than the universe has on these."""
    assert make_reward("text_format", {"pattern": pattern})(completions=["a" * 900_000 + "!"]) == [0]
    assert make_reward("text_format", {"pattern": "a"})(completions=["a" * 1_000_001]) == [0]


def test_length() -> None:
    texts = ["", "a", "ab", "abcd", "abcde", "a" * 99]
    assert make_reward("text_length", {"least": 2, "most": 4})(completions=texts) == [-1, -1, 0, 0, -1, -1]
    ramp = make_reward("text_length", {"least": 2, "most": 4, "ramp": 2})
    assert ramp(completions=texts) == [-1, -0.5, 0, 0, -0.5, -1]
    tokens = make_reward("text_length", {"most": 2, "unit": "tokens"})
    assert tokens(completions=["abcdef", "a"], completion_ids=[[1, 2], [1, 2, 3]]) == [0, -1]
    for settings in ({"least": 3, "most": 2}, {"ramp": -1}, {"unit": "words"}):
        with pytest.raises(ValueError, match=r"expected|neither"):
            make_reward("text_length", settings)


def test_a_batch_without_any_call_is_no_mistake() -> None:
    """Its None is about the completion; `tool_called_when_needed` says None of what the data lack, and is told of."""
    success, needed = make_reward("tool_call_success"), make_reward("tool_called_when_needed")
    none = {"completions": [NONE, NONE], "needs_tool": [None, None]}
    for _ in range(PATIENCE - 1):
        assert checked(success)(**none) == success(**none) == needed(**none) == [None, None]
    with pytest.warns(UserWarning, match="'tool_called_when_needed' returned None"):
        needed(**none)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        success(**none)
