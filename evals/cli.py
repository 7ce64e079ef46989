"""The commands `trl-ext eval | compare | regrade | report`: is the adapter better than its base?"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is imported by a command that needs it, so that --help is quick
    from evals.result import Result
    from evals.runs import Plan
    from evals.settings import Settings
    from evals.task import Task

COMMANDS = ("eval", "compare", "regrade", "report")
GATE_FAILED = 1
GATES = ("worse", "not-better")


def add_commands(commands: Any) -> None:
    """Adds the four commands to the parser of `trl-ext`."""
    ask = commands.add_parser(
        "eval", help="score a run, adapters or a model, and compare with the base", allow_abbrev=False
    )
    ask.add_argument("runs", nargs="*", help="folders of runs; none: the newest one in runs/, else the sandbox's base")
    _add_subjects(ask)
    _add_questions(ask)
    _add_sampling(ask)
    _add_output(ask)
    compare = commands.add_parser(
        "compare", help="compare two evaluations, or sample files of lm-eval or lighteval", allow_abbrev=False
    )
    compare.add_argument("before", help="a report's folder, or a file of samples")
    compare.add_argument("after", help="the same for the model that should be better")
    _flag(compare, "--metric", help="for sample files: the metric to compare (default: the only one)")
    _flag(compare, "--filter", help="for lm-eval's sample files: which filter's scores count")
    _flag(compare, "--allow-mismatch", action="store_true", help="compare although the settings differ")
    _flag(compare, "--fail-if", action="append", choices=GATES, default=[], help="exit with 1 on this verdict")
    regrade = commands.add_parser(
        "regrade", help="grade the stored replies of a report again, without a model", allow_abbrev=False
    )
    regrade.add_argument("folder", help="a report's folder")
    report = commands.add_parser(
        "report", help="write page and card again from a report's results.json", allow_abbrev=False
    )
    report.add_argument("folder", help="a report's folder")


def _add_subjects(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what answers")
    _flag(group, "--model", help="the base: a name on the Hub, a folder, or `sandbox`")
    _flag(group, "--adapter", action="append", default=[], help="a LoRA adapter; several for several seeds")
    _flag(group, "--candidate", action="append", default=[], help="a whole model to compare with --model")
    _flag(group, "--checkpoints", action="store_true", help="every checkpoint of the run, as a curve")
    _flag(group, "--revision", help="the base's revision on the Hub")
    _flag(group, "--quantization", choices=("none", "4bit", "8bit"), help="default: as the run was trained")
    _flag(group, "--dtype", help="float32, bfloat16, float16 or auto; default: as the run was trained")
    _flag(group, "--tokenizer", help="tokenizer and chat template for all; default: the base's")
    _flag(group, "--chat-template-kwargs", type=_json_object, help="e.g. '{\"enable_thinking\": false}'")
    _flag(group, "--trust-remote-code", action="store_true", help="run code that comes with the model")
    _flag(group, "--backend", choices=("hf", "vllm"), default="hf")
    _flag(group, "--batch-size", type=int, default=64, help="replies at a time; halved when memory runs out")
    _flag(group, "--allow-inactive", action="store_true", help="evaluate an adapter that changes nothing")


def _add_questions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked")
    _flag(group, "--tasks", action="append", help="names or groups, by comma; `trl-ext eval --tasks help` lists them")
    _flag(group, "--targets", help="the tasks that training aimed at; the others guard against forgetting")
    _flag(group, "--limit", type=int, help="questions of each task (the first ones)")
    _flag(group, "--data", help="folder with data sets as on the Hub, for machines without network")
    _flag(group, "--missing", choices=("skip", "stand-in", "fail"), default="skip", help="data cannot be had")
    _flag(group, "--strict", action="store_true", help="the same as --missing fail")
    _flag(group, "--control", action="store_true", help="also: what a grammar alone gives, on structured tasks")
    _flag(group, "--judge", help="also: best of k replies chosen by this reward, a name or module.function")
    _flag(group, "--min-effect", type=float, metavar="POINTS", help="only plan: replies needed to see this")
    _flag(group, "--pilot", metavar="FOLDER", help="for --min-effect: an earlier report, instead of assumptions")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how replies are drawn")
    group.add_argument(
        "--preset", choices=("offline", "quick", "full"), help="default: quick; offline for the sandbox"
    )
    _flag(group, "--samples", type=int, help="replies to each prompt")
    _flag(group, "--temperature", type=float, help="0: greedy")
    _flag(group, "--looks", help="planned numbers of samples, e.g. 8,16,32: adding samples until it looks good costs")
    _flag(group, "--top-p", type=float)
    _flag(group, "--top-k", type=int, help="0: off")
    _flag(group, "--max-new-tokens", type=int)
    _flag(group, "--seed", type=int, default=0, help="of questions that are generated, and of sampling")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what comes out")
    _flag(group, "--out", help="the report's folder; default: evals_out/NAME")
    _flag(group, "--store", help="the folder of replies; default: evals_out/replies, shared by all reports")
    _flag(group, "--fail-if", action="append", choices=GATES, default=[], help="exit with 1 on this verdict")


def _flag(parser: Any, name: str, **settings: Any) -> None:
    """An option that may be written with hyphens or, as TRL's are, with underscores."""
    parser.add_argument(*dict.fromkeys([name, "--" + name[2:].replace("-", "_")]), **settings)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("expected a JSON object")
    return value


