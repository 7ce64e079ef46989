"""From names and settings to a checked, ordered plan.

`make_plan` turns what stands under `methods:` into method instances, casts every value to the type of its field (YAML
reads `1e-6` as text), and reports every problem at once: unknown names with a suggestion, values out of range, two
owners of one slot, conflicts, needs that the setup cannot meet. Order of application = order in the recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trl_ext.method import NEEDS, Method, Setup, overrides

STAGES = {
    "before training": ("start_labels",),
    "prompts": ("choose_prompts", "edit_prompts"),
    "second attempts": ("revise",),
    "rewards": ("shape_rewards",),
    "advantages": ("measure", "group_advantages"),
    "rollout data": ("sampled", "streams", "observe"),
    "row selection": ("keep_rows",),
    "teacher": ("sync_teacher",),
    "whole groups": ("coupled",),
    "token advantages": ("token_advantages",),
    "loss mask": ("loss_mask",),
    "token weights": ("token_weights",),
    "surrogate": ("surrogate",),
    "added loss": ("distill_weights", "aux_loss", "pair_aux_loss"),
    "reference": ("reference_logps",),
    "pair or label loss": ("pair_loss", "label_loss"),
    "after the loss": ("observe_loss", "observe_pairs", "observe_labels"),
    "KL coefficient": ("kl_coef",),
    "learning rate": ("observe_gradients", "learning_rate"),
}
"""Stage shown to people -> hooks, in the order in which a step passes them."""

_BOUNDS = {"ge": (">=", operator.ge), "gt": (">", operator.gt), "le": ("<=", operator.le), "lt": ("<", operator.lt)}
_LOSS_HOOKS = (
    *("coupled", "token_advantages", "loss_mask", "token_weights", "surrogate"),
    *("distill_weights", "aux_loss", "observe_loss", "kl_coef"),
)
_GROUP_HOOKS = ("shape_rewards", "measure", "group_advantages", "observe")


class PlanError(ValueError):
    """The methods as configured cannot run. `problems` lists every reason, each with what to change."""

    def __init__(self, problems: Iterable[str], heading: str = "The methods cannot run as configured") -> None:
        self.problems = list(problems)
        super().__init__(f"{heading}:\n" + "\n".join(f"  - {problem}" for problem in self.problems))


@dataclass(frozen=True)
class Plan:
    """Methods in order of application. An empty plan is plain TRL."""

    methods: tuple[Method, ...] = ()

    def using(self, *hooks: str) -> tuple[Method, ...]:
        """The methods that change any of `hooks`, in order."""
        return tuple(m for m in self.methods if any(overrides(m, hook) for hook in hooks))

    @property
    def in_loss(self) -> tuple[Method, ...]:
        """The methods that take part in the GRPO loss."""
        return self.using(*_LOSS_HOOKS)

    @property
    def on_groups(self) -> tuple[Method, ...]:
        """The methods that see whole groups after a rollout."""
        return self.using(*_GROUP_HOOKS)

    def needs(self) -> frozenset[str]:
        """Everything that the trainer must compute for these methods."""
        return frozenset().union(*(method.needs() for method in self.methods))

    def fold(self, hook: str, value: Any, data: Any) -> Any:
        """Passes `value` through `hook` of every method that changes it; each sees `data` under its own name."""
        for method in self.using(hook):
            value = getattr(method, hook)(value, data.for_method(method.name))
        return value

    def check(self, setup: Setup) -> None:
        """Raises PlanError with every problem of these methods in `setup`."""
        setup = dataclasses.replace(setup, methods=[m.name for m in self.methods], built=self.methods)
        problems = [f"{m.name}: {message}" for m in self.methods for message in m.check(setup)]
        heavy = self.needs() - {"entropy_at_rollout", "ref_logps"}
        if setup.engine in ("fsdp", "zero3") and heavy:
            users = ", ".join(m.name for m in self.methods if m.needs() & heavy)
            problems.append(
                f"{users}: {', '.join(sorted(heavy))} is not tested under {setup.engine}, where weights are sharded; "
                "use plain data parallel (accelerate, DDP) or ZeRO-2"
            )
        if setup.engine in ("zero", "zero3"):
            problems += [
                f"{m.name}: DeepSpeed makes its update inside the backward pass, out of reach of a learning rate for this "
                "step alone; use plain data parallel (accelerate, DDP)"
                for m in self.using("observe_gradients", "learning_rate")
            ]
        if problems:
            raise PlanError(problems)

    def describe(self) -> list[tuple[str, str]]:
        """(stage, "method, method") for every stage that a method changes, in the order of a step."""
        rows = [(stage, ", ".join(m.name for m in self.using(*hooks))) for stage, hooks in STAGES.items()]
        return [(stage, names) for stage, names in rows if names]


def normalise(spec: Any) -> dict[str, dict[str, Any]]:
    """What a user may write (nothing, a name, a list of names, a mapping, the same as JSON) -> {name: settings}.

    Raises PlanError for anything else.
    """
    if isinstance(spec, str) and spec.strip().startswith(("{", "[")):
        try:
            spec = json.loads(spec)
        except json.JSONDecodeError as error:
            raise PlanError([f"methods: not valid JSON ({error})"]) from None
    if spec is None:
        return {}
    if isinstance(spec, str):
        spec = [spec]
    if isinstance(spec, (list, tuple)) and all(isinstance(name, str) for name in spec):
        spec = dict.fromkeys(spec)
    if not isinstance(spec, Mapping) or not all(v is None or isinstance(v, Mapping) for v in spec.values()):
        raise PlanError([f"methods: expected a name, a list of names or a mapping of name to settings, got {spec!r}"])
    return {str(name): dict(settings or {}) for name, settings in spec.items()}


def make_plan(spec: Any, trainer: str = "grpo", setup: Setup | None = None) -> Plan:
    """Builds and checks the plan for `methods: spec`. With `setup` the methods' own checks run as well.

    Raises PlanError that lists every problem found.
    """
    from trl_ext.methods import METHODS

    problems: list[str] = []
    methods: list[Method] = []
    for name, settings in normalise(spec).items():
        cls = METHODS.get(name)
        if cls is None:
            problems.append(f"unknown method '{name}'{did_you_mean(name, METHODS)}; `trl-ext methods` lists them all")
        elif trainer not in (cls.trainer, *cls.also_in):
            own = " or ".join((cls.trainer, *cls.also_in))
            problems.append(f"{name}: runs in the {own} trainer, this is {trainer} (recipe key `trainer`)")
        else:
            found = cast_settings(cls, settings)
            problems += [f"{name}: {message}" for message in found.problems]
            if not found.problems:
                methods.append(cls(**found.values))
    problems += _clashes(methods)
    if problems:
        raise PlanError(problems)
    plan = Plan(tuple(methods))
    if setup is not None:
        plan.check(setup)
    return plan


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """', did you mean X?' for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean '{near[0]}'?" if near else ""


