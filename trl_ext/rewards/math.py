"""The reward `math_correct`: is the final answer of a completion equal to the gold answer?

In TRL's signature, with the grader of the evaluation: what training rewards is what the benchmarks measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evals.graders.answers import final_answer
from evals.graders.math import equal, gold_answer
from evals.graders.math_process import MathProcess
from trl_ext.rewards.checked import Reward
from trl_ext.sandbox.rewards import reply_text


def make_math_correct(seconds: float = 2.0) -> Reward:
    """The reward `math_correct`; an answer that takes math-verify longer than `seconds` counts as wrong."""
    if not 0 < seconds <= 60:
        raise ValueError(f"seconds must be above 0 and at most 60, got {seconds}")
    process = MathProcess(seconds)

    def math_correct(
        completions: Sequence[Any],
        answer: Sequence[Any] | None = None,
        solution: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """1.0 right, 0.0 wrong, None without a gold answer that can be read. Gold: column `answer`, else `solution`."""
        golds = answer if answer is not None else solution
        if golds is None:
            return [None] * len(completions)
        return [_reward(reply_text(c), gold, process) for c, gold in zip(completions, golds, strict=True)]

    math_correct.needs_columns = [("answer", "solution")]  # type: ignore[attr-defined]
    return math_correct


def _reward(reply: str, gold: Any, process: MathProcess) -> float | None:
    wanted = None if gold is None else gold_answer(str(gold))
    if wanted is None:
        return None
    found = final_answer(reply) or ""  # the gold must still be readable, or the row is left out for every reply
    verdict = equal(found, wanted, process)
    return None if verdict is None else float(verdict)
