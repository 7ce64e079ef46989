"""`--min-effect`: before anything is asked, how many replies it takes to see a difference of a given size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evals.result import Result
from evals.run import Ready
from evals.statistics.planning import Variances, assumed_variances, plan_effect, variances_of_means

ACCURACY = 0.5
"""Assumed without a pilot: where the replies to a question vary most, so that the plan errs on the safe side."""


def pilot(result: Result) -> dict[str, tuple[Variances, float]]:
    """Task -> variances of the last candidate's difference and mean tokens of a reply, from an earlier report."""
    found = {}
    for task in result.tasks:
        if len(result.subjects) > 1 and task.samples > 1:
            before, after = ([s.scores[i] for s in task.questions] for i in (0, -1))
            tokens = sum(sum(s.lengths) for s in task.scores) / sum(len(s.lengths) for s in task.scores)
            found[task.name] = variances_of_means(before, after, task.samples), tokens
    return found


def table(ready: Sequence[Ready], subjects: int, effect: float, pilots: Mapping[str, tuple[Variances, float]]) -> str:
    """A sentence for each task. Tokens are the limit of the preset unless a pilot says how long replies are."""
    lines = []
    for one in ready:
        known = pilots.get(one.task.name)
        variances, tokens = known or (assumed_variances(ACCURACY), float(one.sampling.max_new_tokens))
        questions = len({item.question for item in one.items})
        plan = plan_effect(effect, questions, variances, tokens, max(2, subjects))
        source = "from the pilot" if known else f"assumed: accuracy {ACCURACY:.0%}, replies as long as allowed"
        lines.append(f"{one.task.name}: {plan.words} ({source})")
    return "\n".join(lines)
