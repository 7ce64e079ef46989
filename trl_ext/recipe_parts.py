"""From a recipe's mapping to TRL's configuration objects, reward functions and plan, with every problem collected."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import DatasetMixtureConfig, ModelConfig
from trl.scripts.grpo import GRPOScriptArguments
from trl.scripts.utils import DatasetConfig

from trl_ext.checks import groups_too_small, needs_groups
from trl_ext.loops import LOOPS, Loop, make_loop
from trl_ext.method import Setup
from trl_ext.plan import Plan, PlanError, did_you_mean, make_plan, normalise
from trl_ext.rewards import make_rewards
from trl_ext.rewards.checked import Reward
from trl_ext.schedule import group_misfit
from trl_ext.settings import cast_field, default_of, fields_of, hints_of, read_yaml
from trl_ext.tools import load_tools

TRAINERS = ("grpo", "dpo", "kto", "sft")
LEARNS_FROM = {"dpo": "chosen and rejected replies", "kto": "labelled replies", "sft": "demonstrations"}
"""What a trainer without rewards finds in the data."""
_READ_LATER = ("methods", "rewards", "datasets", "loop")
"""Keys with a reader of their own."""


@dataclass
class Extra:
    """The keys that are ours, beside TRL's."""

    trainer: str = field(default="grpo", metadata={"choices": TRAINERS})
    """Which trainer runs the recipe."""
    rewards: dict[str, Any] | list[str] | str | None = None
    """Names of rewards, or names with their settings; see `trl_ext.rewards.registry`."""
    tools: list[str] | str | None = None
    """Functions that the model may call in TRL's tool loop; see `trl_ext.tools`."""
    loop: dict[str, Any] | str | None = None
    """Name of a loop around the trainer, or the name with its settings; see `trl_ext.loops`."""
    columns: dict[str, Any] | None = None
    """Our column name -> the data set's, e.g. {prompt: problem, answer: expected}."""
    prompt_template: str | None = None
    """Text with {column} fields that becomes the user's turn."""
    system_prompt: str | None = None
    """First turn of every prompt that has no system turn of its own."""
    max_prompt_tokens: int | None = None
    """Rows with longer prompts are left out and counted; TRL does not cut prompts."""
    max_train_rows: int | None = None
    """Only the first rows are used, counted after long prompts are left out."""
    eval_rows: int | None = None
    """Rows of the test split that are evaluated; on the sandbox also the problems before and after, 0 for none."""
    dataset_options: dict[str, Any] | None = None
    """Of the sandbox's data sets: n, difficulty, seed; of sandbox/labels also bad_difficulty, bad_share."""
    env: dict[str, Any] | None = None
    """Environment variables to set, as in TRL's YAML files."""
    hub_base_model: str | None = None
    """For `push_to_hub`: the base's name on the Hub where `model_name_or_path` is local."""
    hub_license: str | None = None
    """For `push_to_hub`: the Hub's identifier of the licence where the base does not tell."""


def config_classes(trainer: str) -> tuple[type, ...]:
    """Our keys, then the configurations that TRL's script of this trainer reads."""
    return (Extra, training_class(trainer), ModelConfig, GRPOScriptArguments, DatasetMixtureConfig)


def training_class(trainer: str) -> type:
    """The trainer's own configuration."""
    import trl_ext

    return getattr(trl_ext, f"{trainer.upper()}Config")


