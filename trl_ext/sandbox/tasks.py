"""Rows for training and evaluation, drawn from a seed: `math`, `tool`, `preference` and `mcq`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from datasets import Dataset

from trl_ext.sandbox.problems import Problem, draw, hints, render
from trl_ext.sandbox.slips import malform, slip_lines

SPLITS = ("train", "test")
LETTERS = "ABCD"
DEFAULT_MIX: Mapping[int, float] = {1: 0.3, 2: 0.35, 3: 0.2, 4: 0.1, 5: 0.05}
Difficulty = int | Mapping[int, float] | None


def user(text: str) -> list[dict[str, str]]:
    """A conversation of one user turn."""
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    """A reply of one assistant turn."""
    return [{"role": "assistant", "content": text}]


def math_row(problem: Problem, kind: str = "math") -> dict[str, Any]:
    """Prompt, problem text, answer, solution, level and hint ladder; `tool` rows differ in `kind` alone."""
    return {
        "prompt": user(problem.text),
        "problem": problem.text,
        "answer": str(problem.answer),
        "solution": render(problem.lines, problem.answer),
        "level": problem.level,
        "hints": hints(problem),
        "kind": kind,
    }


def preference_row(problem: Problem, rng: random.Random) -> dict[str, Any]:
    """Chosen: the solution. Rejected: one wrong step, or the right steps in malformed JSON, with equal chance."""
    good = render(problem.lines, problem.answer)
    if rng.random() < 0.5:
        bad = malform(good, rng)
    else:
        lines = slip_lines(problem, rng)
        bad = render(lines, lines[-1].split("=")[1])
    row = math_row(problem, "preference")
    return {key: row[key] for key in ("prompt", "problem", "answer", "level", "kind")} | {
        "chosen": assistant(good),
        "rejected": assistant(bad),
    }


def mcq_row(problem: Problem, rng: random.Random) -> dict[str, Any]:
    """Four choices in random order, one right; the solution ends in the line `Answer: X`."""
    offsets = rng.sample([n for n in (-10, -2, -1, 1, 2, 3, 10) if problem.answer + n >= 0], 3)
    choices = [str(problem.answer + n) for n in (0, *offsets)]
    rng.shuffle(choices)
    letter = LETTERS[choices.index(str(problem.answer))]
    options = "\n".join(f"{a}) {c}" for a, c in zip(LETTERS, choices, strict=True))
    return {
        "prompt": user(f"{problem.text}\n{options}"),
        "problem": problem.text,
        "choices": choices,
        "answer": letter,
        "solution": "\n".join([*problem.lines, f"Answer: {letter}"]),
        "level": problem.level,
        "kind": "mcq",
    }


KINDS: dict[str, Callable[[Problem, random.Random], dict[str, Any]]] = {
    "math": lambda problem, rng: math_row(problem),
    "tool": lambda problem, rng: math_row(problem, "tool"),
    "preference": preference_row,
    "mcq": mcq_row,
}


def problems(rng: random.Random, split: str, difficulty: Difficulty = None) -> Iterator[Problem]:
    """An endless stream of distinct problems of one split. `difficulty`: a level, weights of levels, or the mix."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {SPLITS}")
    mix = DEFAULT_MIX if difficulty is None else {difficulty: 1.0} if isinstance(difficulty, int) else difficulty
    seen: set[str] = set()
    misses = 0
    while misses < 10_000:
        problem = draw(rng, rng.choices(list(mix), list(mix.values()))[0])
        misses += 1
        if problem.split == split and problem.text not in seen:
            seen.add(problem.text)
            misses = 0
            yield problem
    raise ValueError(f"no new problem in 10,000 draws after {len(seen)}: ask for fewer rows or a higher difficulty")


def rows(
    kind: str = "math", n: int = 1000, seed: int = 0, split: str = "train", difficulty: Difficulty = None
) -> list[dict[str, Any]]:
    """`n` rows of `kind`; the first m of n rows equal the m rows of a smaller call with the same other arguments."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: expected one of {sorted(KINDS)}")
    # Two generators: what a row adds must not change which problem comes next, so all kinds share their problems.
    stream = problems(random.Random(f"problems/{split}/{seed}"), split, difficulty)
    rng = random.Random(f"rows/{kind}/{split}/{seed}")
    return [KINDS[kind](next(stream), rng) for _ in range(n)]


def dataset(
    kind: str = "math", n: int = 1000, seed: int = 0, split: str = "train", difficulty: Difficulty = None
) -> Dataset:
    """`rows(...)` as a `datasets.Dataset`."""
    return Dataset.from_list(rows(kind, n, seed, split, difficulty))
