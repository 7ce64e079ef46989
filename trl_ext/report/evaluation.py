"""Before and after on held-out sandbox problems: graded replies, and what they say in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals import stats
from trl_ext.sandbox.evaluate import Record, evaluate

SAMPLES = 4
"""Replies to each problem: seeds move single replies far more than means of four."""
TEMPERATURE = 1.0
"""That of training: the distribution that the trainer optimises."""
MEASURES = {"accuracy": "correct", "validity": "valid"}
"""What is reported -> the verdict of a `Record` that it averages."""


@dataclass(frozen=True)
class Evaluation:
    """Graded replies to the same problems: `records` hold `samples` replies for each of `problems`, in order."""

    problems: tuple[str, ...]
    records: tuple[Record, ...]
    samples: int

    def scores(self, measure: str) -> NDArray[np.float64]:
        """(N, K) of 0 and 1 for "accuracy" or "validity"."""
        values = [float(getattr(record, MEASURES[measure])) for record in self.records]
        return np.array(values).reshape(len(self.problems), self.samples)

    def estimate(self, measure: str) -> stats.Estimate:
        """The mean with its 95 % interval."""
        return stats.estimate(self.scores(measure))

    @property
    def correct_among_valid(self) -> float:
        """Share of right answers among valid replies, NaN without any: what was learned beside the format."""
        valid = self.scores("validity").sum()
        return float(self.scores("accuracy").sum() / valid) if valid else float("nan")

    @property
    def mean_length(self) -> float:
        """Tokens of a reply, its end token included."""
        return float(np.mean([record.length for record in self.records]))


def evaluate_sandbox(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], seed: int) -> Evaluation:
    """`SAMPLES` replies to each row at `TEMPERATURE`, drawn from `seed`, graded.

    The same rows and seed before and after make the comparison paired. Training mode and random state are left as
    they were; a PEFT model answers with its adapter. Raises ValueError for fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError(
            f"{len(rows)} held-out problem: an interval needs at least 2; set eval_rows to 2 or more, or to 0 for none"
        )
    records = evaluate(model, tokenizer, rows, samples=SAMPLES, temperature=TEMPERATURE, seed=seed)
    return Evaluation(tuple(str(row["problem"]) for row in rows), tuple(records), SAMPLES)


def compare(before: Evaluation, after: Evaluation, measure: str) -> stats.Comparison:
    """after - before, paired by problem. Raises ValueError when the problems differ."""
    if before.problems != after.problems:
        raise ValueError("the two evaluations answer different problems, so they cannot be compared")
    return stats.compare(before.scores(measure), after.scores(measure))


def percent(estimate: stats.Estimate) -> str:
    """ "41.3% [35.0, 47.8]"."""
    return f"{100 * estimate.mean:.1f}% [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def p_text(p: float) -> str:
    """ "p < 0.001" or "p = 0.042"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def verdict(found: stats.Comparison) -> str:
    """The comparison as one sentence: verdict, difference, interval, p value, n and what could have been seen."""
    if found.wins == found.losses == 0:
        return f"no change: all {found.n} problems scored the same before and after"
    words = "no difference can be told" if found.verdict == "no evidence" else found.verdict
    numbers = f"{100 * found.difference:+.1f} points [{100 * found.low:.1f}, {100 * found.high:.1f}]"
    text = f"{words}: {numbers}, {p_text(found.p)}, n = {found.n}"
    if found.detectable == 0:  # every problem moved by the same amount
        return text
    size = 100 * found.detectable
    return (
        f"{text}; the smallest difference that could have been seen is about {size:.{0 if size >= 2 else 1}f} points"
    )


def examples(before: Evaluation, after: Evaluation, count: int) -> list[tuple[Record, Record]]:
    """Up to `count` pairs of first replies newly right, then up to `count` newly wrong, in the order of problems."""
    pairs = list(zip(before.records[:: before.samples], after.records[:: after.samples], strict=True))
    solved = [(a, b) for a, b in pairs if b.correct and not a.correct]
    broken = [(a, b) for a, b in pairs if a.correct and not b.correct]
    return solved[:count] + broken[:count]