def build_parts(raw: Mapping[str, Any], problems: list[str]) -> dict[str, Any] | None:
    """The fields of a `Recipe` from its mapping; None when `problems` were found, which are appended."""
    trainer = raw.get("trainer", "grpo")
    if trainer not in TRAINERS:
        near = did_you_mean(str(trainer), TRAINERS)
        problems.append(f"trainer: {trainer!r} is not one of {', '.join(TRAINERS)}{near}")
        return None
    classes = config_classes(trainer)
    values = _cast_all(raw, classes, problems)
    rewards = _rewards(raw, trainer, problems)
    problems += _default_weights(values, rewards)
    not_here = _not_here(values)
    plan = _plan(raw.get("methods"), trainer, problems)
    given = _with_methods(values, trainer, plan) | ({"use_cpu": True} if not_here else {})
    extra, args, model_args, script_args, dataset_args = (_construct(cls, given, problems) for cls in classes)
    tools = _tools(values.get("tools"), trainer, problems)
    _check_plan(plan, raw.get("methods"), trainer, args, rewards, problems)
    problems += _together(values, trainer, rewards, problems)
    loop = _loop(values, trainer, args, reward_names(rewards), problems)
    if problems:
        return None
    return {
        "values": values,
        "training_args": args,
        "model_args": model_args,
        "script_args": script_args,
        "dataset_args": dataset_args,
        "extra": extra,
        "plan": plan,
        "rewards": tuple(rewards),
        "tools": tuple(tools),
        "loop": loop,
        "not_here": not_here,
    }


def _not_here(values: Mapping[str, Any]) -> str | None:
    """Why these settings cannot run on this machine; they can still be planned. TRL turns bf16 on by itself."""
    half = "fp16" if values.get("fp16") else "bf16" if values.get("bf16") is not False else None
    if half is None or values.get("use_cpu") or torch.accelerator.is_available():
        return None
    return (
        f"{half} is on{'' if values.get(half) else ' (TRL does that by default)'} and this machine has no accelerator: "
        f"set {half}: false, or use_cpu: true to compute in {half} on the CPU"
    )


def _cast_all(raw: Mapping[str, Any], classes: Sequence[type], problems: list[str]) -> dict[str, Any]:
    """Values by key, cast to the types of their fields; unknown keys and values that do not fit become problems."""
    values: dict[str, Any] = {}
    owners = {key: cls for cls in reversed(classes) for key in fields_of(cls)}
    for key, value in raw.items():
        if key in _READ_LATER:
            values[key] = value
        elif key not in owners:
            problems.append(f"unknown key '{key}'{did_you_mean(key, owners)}")
        else:
            choices = fields_of(owners[key])[key].metadata.get("choices")
            try:
                values[key] = cast_field(value, hints_of(owners[key])[key], list(choices) if choices else None)
            except ValueError as error:
                problems.append(f"{key}: {error}")
    return values


def _construct(cls: type, values: Mapping[str, Any], problems: list[str]) -> Any:
    """The configuration object, or None with its problems noted."""
    own = {key: copy.deepcopy(values[key]) for key in fields_of(cls) if key in values}
    found = _mixture(own.get("datasets")) if cls is DatasetMixtureConfig else []
    if "num_generations" in fields_of(cls):
        full = {key: own.get(key, default_of(f)) for key, f in fields_of(cls).items()}
        misfit = group_misfit(full, int(os.environ.get("WORLD_SIZE", "1")))
        found = [misfit] if misfit else []
    problems += found
    if found:
        return None
    try:
        return cls(**own)
    except (ValueError, TypeError, ImportError) as error:
        problems += getattr(error, "problems", [str(error)])
        return None


def _mixture(spec: Any) -> list[str]:
    """Problems of `datasets`."""
    if spec is None:
        return []
    if not isinstance(spec, list) or not all(isinstance(item, Mapping) for item in spec):
        return ["datasets: expected a list of mappings, each with at least `path`"]
    known, problems = fields_of(DatasetConfig), []
    for i, item in enumerate(spec):
        problems += [f"datasets[{i}]: unknown key '{k}'{did_you_mean(str(k), known)}" for k in item if k not in known]
        problems += [] if "path" in item else [f"datasets[{i}]: `path` is missing"]
    return problems


def named(spec: Any) -> dict[str, Any]:
    """`rewards` as name -> settings; ValueError for anything that is not a name, names or a mapping."""
    if isinstance(spec, str):
        spec = read_yaml(spec) if spec.strip().startswith(("{", "[")) else [spec]
    if isinstance(spec, (list, tuple)) and all(isinstance(name, str) for name in spec):
        return dict.fromkeys(spec)
    if spec is None or (isinstance(spec, Mapping) and all(v is None or isinstance(v, Mapping) for v in spec.values())):
        return {str(name): settings for name, settings in (spec or {}).items()}
    raise ValueError(f"expected a name, a list of names or a mapping of name to settings, got {spec!r}")


