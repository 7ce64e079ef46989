"""The reward `reward_ensemble`: several scorers, one conservative reward (WCO and UWO, arXiv 2310.02743).

One callable in TRL's signature that holds its members, so that TRL adds up one column. Rule-based verifiers do not belong
into it: name them beside it under `rewards`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_ext.rewards.checked import Reward, checked
from trl_ext.rewards.ensemble import OBJECTIVES, Moments, combine, summary
from trl_ext.rewards.processes import of_all_processes, whole_group_z
from trl_ext.rewards.registry import columns_of, make_reward
from trl_ext.rewards.stateful import load_states, stateful, states_of
from trl_ext.together import on_all

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
    mean and deviation of all its scores so far (of all processes), before the first ones as they are; "group_z" in each
    prompt's completions (of all processes), at least 2, and 8 with a minimum: below, it makes members agree. It needs
    whole groups in one call, which `needs_group` tells `trl_ext.GRPOTrainer`; neighbouring groups of one prompt are told
    apart by the length of the others. `batch_size` (16), `max_length` (4096 tokens), `dtype` ("auto"), `device` (the
    accelerator) are for models.

    A member that abstains (None) is left out of that completion; None if all do. Logs `reward_ensemble/...`, see
    `ensemble.summary`. ValueError for settings that do not belong together.

    State: what running_z has seen, and that of members with one, as a `stateful.StatefulReward`: `trl_ext.GRPOTrainer`
    keeps it in checkpoints and out of evaluations. In stock TRL it begins anew when a run is resumed, and evaluations
    move it.
    """
    functions = _functions(rewards)
    scorers = _scorers(functions, models, adapters, backbone, (batch_size, max_length, dtype, device))
    settings = _settings(objective, variance_weight, ddof, soft_alpha)
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize: {normalize!r} is not one of {', '.join(NORMALIZE)}")
    memory = _Memory(functions, Moments.empty(len(rewards) + len(models) + len(adapters)))
    smallest = SMALLEST_GROUP if objective in ("wco", "soft_min") else 2

    def reward_ensemble(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        def score() -> Tensor:
            return torch.cat([scorer(prompts, completions, **kwargs) for scorer in scorers])

        scores = score() if normalize == "none" else on_all(score)
        if normalize == "running_z":
            scores = memory.z(scores)
        elif normalize == "group_z":
            scores = whole_group_z(scores, prompts, smallest, one_size="trainer_state" in kwargs)
        combined = combine(scores, objective, **settings)
        for name, value in summary(scores, combined).items() if log_metric else ():
            log_metric(f"reward_ensemble/{name}", value)  # type: ignore[misc]
        return [None if value != value else value for value in combined.tolist()]

    columns = [names for scorer in scorers for names in getattr(scorer, "needs_columns", [])]
    given: dict[str, Any] = {"needs_columns": columns}
    needed = [getattr(function, "needs_group", 0) for function in functions]
    if at_least := max([smallest if normalize == "group_z" else 0, *needed]):
        given["needs_group"] = at_least
    if normalize == "running_z" or stateful(functions):
        given |= {name: getattr(memory, name) for name in ("state_dict", "load_state_dict", "train")}
    vars(reward_ensemble).update(given)
    return reward_ensemble


@dataclass
class _Memory:
    """What an ensemble keeps from one call to the next; see `stateful.StatefulReward`."""

    functions: Sequence[Reward]
    moments: Moments
    learning: bool = True

    def z(self, scores: Tensor) -> Tensor:
        """(k, B) of this process, standardised with all scores so far, of all processes and these."""
        if self.learning:
            self.moments = self.moments.updated(of_all_processes(scores))
        return self.moments.z(scores)

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self.moments.saved(), "members": states_of(self.functions)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        members = len(state["moments"]["count"])
        if members != len(self.moments.count):
            raise ValueError(f"it had {members} members, now {len(self.moments.count)}")
        load_states(self.functions, state["members"])
        self.moments = Moments(**state["moments"])

    def train(self, mode: bool = True) -> None:
        self.learning = mode
        for _, function in stateful(self.functions):
            function.train(mode)


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


def _functions(rewards: Sequence[str | Reward]) -> list[Reward]:
    """The members under `rewards`, checked."""
    if isinstance(rewards, str):
        raise ValueError(f"rewards: expected a list, got {rewards!r}")
    found = [make_reward(reward) if isinstance(reward, str) else checked(reward) for reward in rewards]
    for function in found:
        if inspect.iscoroutinefunction(function):
            raise ValueError(f"rewards: {function.__name__} is asynchronous, which an ensemble cannot wait for")
    return found


def _scorers(
    rewards: Sequence[Reward],
    models: Sequence[str],
    adapters: Sequence[str],
    backbone: str | None,
    options: tuple[Any, ...],
) -> list[Scorer]:
    """Scorers (prompts, completions, **columns) -> (members, B), in the order rewards, models, adapters."""
    for name, members in (("models", models), ("adapters", adapters)):
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


def _of_function(function: Reward) -> Scorer:
    def score(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> Tensor:
        values = function(prompts=prompts, completions=completions, **kwargs)
        return torch.tensor([[float("nan") if value is None else value for value in values]])

    score.needs_columns = columns_of(function)  # type: ignore[attr-defined]
    return score


def _of_model(scorer: Callable[[Sequence[Any], Sequence[Any]], Tensor]) -> Scorer:
    def score(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> Tensor:
        return scorer(prompts, completions)

    return score
