"""Small tasks, items and graded replies for the analysis tests."""

from __future__ import annotations

from evals.analysis.tables import Graded
from evals.result import Subject
from evals.task import Grade, Item, Metric, Sampling, Task

SAMPLING = Sampling(samples=2, temperature=0.6, max_new_tokens=100)


def make_task(**changes):
    settings = {
        "name": "sums",
        "title": "Sums",
        "version": 1,
        "origin": "made for a test",
        "headline": "right",
        "metrics": {"right": Metric("the answer is right"), "valid": Metric("the reply has an answer")},
        "load": lambda source: [],
        "grade": lambda item, text: Grade({}, None),
        "presets": {"full": SAMPLING},
        "format_metric": "valid",
        "kind": "math",
    }
    return Task(**(settings | changes))


def make_items(count, **fields):
    return [
        Item(f"q{i}", f"q{i}", [{"role": "user", "content": f"what is {i} + 1?"}], str(i + 1), **fields)
        for i in range(count)
    ]


def reply(right, sample=0, answer=None, valid=1, tokens=10, truncated=False, **scores):
    grade = Grade({"right": right, "valid": valid} | scores, answer)
    return Graded(grade, f"reply {sample}", tokens, truncated, sample)


def replies(rows):
    """[[scores of q0's replies], ...] -> item id -> graded replies; a right reply answers "r", a wrong one "w"."""
    return {
        f"q{i}": [reply(score, sample, "r" if score else "w") for sample, score in enumerate(row)]
        for i, row in enumerate(rows)
    }


def subject(name, step=None):
    return Subject(name, f"key-{name}", "tiny", None if name == "base" else name, step=step)
