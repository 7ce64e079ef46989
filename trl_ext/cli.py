"""`trl-ext`: train a recipe, show its plan, list the methods; evaluate, compare, grade and report (`evals.cli`)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evals import cli as evals_cli

if TYPE_CHECKING:  # torch is imported by a command that needs it, so that --help is quick
    from trl_ext.method import Method
    from trl_ext.recipe import Recipe

USAGE_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 2 with a plain message for an error that the user can fix."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command not in ("train", "plan") and rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        if args.command == "methods":
            return _methods(args.name)
        _quiet()
        if args.command in evals_cli.COMMANDS:
            return evals_cli.run(args)
        return _train(args, rest) if args.command == "train" else _plan(args.recipe, rest)
    except KeyboardInterrupt as stop:
        print("\n".join(["Interrupted.", *getattr(stop, "__notes__", [])]), file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not isinstance(error, _user_errors()):
            raise
        print("\n".join([f"Error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return USAGE_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-ext", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    override = "any key of the recipe follows as --key value, --key=value or --methods.NAME.key value"
    train = commands.add_parser("train", help="train a recipe", epilog=override, allow_abbrev=False)
    train.add_argument("recipe", help="name of a recipe in recipes/, or a YAML file")
    train.add_argument("--resume", action="store_true", help="continue the newest run that is not finished")
    train.add_argument("--dry-run", action="store_true", help="check recipe, data and plan, then stop")
    plan = commands.add_parser("plan", help="show stages, costs and memory", epilog=override, allow_abbrev=False)
    plan.add_argument("recipe", help="name of a recipe in recipes/, or a YAML file")
    methods = commands.add_parser("methods", help="list the methods, or explain one", allow_abbrev=False)
    methods.add_argument("name", nargs="?", help="a method's name")
    evals_cli.add_commands(commands)
    return parser


def _user_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is written for the user; all others keep their traceback."""
    from trl_ext.annotate import AnnotatorError
    from trl_ext.checkpoints import CheckpointError
    from trl_ext.data import DataError
    from trl_ext.plan import PlanError
    from trl_ext.recipe import RecipeError
    from trl_ext.rewards import RewardError
    from trl_ext.saved import SavedModelError

    own = (AnnotatorError, CheckpointError, DataError, PlanError, RecipeError, RewardError, SavedModelError)
    return (*own, *evals_cli.user_errors())


def _train(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from trl_ext.recipe import load_recipe
    from trl_ext.run import train

    recipe = load_recipe(args.recipe, overrides)
    result = train(recipe, resume=args.resume, dry_run=args.dry_run)
    if args.dry_run:
        print(plan_text(recipe, result.schedule))
        print(f"\nDry run: nothing was trained; the run would write to {result.output_dir}.")
    elif result.text:  # one process of several tells it
        print("\n".join([result.text, *(f"Warning: {said}" for said in result.warnings)]))
    return 0


def _quiet() -> None:
    """Silences what libraries say about themselves and a user cannot act on."""
    import logging
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")


def _plan(name: str, overrides: Sequence[str]) -> int:
    from trl_ext import memory
    from trl_ext.recipe import load_recipe
    from trl_ext.schedule import schedule_of

    recipe = load_recipe(name, overrides)
    print(plan_text(recipe, schedule_of(recipe.training_args).words()))
    try:
        print(f"\n{memory.predict(recipe).table()}")
    except OSError as error:
        print(f"\nMemory: not predicted, since the model's configuration cannot be read: {error}")
    return 0


def plan_text(recipe: Recipe, schedule: str) -> str:
    """The plan for people: where each method acts, what it needs and costs, and the schedule in words."""
    plan = recipe.plan
    lines = [f"{recipe.path}: {recipe.trainer} on {recipe.model_args.model_name_or_path}", "", f"Schedule: {schedule}"]
    lines += [f"Loop: {recipe.loop.describe(recipe.training_args)}"] if recipe.loop else []
    lines += [f"Rewards: {', '.join(recipe.reward_names)}"] if recipe.rewards else []
    if not plan.methods:
        plain = "updates are plain TRL's" if recipe.loop else "this is TRL, bit for bit"
        return "\n".join([*lines, "", f"No method is named: {plain}."])
    lines += ["", *_table([("stage", "methods, in order"), *plan.describe()])]
    costs = [(m.name, ", ".join(sorted(m.needs())) or "nothing", m.cost()) for m in plan.methods]
    lines += ["", *_table([("method", "needs", "costs"), *costs])]
    return "\n".join([*lines, "", "Conflicts: none, the methods compose."])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned lines; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _methods(name: str | None) -> int:
    from trl_ext.methods import METHODS
    from trl_ext.plan import PlanError, did_you_mean

    if name is None:
        first = [(cls.name, cls.trainer, cls.paper, _summary(cls)) for cls in METHODS.values()]
        print("\n".join(_table([("method", "trainer", "arXiv", "what it does"), *first])))
        return 0
    if name not in METHODS:
        known = f"{did_you_mean(name, METHODS)} (known: {', '.join(METHODS)})"
        raise PlanError([f"unknown method '{name}'{known}"], "No such method")
    print(describe(METHODS[name]))
    return 0


def _summary(cls: type[Method]) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def describe(cls: type[Method]) -> str:
    """Everything that a method declares: paper, equation, settings with the source of each default, needs, cost."""
    import inspect
    import sys

    from trl_ext.methods import METHODS

    method = cls()
    equation = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    parts = [f"{cls.name}: {cls.title}", f"https://arxiv.org/abs/{cls.paper}", "", equation, ""]
    parts += [inspect.cleandoc(cls.__doc__ or ""), "", f"Settings (recipe: methods: {{{cls.name}: {{...}}}}):"]
    parts += _settings(cls)
    parts += ["", f"Needs with these defaults: {', '.join(sorted(method.needs())) or 'nothing'}"]
    parts += [f"Costs: {method.cost()}", f"Owns: {', '.join(cls.owns) or 'nothing'}"]
    declared = {other.name: other.conflicts[cls.name] for other in METHODS.values() if cls.name in other.conflicts}
    conflicts = [f"  {other}: {reason}" for other, reason in {**cls.conflicts, **declared}.items()]
    parts += ["Conflicts: none declared"] if not conflicts else ["Conflicts:", *conflicts]
    return "\n".join(parts)


def _settings(cls: type[Method]) -> list[str]:
    from trl_ext.plan import settings_of
    from trl_ext.settings import default_of

    lines = []
    for name, f in settings_of(cls).items():
        lines.append(f"  {name} = {default_of(f)!r}   {_bounds(dict(f.metadata))}".rstrip())
        lines.append(f"      {f.metadata['doc']}")
        lines.append(f"      default from: {f.metadata['source']}")
    return lines


def _bounds(rules: dict[str, object]) -> str:
    if rules.get("choices"):
        return f"one of {', '.join(map(str, rules['choices']))}"  # type: ignore[call-overload]
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return ", ".join(f"{sign} {rules[rule]}" for rule, sign in signs.items() if rules.get(rule) is not None)
