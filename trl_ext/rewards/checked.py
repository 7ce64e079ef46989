"""A check around a reward function: what it returns is what a gradient will follow, so nothing odd passes silently."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Reward = Callable[..., Any]
SHOWN = 200
"""Characters of a completion in an error message."""
PATIENCE = 10
"""Batches without any verdict before a reward function that never gave one is warned of."""


class RewardError(RuntimeError):
    """A reward function raised, or returned something that cannot be trained on."""


def checked(reward: Reward) -> Reward:
    """`reward` with its result checked; the name and the TRL signature stay.

    Allowed is a list of one finite number, or None (not applicable), for each completion. Raises RewardError that
    names the function, the row and the completion, and for a batch of None alone if the call lacks a column that the
    function reads. With its columns there, a batch may hold no row of this reward's task; `PATIENCE` batches of None
    before the first number give one warning. A function whose attribute `may_abstain` is True says None of what a
    completion is, not of what the data lack: neither is said of it. `unchecked` gives `reward` back.
    """
    name = getattr(reward, "__name__", type(reward).__name__)
    watched = not getattr(reward, "may_abstain", False)
    empty = 0

    def check(completions: Sequence[Any], values: Any, given: Mapping[str, Any]) -> list[float | None]:
        nonlocal watched, empty
        result = _numbers(name, completions, values)
        watched = watched and all(value is None for value in result)
        if result and watched:
            _check_columns(name, columns_of(reward), given)
            empty += 1
            if empty == PATIENCE:
                _warn_of_none(name, columns_of(reward))
        return result

    @functools.wraps(reward)
    def call(completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
        try:
            values = reward(completions=completions, **kwargs)
        except Exception as error:
            raise raised(name, error, completions) from error
        return check(completions, values, kwargs)

    @functools.wraps(reward)
    async def call_async(completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
        try:
            values = await reward(completions=completions, **kwargs)
        except Exception as error:
            raise raised(name, error, completions) from error
        return check(completions, values, kwargs)

    wrapper: Any = call_async if inspect.iscoroutinefunction(reward) else call
    wrapper.__name__ = name
    wrapper.unchecked = reward
    return wrapper


def unchecked(reward: Reward) -> Reward:
    """The function that `checked` was called with; any other one, also a decorator's around a checked one, as it is."""
    inner: Reward = getattr(reward, "unchecked", reward)  # which functools.wraps copies
    return inner if getattr(reward, "__wrapped__", None) is inner else reward


def _check_columns(name: str, columns: Sequence[tuple[str, ...]], given: Mapping[str, Any]) -> None:
    """Raises RewardError, since the reward can never judge, if `given` lacks all alternatives of a column."""
    if missing := [" or ".join(names) for names in columns if not set(names) & set(given)]:
        raise RewardError(
            f"reward '{name}' returned None for all completions of a batch, since the data set lacks the column it reads: "
            f"{', '.join(missing)}. Name it in the `columns` of the recipe."
        )


def _warn_of_none(name: str, columns: Sequence[tuple[str, ...]]) -> None:
    read = f" Can what stands in {', '.join(' or '.join(names) for names in columns)} be read?" if columns else ""
    warnings.warn(
        f"reward '{name}' returned None for all completions of its first {PATIENCE} batches: so far nothing is learned "
        f"from it.{read} Check the `columns` of the recipe and the columns of the data set.",
        stacklevel=4,
    )


def columns_of(reward: Reward) -> list[tuple[str, ...]]:
    """Columns that a reward function reads, each as alternatives: parameters without default, or `needs_columns`."""
    declared = getattr(reward, "needs_columns", None)
    if declared is not None:
        return list(declared)
    given = {
        "prompts",
        "completions",
        "completion_ids",
        "trainer_state",
        "log_extra",
        "log_metric",
        "environments",
        "self",
    }
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(reward).parameters.values()
    return [(p.name,) for p in parameters if p.kind in named and p.default is p.empty and p.name not in given]


def abstaining(reward: Reward) -> Reward:
    """Marks a function whose None is about the completion: a whole batch of None is no mistake."""
    reward.may_abstain = True  # type: ignore[attr-defined]
    return reward


def raised(name: str, error: Exception, completions: Sequence[Any]) -> RewardError:
    """What to raise where a reward function raised `error`."""
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
