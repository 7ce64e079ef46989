"""Arithmetic word problems: a running quantity changed by a chain of +, - and * steps.

A problem is a start value and a tuple of steps; its text, solution lines and hints are pure functions of it.
All values stay in [1, 99], so that a very small model can learn the arithmetic digit by digit.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

NAMES = ("Sam", "Ann", "Tom", "Eva", "Max", "Lia", "Ben", "Zoe")
ITEMS = ("pens", "cups", "eggs", "nuts", "keys", "maps", "bags", "hats")
CLAUSES = {
    "+": ("buys {n} more", "finds {n}"),
    "-": ("loses {n}", "gives away {n}"),
    "*": ("then has {n} times as many", "then has {n} times that"),
}
MAX_VALUE = 99
TEST_SHARE = 5  # one text in five is held out


@dataclass(frozen=True)
class Level:
    """Difficulty: the number of steps, and the largest operand of + and - (factors are at most 9)."""

    steps: int
    largest: int


LEVELS = {1: Level(1, 9), 2: Level(2, 9), 3: Level(2, 15), 4: Level(3, 9), 5: Level(4, 20)}


@dataclass(frozen=True)
class Problem:
    """`start`, then `steps` of (operation, operand) applied from left to right, told about `name` and `item`."""

    name: str
    item: str
    start: int
    steps: tuple[tuple[str, int], ...]
    wording: tuple[int, ...]
    level: int

    @property
    def text(self) -> str:
        """The question as the user asks it."""
        clauses = [CLAUSES[op][w].format(n=n) for (op, n), w in zip(self.steps, self.wording, strict=True)]
        return f"{self.name} has {self.start} {self.item}, {', '.join(clauses)}. How many {self.item}?"

    @property
    def lines(self) -> list[str]:
        """The solution's equations, such as `['3*4=12', '12+5=17']`."""
        return equations(self.start, self.steps)

    @property
    def answer(self) -> int:
        """The value after the last step."""
        return int(self.lines[-1].split("=")[1])

    @property
    def split(self) -> str:
        """`train` or `test`, a function of the text alone: the two can never share a problem."""
        digest = hashlib.sha256(self.text.encode()).digest()
        return "test" if digest[0] % TEST_SHARE == 0 else "train"


def apply(op: str, left: int, right: int) -> int:
    """Value of `left op right` for op in + - *; ValueError for another operation."""
    if op == "+":
        return left + right
    if op == "-":
        return left - right
    if op == "*":
        return left * right
    raise ValueError(f"unknown operation {op!r}: expected one of + - *")


def equations(start: int, steps: Sequence[tuple[str, int]]) -> list[str]:
    """One equation `left op right=value` for each step, each starting from the value of the one before."""
    lines, value = [], start
    for op, operand in steps:
        result = apply(op, value, operand)
        lines.append(f"{value}{op}{operand}={result}")
        value = result
    return lines


def render(lines: Sequence[str], answer: int | str) -> str:
    """The completion: one JSON object over several lines, one line break before each step and before the answer."""
    steps = ",\n".join(json.dumps(line) for line in lines)
    return f'{{"steps": [\n{steps}],\n"answer": {answer}}}'


def hints(problem: Problem) -> list[str]:
    """A ladder of three hints: the operations; the operations with their numbers; all but the last result."""
    operations = " then ".join(op for op, _ in problem.steps)
    plan = " then ".join(f"{op}{n}" for op, n in problem.steps)
    lines = problem.lines
    known = ", ".join([*lines[:-1], lines[-1].split("=")[0]])
    return [f"use {operations}", f"{problem.start} then {plan}", known]


def _step(rng: random.Random, value: int, largest: int) -> tuple[str, int]:
    """A random step from `value` that stays in [1, MAX_VALUE]; the three operations are tried in random order."""
    highest = {"+": min(largest, MAX_VALUE - value), "-": min(largest, value - 1), "*": min(9, MAX_VALUE // value)}
    op = rng.choice([op for op, high in highest.items() if high >= 2])
    return op, rng.randint(2, highest[op])


def draw(rng: random.Random, level: int) -> Problem:
    """A random problem of `level` (1..5); ValueError for another level."""
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}: expected one of {sorted(LEVELS)}")
    size = LEVELS[level]
    start = value = rng.randint(2, size.largest)
    steps = []
    for _ in range(size.steps):
        op, operand = _step(rng, value, size.largest)
        value = apply(op, value, operand)
        steps.append((op, operand))
    wording = tuple(rng.randrange(2) for _ in steps)
    return Problem(rng.choice(NAMES), rng.choice(ITEMS), start, tuple(steps), wording, level)
