"""Best of k: what a reward is worth as the one that chooses among stored replies (`--judge`). Source: arXiv 2512.19905."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evals.analysis.tables import Graded
from evals.result import Curve
from evals.statistics.judge import JudgeCurves, judge_curves
from evals.task import Item, Task

Reward = Callable[..., Any]


def judged(
    task: Task, items: Sequence[Item], replies: Mapping[str, Sequence[Graded]], reward: Reward
) -> JudgeCurves | None:
    """The judge's curves on one subject's replies, None where a prompt has one reply only.

    The reward gets what TRL gives it: `prompts`, `completions` as conversations, `completion_ids` (empty, the tokens are
    not kept), and the gold as `answer` and `solution`. T is in units of each prompt's SD of scores, since rewards differ
    in scale. A reward that abstains (None) counts as its lowest score.
    """
    if min(map(len, replies.values())) < 2:
        return None
    rows = [(item, graded) for item in items for graded in replies[item.id]]
    gold = [str(item.gold) for item, _ in rows]
    values = reward(
        prompts=[list(item.messages) for item, _ in rows],
        completions=[[{"role": "assistant", "content": graded.text}] for _, graded in rows],
        completion_ids=[[] for _ in rows],
        answer=gold,
        solution=gold,
    )
    known = [float(value) for value in values if value is not None]
    floor = min(known, default=0.0)
    scores = [floor if value is None else float(value) for value in values]
    right = [graded.grade.scores[task.headline] for _, graded in rows]
    width = len(rows) // len(items)
    return judge_curves(_table(scores, width), _table(right, width), relative=True)


def _table(values: Sequence[float], width: int) -> list[list[float]]:
    return [list(values[at : at + width]) for at in range(0, len(values), width)]


def best_of(found: JudgeCurves) -> Curve:
    """Accuracy of the reply with the highest score among k, with intervals: the curve at T = 0."""
    return Curve(found.k, found.accuracy[0], found.low[0], found.high[0])