def user_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is written for the user."""
    from evals.compare import Mismatch
    from evals.generation.store import StoreError
    from evals.imports import ImportProblem
    from evals.models import ModelError
    from evals.settings import SettingsError
    from evals.task import DataError

    return (DataError, ImportProblem, Mismatch, ModelError, StoreError, SettingsError)


def run(args: argparse.Namespace) -> int:
    """Runs one of `COMMANDS`; returns the exit code. Raises `user_errors` and ValueError."""
    return {"eval": _eval, "compare": _compare, "regrade": _regrade, "report": _report}[args.command](args)


def _eval(args: argparse.Namespace) -> int:
    if args.tasks == ["help"]:
        print(_task_list())
        return 0
    from evals.run import Evaluation, processes, ready_tasks
    from evals.settings import SettingsError

    if args.pilot and args.min_effect is None:
        raise SettingsError("--pilot is for --min-effect")
    plan = plan_of(args)
    settings = settings_of(args, plan.sandbox)
    ready, skipped = ready_tasks(settings)
    if args.min_effect is not None:
        from evals.effort import pilot, table

        pilots = pilot(_loaded(args.pilot)) if args.pilot else {}
        print(table(ready, len(plan.names) + 1, args.min_effect / 100, pilots))
        return 0
    main = processes().is_main_process
    with progress(main) as advance:
        evaluation = Evaluation(plan, settings, ready, skipped, advance)
        session = evaluation.go()
    if not main:
        return 0  # the main process grades and reports
    folder = new_folder(args.out or str(Path("evals_out") / (plan.names[-1] if plan.names else "base")))
    session.save(folder)
    result = write_report(folder, session, evaluation.tokenizer, plan.template_settings)
    return gate(verdicts(result), args.fail_if)


def plan_of(args: argparse.Namespace) -> Plan:
    """What the arguments name: runs, or model and adapters, or the newest run, or the sandbox's base alone."""
    from dataclasses import replace

    from evals.models import ModelError
    from evals.runs import newest_run, plan_parts, plan_runs

    changes = {key: getattr(args, key) for key in ("revision", "dtype") if getattr(args, key) is not None}
    changes |= {"trust_remote_code": args.trust_remote_code}
    if args.quantization is not None:
        changes["quantization"] = QUANTIZATION[args.quantization]
    parts = args.model or args.adapter or args.candidate
    if args.runs and parts:
        raise ModelError("name runs, or --model, --adapter and --candidate, not both: a run knows its base")
    if args.checkpoints and parts:
        raise ModelError("--checkpoints is for runs: an adapter or a model has none")
    folders = [Path(run) for run in args.runs]
    if not folders and not parts and (newest := newest_run()) is not None:
        print(f"Evaluating the newest run, {newest}")
        folders = [newest]
    if folders:
        plan = plan_runs(folders, args.checkpoints, changes)
    else:
        plan = plan_parts(args.model or (None if parts else "sandbox"), args.adapter, args.candidate, changes)
    settings = plan.template_settings if args.chat_template_kwargs is None else args.chat_template_kwargs
    return replace(plan, tokenizer=args.tokenizer or plan.tokenizer, template_settings=settings)


QUANTIZATION: dict[str, dict[str, Any] | None] = {
    "none": None,
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "8bit": {"load_in_8bit": True},
}


def settings_of(args: argparse.Namespace, sandbox: bool) -> Settings:
    """The checked settings; the sandbox's model gets the offline tasks and preset unless others are named."""
    from evals.settings import Settings

    targets = _names(args.targets)
    same = ("samples", "temperature", "top_p", "top_k", "max_new_tokens", "seed", "limit", "data", "batch_size")
    return Settings(
        tasks=tuple(_tasks(_names(",".join(args.tasks or ())) or ["offline" if sandbox else "real"])),
        preset=args.preset or ("offline" if sandbox else "quick"),
        missing="fail" if args.strict else args.missing,
        targets=tuple(task.name for task in _tasks(targets)),
        backend=args.backend,
        control=args.control,
        judge=args.judge,
        looks=_looks(args.looks),
        allow_inactive=args.allow_inactive,
        store=args.store or str(Path("evals_out") / "replies"),
        **{name: getattr(args, name) for name in same},
    )


