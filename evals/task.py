"""What a benchmark is to this harness: items with prompts and golds, a pure grader, metrics and sampling presets.

A task is written once; our runner, lm-eval's own command and the report all read the same object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, str]


@dataclass(frozen=True)
class Item:
    """One prompt. Everything in it is JSON-able, so that it can travel through `datasets` and lm-eval.

    `question` is the unit of the statistics: items that show one question in several ways (rotated options) share it.
    `group` names the template or family of a generated question, whose questions are correlated; "" stands for none.
    """

    id: str
    question: str
    messages: Sequence[Message]
    gold: Any
    group: str = ""
    level: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grade:
    """The verdict on one reply: a value for each metric of the task, and the answer that votes (None: it states none).

    Values lie in [0, 1], but for the counts of a pooled ratio (`Metric.ratio`).
    """

    scores: Mapping[str, float]
    answer: str | None


@dataclass(frozen=True)
class Metric:
    """How one metric is averaged and read.

    Without `ratio`: mean over replies, then over questions. With `ratio` = (numerator, denominator), names of two
    counts in `Grade.scores`: their sums over all replies are divided, as for a rate per key.
    """

    doc: str
    higher_is_better: bool = True
    ratio: tuple[str, str] | None = None


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn; every field is passed on, so that no model's own generation config can leak in.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 are off. `seed` numbers the shared sampling noise.
    """

    samples: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 2048
    seed: int = 0


@dataclass(frozen=True)
class Source:
    """Where a task's items come from.

    `folder`: a folder that holds the data set as the Hub does, for machines without network. `limit`: the first
    questions only (None: all). `seed`: of generated items and of option orders.
    """

    folder: str | None = None
    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """A benchmark. `load` gives its items, `grade` judges one reply; both are pure, so that regrading is exact.

    `grade(item, text)` never raises and returns within its budget on any text. `origin` says in words where
    the items come from. `stand_in` names the generated task that is asked instead when the data cannot be had.
    `format_metric` splits the headline: P(format) times the headline among the replies that pass it. `schema`: the JSON
    Schema of an item, for structured tasks whose control can be asked.
    `memorable` is a warning about contamination that the report prints.
    """

    name: str
    title: str
    version: int
    origin: str
    headline: str
    metrics: Mapping[str, Metric]
    load: Callable[[Source], list[Item]]
    grade: Callable[[Item, str], Grade]
    presets: Mapping[str, Sampling]
    format_metric: str
    kind: Literal["math", "choice", "structured"]
    generated: bool = False
    gated: bool = False
    chance: float | None = None
    stand_in: str | None = None
    memorable: str | None = None
    schema: Callable[[Item], Any] | None = None


class DataError(RuntimeError):
    """A task's data cannot be had; the message says what to do. `gated`: for want of permission."""

    def __init__(self, message: str, gated: bool = False) -> None:
        super().__init__(message)
        self.gated = gated
