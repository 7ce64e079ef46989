"""`trl-ext`: train a recipe, show its plan, list the methods, merge an adapter; evaluate, compare, grade and report (`evals.cli`)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evals import cli as evals_cli

if TYPE_CHECKING:  # torch is imported by a command that needs it, so that --help is quick
    from trl_ext.loops.stages import Pipeline
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
        if args.command == "publish":
            return _publish(args)
        if args.command == "merge":
            return _merge(args)
        return _train(args, rest) if args.command == "train" else _plan(args.recipe, rest, args.gpu)
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
    plan.add_argument("--gpu", type=float, metavar="GIB", help="the GPU to fit; default: the one of this machine")
    methods = commands.add_parser("methods", help="list the methods, or explain one", allow_abbrev=False)
    methods.add_argument("name", nargs="?", help="a method's name")
    _add_publish(commands)
    _add_merge(commands)
    evals_cli.add_commands(commands)
    return parser


def _add_publish(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    publish = commands.add_parser("publish", help="put a run's adapter and its card on the Hub", allow_abbrev=False)
    publish.add_argument("run", help="the folder of a finished run")
    publish.add_argument("--repo", required=True, help="user/name on the Hub")
    publish.add_argument("--private", action="store_true", help="a new repository that only you see")
    publish.add_argument("--dry-run", action="store_true", help="write the files to a folder and send nothing")
    publish.add_argument("--out", help="for --dry-run: the folder; default: publish_out/NAME")
    publish.add_argument("--results", metavar="FOLDER", help="an evaluation of this run, as `trl-ext eval` wrote it")
    publish.add_argument("--base", help="the base's name on the Hub, if the run names a folder")
    publish.add_argument("--license", help="the Hub's identifier, if the base does not tell; e.g. apache-2.0")
    publish.add_argument("--license-name", help="for --license other")
    publish.add_argument("--license-link", help="for --license other")
    publish.add_argument("--full-model", action="store_true", help="allow whole weights, not only an adapter")
    publish.add_argument("--allow", action="append", default=[], metavar="TEXT", help="a name or path that is no leak")
    publish.add_argument("--yes-overwrite", action="store_true", help="write over a repository that is something else")


def _add_merge(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    merge = commands.add_parser("merge", help="put an adapter into its base's weights", allow_abbrev=False)
    merge.add_argument("adapter", nargs="+", help="a run's folder or an adapter; of several the sum is merged")
    merge.add_argument("--base", metavar="MODEL", help="the model in 16 or 32 bits; default: what the adapter names")
    merge.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the base's own")
    merge.add_argument("--out", required=True, metavar="DIR", help="a new folder for the whole model")


def _user_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is written for the user; all others keep their traceback."""
    from trl_ext.annotate import AnnotatorError
    from trl_ext.checkpoints import CheckpointError
    from trl_ext.data import DataError
    from trl_ext.executor import NoIsolation
    from trl_ext.merging import MergeError
    from trl_ext.method import Unavailable
    from trl_ext.plan import PlanError
    from trl_ext.recipe import RecipeError
    from trl_ext.rewards import RewardError
    from trl_ext.run_facts import PublishError
    from trl_ext.saved import SavedModelError

    own = (
        AnnotatorError,
        CheckpointError,
        DataError,
        MergeError,
        NoIsolation,
        PlanError,
        PublishError,
        RecipeError,
        RewardError,
        SavedModelError,
        Unavailable,
    )
    return (*own, *evals_cli.user_errors())


