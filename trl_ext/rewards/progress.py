"""Progress reward: the share of a task's turns that were done right (RODS, arXiv 2606.19047). Card: rods.

R_P = (1/N) sum_t r_t_state r_t_exec with both factors in {0, 1} and N the turns of the task, not those that were taken:
stopping early cannot raise it (card: decision).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl_ext.sandbox.rewards import Completion, parse_reply, reply_text


def progress(state: Sequence[bool], execution: Sequence[bool], turns: int) -> float:
    """R_P of one rollout: `state[t]` the state is right after turn t, `execution[t]` its calls ran; a turn that was not
    taken counts as wrong. ValueError for a task without turns, more turns than it has, or different lengths."""
    if turns < 1:
        raise ValueError(
            f"progress: a task of {turns} turns has no share that was done right; give the turns of the task"
        )
    if len(state) != len(execution) or len(state) > turns:
        raise ValueError(
            f"progress: {len(state)} states and {len(execution)} executions in a task of {turns} turns; give one of "
            "each for every turn taken"
        )
    return sum(s and e for s, e in zip(state, execution, strict=True)) / turns


def steps_right(completions: list[Completion], solution: list[str], **kwargs: Any) -> list[float]:
    """R_P on sandbox problems: a turn is a step of the solution, or its answer; 0 for a reply that is not valid JSON.

    A step's state is right if it is the solution's equation at that place; it ran if the reply could be read at all.
    """
    return [_steps_right(reply_text(c), s) for c, s in zip(completions, solution, strict=True)]


def _steps_right(text: str, solution: str) -> float:
    reply, gold = parse_reply(text), parse_reply(solution)
    if gold is None:
        raise ValueError(f"steps_right: column solution holds no sandbox solution: {solution[:100]!r}")
    if reply is None:
        return 0.0
    right = [a == b for a, b in zip(reply["steps"], gold["steps"], strict=False)]
    right += [False] * (len(gold["steps"]) - len(right)) + [reply["answer"] == gold["answer"]]
    return progress(right, [True] * len(right), len(gold["steps"]) + 1)
