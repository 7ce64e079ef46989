"""Rows for training and evaluation, drawn from a seed.

`math`, `tool` and `mcq` are answered; `preferences`, `labels` and `demos` hold replies for DPO, KTO and SFT.
"""

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
    """Chosen: the solution. Rejected: one with a fault."""
    good = render(problem.lines, problem.answer)
    return _asked(problem, "preferences") | {"chosen": assistant(good), "rejected": assistant(faulty(problem, rng))}


def faulty(problem: Problem, rng: random.Random) -> str:
    """One wrong step, or the right steps in malformed JSON, with equal chance."""
    if rng.random() < 0.5:
        return malform(render(problem.lines, problem.answer), rng)
    lines = slip_lines(problem, rng)
    return render(lines, lines[-1].split("=")[1])


def _asked(problem: Problem, kind: str) -> dict[str, Any]:
    row = math_row(problem, kind)
    return {key: row[key] for key in ("prompt", "problem", "answer", "level", "kind")}


def label_row(problem: Problem, rng: random.Random, good: bool) -> dict[str, Any]:
    """Thumbs up (`label` true): the solution. Thumbs down: a reply with a fault, as the rejected ones of a pair."""
    text = render(problem.lines, problem.answer) if good else faulty(problem, rng)
    return _asked(problem, "labels") | {"completion": assistant(text), "label": good}


def demo_row(problem: Problem, rng: random.Random) -> dict[str, Any]:
    """The solution as a demonstration."""
    return _asked(problem, "demos") | {"completion": assistant(render(problem.lines, problem.answer))}


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
    "preferences": preference_row,
    "demos": demo_row,
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


def label_rows(
    n: int, seed: int, split: str, difficulty: Difficulty, bad_difficulty: Difficulty, bad_share: float
) -> list[dict[str, Any]]:
    """`n` labelled replies, a share `bad_share` of them thumbs down.

    With `bad_difficulty` the prompts of those come from another distribution than the prompts of the good ones.
    """
    if not 0 <= bad_share <= 1:
        raise ValueError(f"bad_share {bad_share} is not a share between 0 and 1")
    good = problems(random.Random(f"problems/{split}/{seed}"), split, difficulty)
    bad = good
    if bad_difficulty is not None:
        bad = problems(random.Random(f"bad problems/{split}/{seed}"), split, bad_difficulty)
    rng = random.Random(f"rows/labels/{split}/{seed}")
    verdicts = (rng.random() >= bad_share for _ in range(n))
    return [label_row(next(good if verdict else bad), rng, verdict) for verdict in verdicts]


def rows(
    kind: str = "math",
    n: int = 1000,
    seed: int = 0,
    split: str = "train",
    difficulty: Difficulty = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """`n` rows of `kind`; the first m of n rows equal the m rows of a smaller call with the same other arguments.

    `options`: those of `label_rows`, for `labels` alone.
    """
    if kind == "labels":
        return label_rows(n, seed, split, difficulty, **{"bad_difficulty": None, "bad_share": 0.5, **options})
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: expected one of {sorted([*KINDS, 'labels'])}")
    if options:
        raise ValueError(f"{', '.join(options)}: only labels have thumbs-down rows, this is {kind!r}")
    # Two generators: what a row adds must not change which problem comes next, so all kinds share their problems.
    stream = problems(random.Random(f"problems/{split}/{seed}"), split, difficulty)
    rng = random.Random(f"rows/{kind}/{split}/{seed}")
    return [KINDS[kind](next(stream), rng) for _ in range(n)]


def dataset(
    kind: str = "math",
    n: int = 1000,
    seed: int = 0,
    split: str = "train",
    difficulty: Difficulty = None,
    **options: Any,
) -> Dataset:
    """`rows(...)` as a `datasets.Dataset`."""
    return Dataset.from_list(rows(kind, n, seed, split, difficulty, **options))
