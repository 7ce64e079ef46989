"""One-line Python functions for the sandbox: instructions, and sloppy demonstrations of code and of tests.

`f(x)` adds, subtracts or multiplies by a number from 1 to 5, said in four ways: 60 instructions. A demonstrated code is
wrong with `WRONG_CODE`, a demonstrated test with `WRONG_TEST`, so that a model taught by them has something to sort out.
"""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset

from trl_ext.sandbox.tasks import assistant, user

CODE_PROMPT, TEST_PROMPT = "{prompt} Code of {entry_point}:", "{prompt} Test of {entry_point}:"
WRONG_CODE, WRONG_TEST = 0.4, 1 / 3
ENTRY_POINT = "f"
INPUTS = range(4)
_SAID = {
    "+": ("f adds {n} to x.", "f gives x plus {n}.", "f is the sum of x and {n}.", "f makes x larger by {n}."),
    "-": ("f takes {n} from x.", "f gives x minus {n}.", "f is x less {n}.", "f makes x smaller by {n}."),
    "*": ("f multiplies x by {n}.", "f gives {n} times x.", "f is the product of x and {n}.", "f scales x by {n}."),
}
_OPERATIONS = {"+": lambda x, n: x + n, "-": lambda x, n: x - n, "*": lambda x, n: x * n}


def tasks() -> list[tuple[str, str, int]]:
    """(instruction, operation, number) of all 60."""
    return [(said.format(n=n), op, n) for op, ways in _SAID.items() for said in ways for n in range(1, 6)]


def value(operation: str, number: int, x: int) -> int:
    """What f should return."""
    return int(_OPERATIONS[operation](x, number))


def instructions(n: int = 60, seed: int = 0) -> Dataset:
    """`n` of the instructions, in random order, with the name of the function. ValueError for more than there are."""
    found = tasks()
    if n > len(found):
        raise ValueError(f"n: there are {len(found)} instructions, asked for {n}")
    random.Random(f"programs/{seed}").shuffle(found)
    rows = [{"prompt": user(said), "entry_point": ENTRY_POINT, "operation": op, "number": k} for said, op, k in found]
    return Dataset.from_list(rows[:n])


def demonstrations(n: int = 2000, seed: int = 0) -> Dataset:
    """`n` sloppy demonstrations, codes and tests in turn."""
    rng = random.Random(f"program demos/{seed}")
    found = tasks()
    return Dataset.from_list([_demonstration(*rng.choice(found), i % 2 == 0, rng) for i in range(n)])


def _demonstration(said: str, operation: str, number: int, is_code: bool, rng: random.Random) -> dict[str, Any]:
    template = CODE_PROMPT if is_code else TEST_PROMPT
    text = code(operation, number, rng) if is_code else self_test(operation, number, rng)
    prompt = template.format(prompt=said, entry_point=ENTRY_POINT)
    return {"prompt": user(prompt), "completion": assistant(f"```python\n{text}\n```")}


def code(operation: str, number: int, rng: random.Random) -> str:
    """A code, with the chance `WRONG_CODE` for another operation or number."""
    if rng.random() < WRONG_CODE:
        wrong = [(op, n) for op in _OPERATIONS for n in range(1, 6) if (op == operation) != (n == number)]
        operation, number = rng.choice(wrong)
    return f"def f(x):\n    return x {operation} {number}"


def self_test(operation: str, number: int, rng: random.Random) -> str:
    """A test on one input, with the chance `WRONG_TEST` for a wrong result."""
    x = rng.choice(INPUTS)
    result = value(operation, number, x)
    if rng.random() < WRONG_TEST:
        result = max(0, result + rng.choice((-2, -1, 1, 2))) if result >= 0 else result - 1
    return f"assert f({x}) == {result}"


PROGRAMS = {"programs": instructions, "program_demos": demonstrations}