def reward_names(rewards: Iterable[Reward | str]) -> list[str]:
    """Names as TRL gives them: a function's, or the last part of a model's path."""
    return [r.split("/")[-1] if isinstance(r, str) else r.__name__ for r in rewards]


def _rewards(raw: Mapping[str, Any], trainer: str, problems: list[str]) -> list[Reward | str]:
    """TRL's `reward_model_name_or_path` and `reward_funcs`, then ours, in that order."""
    found: list[Reward | str] = [str(raw["reward_model_name_or_path"])] if raw.get("reward_model_name_or_path") else []
    before = len(problems)
    for key in ("reward_funcs", "rewards"):
        try:
            wanted = named(raw.get(key))
        except ValueError as error:
            problems.append(f"{key}: {error}")
            continue
        for name, settings in wanted.items():
            try:
                found += make_rewards(name, settings)
            except ValueError as error:
                problems.append(f"{key}: {name}: {error}")
    names = reward_names(found)
    problems += [f"rewards: two rewards are called '{n}'" for n in sorted(set(names)) if names.count(n) > 1]
    if trainer != "grpo" and found and not raw.get("loop"):
        problems.append(f"rewards: the {trainer} trainer learns from {LEARNS_FROM[trainer]}; remove the rewards")
    if trainer == "grpo" and not found and len(problems) == before:
        problems.append("rewards: name at least one reward (`rewards`, or TRL's `reward_funcs`)")
    return found


def _default_weights(values: dict[str, Any], rewards: Sequence[Reward | str]) -> list[str]:
    """Fills `reward_weights`, if it is not set, where a set of rewards such as `rl_struct` brings its own weights."""
    weights = [getattr(reward, "default_weight", None) for reward in rewards]
    if values.get("reward_weights") is not None or all(weight is None for weight in weights):
        return []
    values["reward_weights"] = [1.0 if weight is None else float(weight) for weight in weights]
    if values.get("multi_objective_aggregation") != "normalize_then_sum":
        return []
    names = ", ".join(reward_names(rewards))
    return [
        "reward_weights: the weights that the rewards bring are meant for multi_objective_aggregation: "
        "sum_then_normalize. normalize_then_sum gives every reward the same spread first, so that a factor inside one "
        f"(the 0.1 of rl_struct_length) no longer counts: set reward_weights yourself ({names})"
    ]


def _tools(spec: Any, trainer: str, problems: list[str]) -> list[Any]:
    try:
        tools = load_tools(spec)
    except ValueError as error:
        problems.append(f"tools: {error}")
        return []
    if tools and trainer != "grpo":
        problems.append(f"tools: only the grpo trainer calls tools; this is {trainer}")
    return tools


def _plan(spec: Any, trainer: str, problems: list[str]) -> Plan | None:
    """The methods by themselves; what depends on the rest of the recipe is checked by `_check_plan`."""
    try:
        return make_plan(spec, trainer)
    except PlanError as error:
        problems += _as_methods(error)
        return None


def _with_methods(values: Mapping[str, Any], trainer: str, plan: Plan | None) -> dict[str, Any]:
    """What the training configuration gets of `values`: GRPO's methods are checked later, with the rewards.

    DPO's and KTO's `loss_type` may name a method, so these check the two together. Without a plan neither is checked.
    """
    left_out: tuple[str, ...] = ("methods",) if trainer in ("grpo", "sft") else ()
    if plan is None and trainer in ("dpo", "kto"):
        left_out = ("methods", "loss_type", "loss_weights")
    return {key: value for key, value in values.items() if key not in left_out}


