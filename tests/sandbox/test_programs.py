"""The sandbox's one-line functions: instructions, values, and how often a demonstration is wrong."""

import re

import pytest

from trl_ext.data_sources import DataError, _programs
from trl_ext.loops import dstc
from trl_ext.sandbox.programs import demonstrations, instructions, tasks, value


def test_values():
    assert [value(op, 3, 2) for op in "+-*"] == [5, -1, 6]


def test_instructions_are_distinct_and_seeded():
    rows = list(instructions(60, seed=1))
    texts = [row["prompt"][0]["content"] for row in rows]
    assert len(set(texts)) == 60 == len(tasks())
    assert all(str(row["number"]) in text for row, text in zip(rows, texts, strict=True))
    assert {row["entry_point"] for row in rows} == {"f"}
    assert texts == [row["prompt"][0]["content"] for row in instructions(60, seed=1)]
    assert texts != [row["prompt"][0]["content"] for row in instructions(60, seed=2)]
    with pytest.raises(ValueError, match="there are 60 instructions"):
        instructions(61)


def test_demonstrations_are_as_sloppy_as_they_say():
    """Each is read by the parts of its own text and compared with what its instruction asks for."""
    known = {said: (op, n) for said, op, n in tasks()}
    right = {"Code": [], "Test": []}
    for row in demonstrations(4000, seed=0):
        said, kind = re.fullmatch(r"(.*\.) (Code|Test) of f:", row["prompt"][0]["content"]).groups()
        text = dstc.first_block(row["completion"][0]["content"])
        assert dstc.parsed(text) is not None
        operation, number = known[said]
        if kind == "Code":
            found = re.fullmatch(r"def f\(x\):\n    return x ([-+*]) (\d)", text).groups()
            right[kind].append(found == (operation, str(number)))
        else:
            assert dstc.calls(dstc.parsed(text), "f")
            x, result = map(int, re.fullmatch(r"assert f\((\d)\) == (-?\d+)", text).groups())
            right[kind].append(result == value(operation, number, x))
    assert sum(right["Code"]) / 2000 == pytest.approx(0.6, abs=0.04)
    # max(0, ...) turns some wrong results of small values back into right ones, so a little more than 2/3.
    assert 2 / 3 - 0.03 < sum(right["Test"]) / 2000 < 2 / 3 + 0.06


def test_what_the_data_set_refuses():
    with pytest.raises(DataError, match="difficulty"):
        _programs("programs", {"difficulty": 1})
    with pytest.raises(DataError, match="sandbox/programs: n: there are 60"):
        _programs("programs", {"n": 100})
