"""The table of reward names. A recipe names them under `rewards`, or names any `module.function`."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from trl_ext.plan import did_you_mean
from trl_ext.rewards.checked import Reward, checked, columns_of


def _function(path: str) -> Callable[[], Reward]:
    """A factory without settings for the function at `path`, imported on use."""

    def factory() -> Reward:
        return imported(path)

    return factory


def _factory(path: str) -> Callable[..., Any]:
    """The factory at `path`, imported on use; it takes its own settings and makes one reward or several."""

    def factory(**settings: Any) -> Any:
        make = imported(path)
        _bind(make, settings)
        return make(**settings)

    return factory


def _soft_overlong(max_completion_len: int = 1280, soft_punish_cache: int = 256) -> Reward:
    """TRL's overlong punishment with the values of TRL's own script as defaults."""
    return imported("trl.rewards.get_soft_overlong_punishment")(max_completion_len, soft_punish_cache)


REWARDS: dict[str, Callable[..., Reward | tuple[Reward, ...]]] = {
    "math_correct": _factory("trl_ext.rewards.math.make_math_correct"),
    "rl_struct": _factory("trl_ext.rewards.structure.make_rl_struct"),  # all five terms below
    "rl_struct_valid": _factory("trl_ext.rewards.structure.make_valid"),
    "rl_struct_struct": _factory("trl_ext.rewards.structure.make_struct"),
    "rl_struct_format": _factory("trl_ext.rewards.structure.make_format"),
    "rl_struct_correct": _factory("trl_ext.rewards.structure.make_correct"),
    "rl_struct_length": _factory("trl_ext.rewards.structure.make_length"),
    "json_schema": _factory("trl_ext.rewards.structure.make_json_schema"),
    "tool_call_count": _factory("trl_ext.rewards.tools.make_tool_call_count"),
    "tool_call_success": _factory("trl_ext.rewards.tools.make_tool_call_success"),
    "tool_call_format": _factory("trl_ext.rewards.tools.make_tool_call_format"),
    "tool_called_when_needed": _factory("trl_ext.rewards.tools.make_tool_called_when_needed"),
    "text_format": _factory("trl_ext.rewards.text.make_text_format"),
    "text_length": _factory("trl_ext.rewards.text.make_text_length"),
    "reward_ensemble": _factory("trl_ext.rewards.reward_ensemble.make_reward_ensemble"),
    "steps_consistent": _function("trl_ext.rewards.consistency.steps_consistent"),
    "steps_true": _function("trl_ext.rewards.consistency.steps_true"),
    "judge_consistent": _factory("trl_ext.rewards.consistency.make_judge_consistent"),
    "eva": _factory("trl_ext.rewards.eva.make_eva"),  # eva_accuracy and eva_format
    "json_valid": _function("trl_ext.sandbox.rewards.json_valid"),
    "answer_correct": _function("trl_ext.sandbox.rewards.answer_correct"),
    # TRL's own, under the names of its script
    "accuracy_reward": _function("trl.rewards.accuracy_reward"),
    "reasoning_accuracy_reward": _function("trl.rewards.reasoning_accuracy_reward"),
    "think_format_reward": _function("trl.rewards.think_format_reward"),
    "get_soft_overlong_punishment": _soft_overlong,
    "get_cosine_scaled_reward": _factory("trl.rewards.get_cosine_scaled_reward"),
    "get_repetition_penalty_reward": _factory("trl.rewards.get_repetition_penalty_reward"),
}


def make_rewards(name: str, settings: Mapping[str, Any] | None = None) -> list[Reward]:
    """The checked reward functions behind `name`: one or, for a set such as `rl_struct`, several of `REWARDS`, or
    `module.function`.

    Settings go to the factory of a table entry; for `module.function` they are keyword arguments of each call.
    ValueError says what is wrong with the name or the settings.
    """
    settings = dict(settings or {})
    if name in REWARDS:
        _bind(REWARDS[name], settings)
        made = REWARDS[name](**settings)
        return [checked(reward) for reward in (made if isinstance(made, tuple) else (made,))]
    if "." not in name:
        raise ValueError(
            f"unknown reward '{name}'{did_you_mean(name, REWARDS)}; known: {', '.join(REWARDS)}, or module.function"
        )
    reward = imported(name)
    if not settings:
        return [checked(reward)]
    partial: Any = functools.partial(reward, **settings)
    columns = columns_of(partial)  # what the settings do not give; `wraps` shows the whole signature again
    named: Any = functools.wraps(reward)(partial)
    named.needs_columns = columns
    return [checked(named)]


def make_reward(name: str, settings: Mapping[str, Any] | None = None) -> Reward:
    """`make_rewards` where one function is wanted; ValueError for a set of several."""
    made = make_rewards(name, settings)
    if len(made) != 1:
        raise ValueError(f"'{name}' is a set of rewards: name one of {', '.join(r.__name__ for r in made)}")
    return made[0]


def _bind(factory: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    """Raises ValueError when the factory does not take these settings."""
    try:
        signature = inspect.signature(factory)
        signature.bind(**settings)
    except TypeError as error:
        known = [n for n, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD]
        raise ValueError(f"{error} (settings: {', '.join(known) or 'none'})") from None


def imported(path: str) -> Any:
    """The object at `module.name`; the current folder counts as a place to import from, as in TRL's script."""
    module, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import '{path}': {error}") from error
    if not callable(found):
        raise ValueError(f"'{path}' is not a function")
    return found