def _train(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from trl_ext.loops.stages import is_pipeline
    from trl_ext.recipe import load_recipe
    from trl_ext.run import train

    if is_pipeline(args.recipe):
        return _train_stages(args, overrides)
    recipe = load_recipe(args.recipe, overrides)
    result = train(recipe, resume=args.resume, dry_run=args.dry_run)
    if args.dry_run:
        print("\n".join([plan_text(recipe, result.schedule), *(f"Warning: {said}" for said in result.warnings)]))
        print(f"\nDry run: nothing was trained; the run would write to {result.output_dir}.")
    elif result.text:  # one process of several tells it
        print("\n".join([result.text, *(f"Warning: {said}" for said in result.warnings)]))
    return 0


def _train_stages(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from trl_ext.loops.pipeline import run_pipeline
    from trl_ext.loops.stages import load_pipeline

    pipeline = load_pipeline(args.recipe, overrides)
    result = run_pipeline(pipeline, resume=args.resume, dry_run=args.dry_run)
    if args.dry_run:
        _plan_stages(pipeline, [run.schedule for run in result.runs], None)
        print("\n".join(f"Warning: {said}" for run in result.runs for said in run.warnings))
        print(f"\nDry run: nothing was trained; the run would write to {result.output_dir}.")
    elif result.text:
        print("\n".join([result.text, *(f"Warning: {said}" for run in result.runs for said in run.warnings)]))
    return 0


def _publish(args: argparse.Namespace) -> int:
    from trl_ext import hub
    from trl_ext.card_data import License
    from trl_ext.run_facts import PublishError

    problems = ["--out is for --dry-run"] if args.out and not args.dry_run else []
    problems += ["--license-name and --license-link are for --license other"] * (
        args.license != "other" and bool(args.license_name or args.license_link)
    )
    if problems:
        raise PublishError("publish", problems)
    wish = hub.Wish(
        args.repo,
        args.private,
        args.base,
        License(args.license, args.license_name, args.license_link) if args.license else None,
        args.results,
        args.full_model,
        args.yes_overwrite,
        tuple(args.allow),
    )
    done = hub.dry_run(args.run, wish, args.out) if args.dry_run else hub.publish(args.run, wish)
    print("\n".join([done.words, *(f"  {name}" for name in done.files)]))
    return 0


def _merge(args: argparse.Namespace) -> int:
    from trl_ext.merging import merge_adapter

    print(merge_adapter(args.adapter, args.out, args.base, args.dtype).text())
    return 0


def _quiet() -> None:
    """Silences what libraries say about themselves and a user cannot act on."""
    import logging
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")


def _plan(name: str, overrides: Sequence[str], gpu: float | None) -> int:
    from trl_ext.loops.stages import is_pipeline, load_pipeline
    from trl_ext.recipe import load_recipe
    from trl_ext.schedule import schedule_of

    if is_pipeline(name):
        pipeline = load_pipeline(name, overrides)
        _plan_stages(pipeline, [schedule_of(stage.recipe.training_args).words() for stage in pipeline.stages], gpu)
        return 0
    recipe = load_recipe(name, overrides)
    print(plan_text(recipe, schedule_of(recipe.training_args).words()))
    _predict_memory(recipe, gpu)
    return 0


def _plan_stages(pipeline: Pipeline, schedules: Sequence[str], gpu: float | None) -> None:
    """Each stage: where it starts, its plan and its memory, which are those of the first model's size."""
    print(f"{pipeline.path}: {' -> '.join(stage.name for stage in pipeline.stages)}")
    print(f"Evaluation: {pipeline.evals.words() if pipeline.evals else 'none; name tasks under `eval`'}")
    for stage, schedule in zip(pipeline.stages, schedules, strict=True):
        print(f"\n== Stage {stage.number}: {stage.name}\n{stage.starts_from(pipeline)}\n")
        print(plan_text(stage.recipe, schedule))
        _predict_memory(stage.recipe, gpu)


def _predict_memory(recipe: Recipe, gpu: float | None) -> None:
    """What the model's configuration tells: memory, whether the GPU holds it, and settings that are known to hurt."""
    from trl_ext import memory
    from trl_ext.advice import advise

    config = None
    try:
        config, _ = memory.config_of(recipe)
        prediction = memory.predict(recipe)
        print(f"\n{prediction.table()}")
        if (gib := gpu or memory.gpu_here()) is not None:
            print(f"\n{prediction.advice(gib)}")
    except OSError as error:
        print(f"\nMemory: not predicted, since the model's configuration cannot be read: {error}")
    if found := advise(recipe, config):
        print("\n".join(["", "Settings that are known to hurt:", *(f"  - {advice}" for advice in found)]))


def plan_text(recipe: Recipe, schedule: str) -> str:
    """The plan for people: where each method acts, what it needs and costs, and the schedule in words."""
    from trl_ext.advice import generation_words, reference_words

    plan = recipe.plan
    lines = [f"{recipe.path}: {recipe.trainer} on {recipe.model_args.model_name_or_path}", "", f"Schedule: {schedule}"]
    lines += [f"Loop: {recipe.loop.describe(recipe.training_args)}"] if recipe.loop else []
    lines += [f"Rewards: {', '.join(recipe.reward_names)}"] if recipe.rewards else []
    said = {"Generation": generation_words(recipe), "Reference": reference_words(recipe)}
    lines += [f"{what}: {words}" for what, words in said.items() if words]
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
        trainers = {cls: ", ".join((cls.trainer, *cls.also_in)) for cls in METHODS.values()}
        first = [(cls.name, where, cls.paper, _summary(cls)) for cls, where in trainers.items()]
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
