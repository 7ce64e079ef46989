"""The reward `reward_ensemble`: several scorers, one conservative reward (WCO and UWO, arXiv 2310.02743).

One callable in TRL's signature that holds its members, so that TRL adds up one column. Rule-based verifiers do not belong
into it: name them beside it under `rewards`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trl_ext.rewards.checked import Reward, checked
from trl_ext.rewards.ensemble import OBJECTIVES, Moments, combine, group_z, summary
from trl_ext.rewards.registry import columns_of, make_reward

NORMALIZE = ("none", "group_z", "running_z")
SMALLEST_GROUP = 8
"""Completions per prompt from which group_z may go with a minimum. Ours; the card says "never for tiny groups"."""
Scorer = Callable[..., Tensor]


def make_reward_ensemble(
    rewards: Sequence[str | Reward] = (),
    models: Sequence[str] = (),
    adapters: Sequence[str] = (),
    backbone: str | None = None,
    objective: str = "uwo",
    variance_weight: float | None = None,
    ddof: int | None = None,
    soft_alpha: float | None = None,
    normalize: str = "none",
    batch_size: int | None = None,
    max_length: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Reward:
    """The reward function `reward_ensemble` over all members: at least two.

    Members. `rewards`: names of reward functions, or functions. `models`: saved sequence-classification models.
    `adapters`: LoRA adapters of such models, on one `backbone` that is in memory once (None: the one that they name).
    `objective`: uwo (default) with `variance_weight` lambda (0.5) and `ddof` (0); wco; mean; soft_min with `soft_alpha`
    (0.3): see `ensemble.combine`. `normalize` each member's scores first: "none" as in the paper; "running_z" with the
    mean and deviation of all its scores so far (of all processes; they start anew when a run is resumed); "group_z" in
    each prompt's completions (of this process), refused with a minimum in groups below 8, where it makes members agree.
    `batch_size` (16), `max_length` (4096 tokens), `dtype` ("auto"), `device` (the accelerator) are for models.

    A member that abstains (None) is left out of that completion; None if all do. Logs `reward_ensemble/...`, see
    `ensemble.summary`. ValueError for settings that do not belong together.
    """
    scorers = _scorers(rewards, models, adapters, backbone, (batch_size, max_length, dtype, device))
    settings = _settings(objective, variance_weight, ddof, soft_alpha)
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize: {normalize!r} is not one of {', '.join(NORMALIZE)}")
    moments = Moments.empty(len(rewards) + len(models) + len(adapters))

    def reward_ensemble(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        nonlocal moments
        scores = torch.cat([scorer(prompts, completions, **kwargs) for scorer in scorers])
        if normalize == "running_z":
            moments = moments.updated(_of_all_processes(scores))
            scores = moments.z(scores)
        elif normalize == "group_z":
            scores = group_z(scores, _groups(prompts, objective))
        combined = combine(scores, objective, **settings)
        for name, value in summary(scores, combined).items() if log_metric else ():
            log_metric(f"reward_ensemble/{name}", value)  # type: ignore[misc]
        return [None if value != value else value for value in combined.tolist()]

    columns = [names for scorer in scorers for names in getattr(scorer, "needs_columns", [])]
    reward_ensemble.needs_columns = columns  # type: ignore[attr-defined]
    return reward_ensemble


def _settings(
    objective: str, variance_weight: float | None, ddof: int | None, soft_alpha: float | None
) -> dict[str, Any]:
    """The settings of `combine` that were given; ValueError for one that the objective does not have."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: {objective!r} is not one of {', '.join(OBJECTIVES)}")
    everything = {"variance_weight": variance_weight, "ddof": ddof, "soft_alpha": soft_alpha}
    given = {name: value for name, value in everything.items() if value is not None}
    own = {"uwo": ("variance_weight", "ddof"), "soft_min": ("soft_alpha",)}.get(objective, ())
    if foreign := [name for name in given if name not in own]:
        raise ValueError(f"{', '.join(foreign)}: objective {objective} does not have it; remove it")
    right = {"variance_weight": lambda v: v >= 0, "ddof": lambda v: v in (0, 1), "soft_alpha": lambda v: v > 0}
    if wrong := [f"{name} {value}" for name, value in given.items() if not right[name](value)]:
        raise ValueError(f"{', '.join(wrong)}: expected variance_weight >= 0, ddof 0 or 1, soft_alpha > 0")
    return given


def _scorers(
    rewards: Sequence[str | Reward],
    models: Sequence[str],
    adapters: Sequence[str],
    backbone: str | None,
    options: tuple[Any, ...],
) -> list[Scorer]:
    """Scorers (prompts, completions, **columns) -> (members, B), in the order rewards, models, adapters."""
    for name, members in (("rewards", rewards), ("models", models), ("adapters", adapters)):
        if isinstance(members, str):
            raise ValueError(f"{name}: expected a list, got {members!r}")
    if len(rewards) + len(models) + len(adapters) < 2:
        raise ValueError("an ensemble has at least two members: list them under `rewards`, `models` or `adapters`")
    if backbone is not None and not adapters:
        raise ValueError("backbone: belongs to `adapters`, and there are none; a whole model goes under `models`")
    given = dict(zip(("batch_size", "max_length", "dtype", "device"), options, strict=True))
    given = {name: value for name, value in given.items() if value is not None}
    if given and not (models or adapters):
        raise ValueError(f"{', '.join(given)}: for `models` and `adapters`, and there are none; remove it")
    found = [_of_function(reward) for reward in rewards]
    if models or adapters:
        from trl_ext.rewards.reward_models import AdapterScorer, ModelScorer, Scoring

        scoring = Scoring(**given)
        found += [_of_model(ModelScorer(path, scoring)) for path in models]
        found += [_of_model(AdapterScorer(tuple(adapters), backbone, scoring))] if adapters else []
    return found


def _of_function(reward: str | Reward) -> Scorer:
    function = make_reward(reward) if isinstance(reward, str) else checked(reward)
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"rewards: {function.__name__} is asynchronous, which an ensemble cannot wait for")

    def score(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> Tensor:
        values = function(prompts=prompts, completions=completions, **kwargs)
        return torch.tensor([[float("nan") if value is None else value for value in values]])

    score.needs_columns = columns_of(function)  # type: ignore[attr-defined]
    return score


def _of_model(scorer: Callable[[Sequence[Any], Sequence[Any]], Tensor]) -> Scorer:
    def score(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> Tensor:
        return scorer(prompts, completions)

    return score


def _of_all_processes(scores: Tensor) -> Tensor:
    """(k, B) of this process -> (k, all B) of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return scores
    from accelerate.utils import gather_object

    return torch.cat(gather_object([scores]), 1)


def _groups(prompts: Sequence[Any], objective: str) -> Tensor:
    """(B,) number of the run of equal prompts that each completion is in; ValueError for small runs and a minimum."""
    numbers = [0]
    for before, after in itertools.pairwise(prompts):
        numbers.append(numbers[-1] + (after != before))
    found = torch.tensor(numbers)
    smallest = int(found.bincount().min())
    if objective in ("wco", "soft_min") and smallest < SMALLEST_GROUP:
        raise ValueError(
            f"normalize: group_z with objective {objective} needs groups of at least {SMALLEST_GROUP} completions, here is "
            f"one of {smallest}, where it makes members agree; use running_z, or objective uwo"
        )
    return found