def _clashes(methods: list[Method]) -> list[str]:
    problems = []
    for i, first in enumerate(methods):
        if unknown := first.needs() - NEEDS:
            problems.append(f"{first.name}: no trainer provides {sorted(unknown)}")
        for second in methods[i + 1 :]:
            for slot in set(first.owns) & set(second.owns):
                problems.append(f"{first.name} and {second.name} both replace the {slot}: name only one of them")
            reason = first.conflicts.get(second.name) or second.conflicts.get(first.name)
            if reason:
                problems.append(f"{first.name} and {second.name} do not go together: {reason}")
    for i, anew in enumerate(methods):
        if "baseline" in anew.owns and overrides(anew, "group_advantages"):
            problems += [
                f"{anew.name} makes the advantages anew from the rewards, so what {before.name} makes of them would be "
                f"lost; name {anew.name} before {before.name}"
                for before in methods[:i]
                if overrides(before, "group_advantages")
            ]
    for first in (m for m in methods if overrides(m, "coupled")):
        for second in (m for m in methods if overrides(m, "keep_rows")):
            problems.append(
                f"{first.name} and {second.name} do not go together: {first.name}'s loss needs whole groups, "
                f"{second.name} drops rows of them; name only one of them"
            )
    return problems


@dataclass
class Cast:
    """Settings by name as the types of their fields, and what is wrong with the others."""

    values: dict[str, Any]
    problems: list[str]


def settings_of(cls: type[Method]) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a method that a user may set."""
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def cast_settings(cls: type[Method], settings: Mapping[str, Any]) -> Cast:
    """A user's settings as the types of the class's fields, and what is wrong with them."""
    fields, hints, cast = settings_of(cls), typing.get_type_hints(cls), Cast({}, [])
    for key, value in settings.items():
        if key not in fields:
            cast.problems.append(f"unknown setting '{key}'{did_you_mean(key, fields)} (it has: {', '.join(fields)})")
            continue
        try:
            cast.values[key] = cast_value(value, hints[key])
        except ValueError as error:
            cast.problems.append(f"{key}: {error}")
            continue
        if message := _out_of_range(cast.values[key], fields[key].metadata):
            cast.problems.append(f"{key}: {message}")
    return cast


def cast_value(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; ValueError says what was expected. Text is read as numbers and booleans are read."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None or (value in ("none", "null", "None") and type(None) in options):
        if type(None) in options:
            return None
        raise ValueError(f"expected {_name(hint)}, got nothing")
    for option in options:
        if option is not type(None) and (found := _as(value, typing.get_origin(option) or option)) is not None:
            return found
    raise ValueError(f"expected {_name(hint)}, got {value!r}")


def _as(value: Any, kind: Any) -> Any:
    """`value` as `kind`, or None when it is not one."""
    if kind is bool:
        return {"true": True, "false": False}.get(str(value).lower())
    if kind in (int, float) and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            number = float(value)
        except ValueError:
            return None
        if kind is float:
            return number
        return int(number) if math.isfinite(number) and number == int(number) else None
    if kind is str and not isinstance(value, (dict, list)):
        return str(value)
    if kind in (dict, list) and isinstance(value, kind):
        return value
    return None


def _name(hint: Any) -> str:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join("none" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)


def _out_of_range(value: Any, rules: Mapping[str, Any]) -> str | None:
    if rules.get("choices") and value not in rules["choices"]:
        near = did_you_mean(str(value), map(str, rules["choices"]))
        return f"{value!r} is not one of {', '.join(map(str, rules['choices']))}{near}"
    if value is None or isinstance(value, (bool, str, dict, list)):
        return None
    if math.isnan(value):
        return "is not a number"
    for rule, (sign, holds) in _BOUNDS.items():
        if rules.get(rule) is not None and not holds(value, rules[rule]):
            return f"{value} must be {sign} {rules[rule]}"
    return None