def _check_plan(
    plan: Plan | None, spec: Any, trainer: str, args: Any, rewards: Sequence[Reward | str], problems: list[str]
) -> None:
    """The methods against the whole recipe. DPO's and KTO's configurations did so, which is why `args` is not None."""
    if plan is None or args is None:
        return
    if trainer == "grpo":
        try:
            names = reward_names(rewards)
            setup = Setup(args, names, group_rewards=needs_groups(zip(names, rewards, strict=True)))
            problems += [f"rewards: {problem}" for problem in groups_too_small(setup)]
            plan.check(setup)
        except PlanError as error:
            problems += _as_methods(error)
    args.methods = normalise(spec)


def _as_methods(error: PlanError) -> list[str]:
    return [f"methods: {problem.removeprefix('methods: ')}" for problem in error.problems]


def _loop(
    values: Mapping[str, Any], trainer: str, args: Any, rewards: Sequence[str], problems: list[str]
) -> Loop | None:
    try:
        loop = make_loop(values.get("loop"))
    except ValueError as error:
        problems += [f"loop: {problem.removeprefix('methods: ')}" for problem in getattr(error, "problems", [error])]
        return None
    if loop is not None and trainer not in loop.trainers:
        fits = ", ".join(name for name, other in LOOPS.items() if trainer in other.trainers)
        drives = " or ".join(loop.trainers)
        problems.append(
            f"loop: {loop.name} drives the {drives} trainer; this is {trainer} ({fits or 'no loop'} fits it)"
        )
    elif loop is not None and args is not None:
        found = loop.check(args, rewards, bool(values.get("use_peft")), bool(values.get("tools")))
        if loop.in_rounds and (values.get("load_in_4bit") or values.get("load_in_8bit")):
            found.append("load_in_4bit, load_in_8bit: adapters are merged between rounds; set them to false")
        if loop.makes_data and (values.get("dataset_streaming") or values.get("streaming")):
            found.append(
                "dataset_streaming: the loop makes data of all rows, and a stream need not end; set it to false"
            )
        problems += [f"loop: {loop.name}: {problem}" for problem in found]
    return loop


def _together(
    values: Mapping[str, Any], trainer: str, rewards: Sequence[Reward | str], problems: Sequence[str]
) -> list[str]:
    """Problems that no single key can show. `problems` found before tell which keys were already reported."""
    get = values.get
    sandbox = str(get("dataset_name") or "").startswith("sandbox/")
    weights = get("reward_weights")
    evaluates = str(get("eval_strategy") or "no") != "no"
    rules = {
        "model_name_or_path: name a model (`sandbox` for the built-in one)": not get("model_name_or_path"),
        "dataset_name: name a data set (`sandbox/math`, a file, a folder, a Hub name), or use `datasets`": not (
            get("dataset_name") or get("datasets")
        ),
        "dataset_name and datasets are both set; TRL would ignore the first: keep one": get("dataset_name")
        and get("datasets"),
        "dataset_options: belongs to the sandbox's data sets; remove it": get("dataset_options") and not sandbox,
        "max_steps: a stream has no length; say how many steps to make": (get("dataset_streaming") or get("streaming"))
        and (get("max_steps") or -1) <= 0,
        "eval_rows: nothing is evaluated; set eval_strategy, or remove it": get("eval_rows")
        and not sandbox
        and not evaluates,
        "load_in_4bit and load_in_8bit freeze the base model; set use_peft: true to train an adapter": (
            get("load_in_4bit") or get("load_in_8bit")
        )
        and not get("use_peft"),
        f"reward_weights: {len(weights or [])} weights for {len(rewards)} rewards ({', '.join(reward_names(rewards))})": weights
        and trainer == "grpo"
        and not any(p.startswith("reward") for p in problems)
        and len(weights) != len(rewards),
    }
    found = [message for message, wrong in rules.items() if wrong]
    lowest = {"max_prompt_tokens": 1, "max_train_rows": 1, "eval_rows": 0}
    for key, least in lowest.items():
        if get(key) is not None and get(key) < least:  # type: ignore[operator]
            found.append(f"{key}: {get(key)} must be at least {least}")
    if get("eval_rows") == 1 and sandbox:
        found.append("eval_rows: an interval takes at least 2 problems; 0 evaluates none")
    return found
