"""What an evaluation found, as plain data: the analysis fills it, the report and the gate read it, JSON keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from evals.stats import Comparison, Estimate


@dataclass(frozen=True)
class Subject:
    """A model that answered: the base, or the base with one adapter.

    `key` identifies weights, precision and chat template (not the path). `step` is the training step of a checkpoint.
    """

    name: str
    key: str
    model: str
    adapter: str | None = None
    quantization: str | None = None
    dtype: str = ""
    step: int | None = None


@dataclass(frozen=True)
class Curve:
    """Values at `k` = 1, 2, 4, ... drawn replies with 95 % intervals, for instance pass@k."""

    k: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Part:
    """The headline on one part of the questions (a level, a family, a gold letter): per subject, in their order."""

    name: str
    questions: int
    means: tuple[float, ...]


@dataclass(frozen=True)
class Scores:
    """One subject on one task.

    `lengths`: tokens of every reply. `truncated`, `no_answer`: shares of replies. `majority`: maj@K, None where no
    reply votes. `pass_at`: unbiased pass@k of the headline, None unless the headline is 0 or 1 for each reply.
    `tokens_right`, `tokens_wrong`: mean length by verdict, None without such replies.
    """

    metrics: Mapping[str, Estimate]
    truncated: float
    no_answer: float
    lengths: tuple[int, ...]
    tokens_right: float | None = None
    tokens_wrong: float | None = None
    majority: Estimate | None = None
    pass_at: Curve | None = None


@dataclass(frozen=True)
class Paired:
    """A candidate against the base on one metric. `p_holm`: adjusted over the headlines of all tasks and candidates of
    the report, None for metrics that are no headline. `fixed`: (low, high) for these very questions (sampling noise
    only), None below 4 replies. `verdict`: "better", "worse" or "no evidence"; for a headline it uses `p_holm`.
    """

    comparison: Comparison
    verdict: str
    p_holm: float | None = None
    fixed: tuple[float, float] | None = None


@dataclass(frozen=True)
class Split:
    """Where a headline's change comes from: base and candidate (format, content given format), changes of the two
    factors in score units of the headline (they add up to its change), and what that says in words.
    """

    base: tuple[float, float]
    candidate: tuple[float, float]
    from_format: float
    from_content: float
    words: str


@dataclass(frozen=True)
class Versus:
    """One candidate against the base on one task."""

    candidate: str
    metrics: Mapping[str, Paired]
    split: Split | None = None


@dataclass(frozen=True)
class Shown:
    """A question for the page: scores per subject, and its texts unless the task is gated (then None).

    `replies`: the first reply of each subject.
    """

    id: str
    group: str
    level: int | None
    scores: tuple[float, ...]
    prompt: str | None
    gold: str | None
    replies: tuple[str, ...] | None


@dataclass(frozen=True)
class TaskResult:
    """One task of a report. `subjects` of `scores`, `Part.means` and `Shown.scores` are those of the report, in order.

    `parts`: heading ("level", "family", "gold letter") -> parts. `questions`: all of them, in the order of the task.
    `notes`: what a reader must know (contamination, truncation). `best_of`: per subject,
    accuracy of the best of k replies under a judge, empty unless asked for. `control`: the base under the task's grammar, and
    `control_versus` that against the base; None unless asked for.
    """

    name: str
    title: str
    kind: str
    generated: bool
    gated: bool
    version: int
    origin: str
    headline: str
    metrics: Mapping[str, str]
    sampling: Mapping[str, Any]
    samples: int
    chance: float | None
    scores: tuple[Scores, ...]
    versus: tuple[Versus, ...]
    parts: Mapping[str, tuple[Part, ...]]
    questions: tuple[Shown, ...]
    notes: tuple[str, ...] = ()
    best_of: tuple[Curve | None, ...] = ()
    control: Scores | None = None
    control_versus: Versus | None = None


@dataclass(frozen=True)
class Skipped:
    """A task that was asked for and could not be run, and what to do about it."""

    name: str
    reason: str


@dataclass(frozen=True)
class Spread:
    """Several adapters of one recipe: mean and SD over training runs of a task's headline gain, in score units."""

    task: str
    gains: tuple[float, ...]
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """A whole report. `subjects[0]` is the base. `verdict`: the sentence at the top, for each candidate.

    `environment`: versions, seeds, hardware, command, date; no machine paths. `spread`: None for fewer than two
    adapters that are not checkpoints of one run. `guard`: what happened on the tasks beside the target, in words.
    """

    subjects: tuple[Subject, ...]
    tasks: tuple[TaskResult, ...]
    verdict: tuple[str, ...]
    environment: Mapping[str, Any]
    skipped: tuple[Skipped, ...] = ()
    spread: tuple[Spread, ...] = ()
    guard: str | None = None
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Plain dicts and lists, for `json.dumps`."""
        return asdict(self)
