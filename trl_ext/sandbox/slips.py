"""Realistic mistakes: wrong sums, misread steps and malformed JSON, drawn at random."""

from __future__ import annotations

import random

from trl_ext.sandbox.problems import Problem, apply, render


def _wrong_step(rng: random.Random, value: int, op: str, operand: int) -> tuple[str, int, int]:
    """A wrong version (op, operand, result) of one step: wrong result, wrong operation or wrong operand."""
    kind = rng.choice(("result", "result", "operation", "operand"))
    if kind == "operation":
        op = rng.choice([other for other in "+-" if other != op])
    if kind == "operand":
        operand += rng.choice((1, 2))
    result = apply(op, value, operand)
    if kind == "result":
        result += rng.choice((1, -1, 2, 10, -10))
    return op, operand, result


def slip_lines(problem: Problem, rng: random.Random) -> list[str]:
    """The solution's equations with one wrong step; later steps go on from the wrong value, consistently."""
    wrong = rng.randrange(len(problem.steps))
    lines, value = [], problem.start
    for index, (op, operand) in enumerate(problem.steps):
        result = apply(op, value, operand)
        if index == wrong:
            op, operand, result = _wrong_step(rng, value, op, operand)
        result = max(result, 0)
        lines.append(f"{value}{op}{operand}={result}")
        value = result
    return lines


def malform(text: str, rng: random.Random) -> str:
    """`text` with one fault that makes strict JSON parsing fail: a lost quote, bracket, comma or brace."""
    faults = [
        text.removesuffix("}"),
        text.replace('"],\n', '"]\n'),
        text.replace('"],\n', '",\n'),
        text.replace("}", ",}"),
        text.replace('"],\n', "],\n"),
        text.replace('[\n"', "[\n", 1),
    ]
    if '",\n' in text:
        faults.append(text.replace('",\n', '"\n', 1))
    return rng.choice(faults)


def sloppy(problem: Problem, rng: random.Random, *, wrong: float, malformed: float) -> str:
    """A completion with a wrong step with probability `wrong` and, independently, a JSON fault with `malformed`."""
    lines = slip_lines(problem, rng) if rng.random() < wrong else problem.lines
    text = render(lines, lines[-1].split("=")[1])
    return malform(text, rng) if rng.random() < malformed else text
