"""A check around a reward function: what it returns is what a gradient will follow, so nothing odd passes silently."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

Reward = Callable[..., Any]
SHOWN = 200
"""Characters of a completion in an error message."""


class RewardError(RuntimeError):
    """A reward function raised, or returned something that cannot be trained on."""


def checked(reward: Reward) -> Reward:
    """`reward` with its result checked; the name and the TRL signature stay.

    Allowed is a list of one finite number, or None (not applicable), for each completion. Raises RewardError that
    names the function, the row and the completion. A batch of None alone is refused until the function has judged
    something: it then most likely looks for a column that the data set does not have. A function whose attribute
    `may_abstain` is True says None of what a completion is, not of what the data lack, and is not refused.
    """
    name = getattr(reward, "__name__", type(reward).__name__)
    judged = bool(getattr(reward, "may_abstain", False))

    def check(completions: Sequence[Any], values: Any) -> list[float | None]:
        nonlocal judged
        result = _numbers(name, completions, values)
        judged = judged or any(value is not None for value in result)
        if result and not judged:
            raise RewardError(
                f"reward '{name}' returned None for all {len(result)} completions of a batch, so nothing is learned "
                "from it. It found no gold answer: check the `columns` of the recipe and the columns of the data set."
            )
        return result

    @functools.wraps(reward)
    def call(completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
        try:
            values = reward(completions=completions, **kwargs)
        except Exception as error:
            raise _raised(name, error, completions) from error
        return check(completions, values)

    @functools.wraps(reward)
    async def call_async(completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
        try:
            values = await reward(completions=completions, **kwargs)
        except Exception as error:
            raise _raised(name, error, completions) from error
        return check(completions, values)

    wrapper = call_async if inspect.iscoroutinefunction(reward) else call
    wrapper.__name__ = name
    return wrapper


def abstaining(reward: Reward) -> Reward:
    """Marks a function whose None is about the completion: a whole batch of None is no mistake."""
    reward.may_abstain = True  # type: ignore[attr-defined]
    return reward


def _raised(name: str, error: Exception, completions: Sequence[Any]) -> RewardError:
    first = shown(completions[0]) if completions else "none"
    return RewardError(
        f"reward '{name}' raised {type(error).__name__}: {error}. It was called with {len(completions)} completions, "
        f"the first: {first}"
    )


def _numbers(name: str, completions: Sequence[Any], values: Any) -> list[float | None]:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise RewardError(f"reward '{name}' returned {type(values).__name__}, not a list of numbers")
    if len(values) != len(completions):
        raise RewardError(f"reward '{name}' returned {len(values)} values for {len(completions)} completions")
    return [_number(name, row, value, completions[row]) for row, value in enumerate(values)]


def _number(name: str, row: int, value: Any, completion: Any) -> float | None:
    if value is None:
        return None
    value = value.item() if callable(getattr(value, "item", None)) else value  # a tensor's or an array's element
    if not isinstance(value, numbers.Real):
        problem = f"{value!r}, which is no number"
    elif not math.isfinite(value):
        problem = f"{value}"
    else:
        return float(value)
    raise RewardError(f"reward '{name}' gave {problem} for row {row}. Its completion: {shown(completion)}")


def shown(completion: Any) -> str:
    """The first `SHOWN` characters of a completion, quoted."""
    turns = (
        [str(turn.get("content") or "") for turn in completion] if isinstance(completion, list) else [str(completion)]
    )
    text = "\n".join(turns)
    return repr(text[:SHOWN]) + ("..." if len(text) > SHOWN else "")