def _looks(text: str | None) -> tuple[int, ...]:
    from evals.settings import SettingsError

    try:
        looks = tuple(int(name) for name in _names(text))
    except ValueError:
        looks = (0,)
    if list(looks) != sorted(set(looks)) or (looks and looks[0] < 1):
        raise SettingsError(f"--looks {text}: expected increasing numbers of samples, such as 8,16,32")
    return looks


def _tasks(names: Sequence[str]) -> list[Task]:
    from evals.settings import SettingsError
    from evals.tasks import get_tasks

    try:
        return get_tasks(names) if names else []
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


@contextlib.contextmanager
def progress(show: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar of replies with the time left; `advance(count, total)` moves it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("replies"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task("replies", total=None)
        yield lambda count, total: bar.update(task, advance=count, total=total)


def write_report(folder: str, session: Any, tokenizer: Any = None, template_settings: Any = None) -> Result:
    """Grades the session, writes its files into `folder` and prints the verdict."""
    from evals.report.files import publishable_results, write, write_whole
    from evals.report.text import text
    from evals.score import score

    scored = score(session, tokenizer, template_settings)
    files = write(folder, scored.result, scored.lm_eval[session.subjects[-1].name])
    for number, name in enumerate(scored.lm_eval):
        content = json.dumps(publishable_results(scored.lm_eval[name], scored.result), indent=1)
        write_whole(Path(folder) / "lm_eval" / f"{number}.json", content.encode())
    print(text(scored.result))
    print(f"\nPage: {files.page}   numbers: {files.results}   model card: {files.card}")
    return scored.result


def verdicts(result: Result) -> list[str]:
    """The verdicts on the headlines of all tasks and candidates."""
    return [versus.metrics[task.headline].verdict for task in result.tasks for versus in task.versus]


def gate(found: Sequence[str], fail_if: Sequence[str]) -> int:
    """The exit code: `GATE_FAILED` for "worse" when one verdict is worse, for "not-better" when none is better."""
    fails = {"worse": "worse" in found, "not-better": "better" not in found}
    failed = [name for name in fail_if if fails[name]]
    if failed:
        print(f"Gate: {', '.join(failed)}", file=sys.stderr)
    return GATE_FAILED if failed else 0


def _compare(args: argparse.Namespace) -> int:
    if Path(args.before).is_dir() and (Path(args.before) / "session.json").exists():
        from evals.merge import compare_reports
        from evals.settings import SettingsError

        if args.metric or args.filter:
            raise SettingsError("--metric and --filter are for sample files; a report compares all its metrics")
        session = compare_reports(args.before, args.after, args.allow_mismatch)
        folder = new_folder(str(Path("evals_out") / f"{Path(args.before).name}-against-{Path(args.after).name}"))
        session.save(folder)
        return gate(verdicts(write_report(folder, session)), args.fail_if)
    from evals.foreign import compare_files

    found = compare_files(args.before, args.after, args.metric, args.filter, args.allow_mismatch)
    print("\n".join(one.words for one in found))
    return gate([one.paired.verdict for one in found], args.fail_if)


def _regrade(args: argparse.Namespace) -> int:
    from evals.session import load_session

    write_report(args.folder, load_session(args.folder))
    return 0


def _report(args: argparse.Namespace) -> int:
    from evals.report.files import SECTION, write
    from evals.report.text import text

    result = _loaded(args.folder)
    whole = json.loads((Path(args.folder) / "results.json").read_text())
    write(args.folder, result, {key: value for key, value in whole.items() if key != SECTION})
    print(text(result))
    return 0


def _loaded(folder: str) -> Result:
    from evals.report.files import load
    from evals.settings import SettingsError

    try:
        return load(folder)
    except (OSError, ValueError) as error:
        raise SettingsError(str(error)) from None


def new_folder(base: str) -> str:
    """`base`, or the first of base-2, base-3, ... that holds no report: none is ever written over."""
    number, folder = 1, Path(base)
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = Path(f"{base}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def _task_list() -> str:
    from evals.tasks import GROUPS, TASKS

    width = max(map(len, TASKS))
    lines = [f"{name.ljust(width)}  {task.title}; {task.origin}" for name, task in TASKS.items()]
    return "\n".join([*lines, "", *(f"group {name}: {', '.join(members)}" for name, members in GROUPS.items())])
