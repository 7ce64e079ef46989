"""What methods ask of a run before it starts, so that nothing a user sets is silently ignored.

Each function returns messages that name the setting or flag to change; an empty list is no problem.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from trl_ext.method import Setup, overrides
from trl_ext.plan import did_you_mean

POLICY_TERM: Mapping[str, Any] = {
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "importance_sampling_level": "token",
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
}
"""Flags of TRL's policy term that have no effect on another one -> the defaults at which they must stay."""
SAME_MEAN = {"cispo": "dapo", "vespo": "dapo", "sapo": "grpo"}
"""Loss types that are a policy term of their own -> the one with the same denominators."""
ADVANTAGES: Mapping[str, tuple[Any, ...]] = {
    "scale_rewards": ("none", False),
    "multi_objective_aggregation": ("sum_then_normalize",),
}
"""What shapes TRL's advantages -> the values with which that does nothing to the summed rewards."""


def unread(settings: Any, parts: Mapping[str, tuple[bool, Sequence[str]]]) -> list[str]:
    """Settings of a method or a loop that differ from their defaults although their part is off. `parts`: how to switch a part on -> whether
    it is, and the settings that it alone reads."""
    changed = {f.name for f in fields(settings) if f.init and getattr(settings, f.name) != _default(f)}
    return [
        f"{name} has no effect without {part}; leave it out, or switch that on"
        for part, (on, names) in parts.items()
        for name in names
        if not on and name in changed
    ]


def _default(field: Any) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def unused_flags(args: Any) -> list[str]:
    """Flags of TRL's policy term that are not at their defaults, where a method replaces that term: they shape nothing.

    vLLM's importance correction is among them.
    """
    problems = [
        f"{name}: {getattr(args, name)} shapes TRL's policy term, which is replaced; leave it at {default}"
        for name, default in POLICY_TERM.items()
        if getattr(args, name, default) != default
    ]
    loss_type = getattr(args, "loss_type", None)
    if loss_type in SAME_MEAN:
        problems.append(
            f"loss_type {loss_type} is a policy term of its own, which is replaced; set loss_type: "
            f"{SAME_MEAN[loss_type]}, which has the same denominators"
        )
    if getattr(args, "use_vllm", False) and getattr(args, "vllm_importance_sampling_correction", False):
        problems.append(
            "TRL's vLLM correction does not reach a replaced policy term; set vllm_importance_sampling_correction: "
            "false (the old log-probs are then still the training model's)"
        )
    return problems


def replaced_advantages(args: Any) -> list[str]:
    """Settings of TRL's advantages that have no effect, because a method makes its own from the summed rewards."""
    found = {key: getattr(args, key, values[0]) for key, values in ADVANTAGES.items()}
    return [
        f"{key} {found[key]} has no effect, since the advantages are replaced; set {key}: {values[0]}"
        for key, values in ADVANTAGES.items()
        if found[key] not in values
    ]


def reward_named(setup: Setup, wanted: str | None, setting: str, what: str | None = None) -> list[str]:
    """What is wrong with a `setting` that names one of the run's rewards.

    `what` the reward does, if there must be one: then several rewards need the name. Nothing is known, and nothing
    wrong, before the rewards are.
    """
    names = setup.reward_names
    if names is None:
        return []
    if wanted is not None and wanted not in names:
        return [f"{setting} '{wanted}' is not a reward of this run ({', '.join(names)}){did_you_mean(wanted, names)}"]
    if what is not None and wanted is None and len(names) > 1:
        return [f"several rewards ({', '.join(names)}); name the one that {what}: {setting}"]
    return []


def others_that(setup: Setup, name: str, *hooks: str) -> list[str]:
    """Other methods of the plan that change any of `hooks` with their settings, in the order of the recipe."""
    return [m.name for m in setup.built if m.name != name and any(overrides(m, hook) for hook in hooks)]


def needs_groups(rewards: Iterable[tuple[str, Any]]) -> dict[str, int]:
    """(name, reward function) -> those that compare a prompt's completions, and the number of these that they need."""
    return {
        name: reward.needs_group for name, reward in rewards if isinstance(getattr(reward, "needs_group", None), int)
    }


def groups_too_small(setup: Setup) -> list[str]:
    """Rewards that compare more completions of a prompt than training or evaluation makes."""
    args = setup.args
    sizes = {"num_generations": args.num_generations}
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
        sizes["num_generations_eval"] = args.num_generations_eval or args.num_generations
    return [
        f"{name}: compares at least {least} completions of a prompt, and {flag} is {size}; raise it, or set the reward's "
        "normalize to running_z or none"
        for name, least in setup.group_rewards.items()
        for flag, size in sizes.items()
        if size < least
    ]


def parts_of_groups(setup: Setup, why: str) -> list[str]:
    """Problems of a method that has other than whole groups scored, because of `why`."""
    return [
        f"reward {name} compares a prompt's completions and must see all of them at once, but {why}; set the reward's "
        "normalize to running_z or none, or leave the method out"
        for name in setup.group_rewards
    ]
