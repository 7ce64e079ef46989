"""What is asked of the models between the stages of a pipeline, so that a row of its report is a stage.

`eval: {rows: N}`: N held-out problems of the sandbox, the same ones with the same random numbers for every model.
`eval: {tasks: [...], limit: N, ...}`: the options of `trl-ext eval`, which compares each stage with the one before. Its
replies are kept in the pipeline's folder, so no model answers twice.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from transformers import AutoModelForCausalLM, AutoTokenizer

from evals import cli as evals_cli
from trl_ext.checkpoints import CheckpointError
from trl_ext.data_sources import SANDBOX_EVAL_ROWS
from trl_ext.plan import did_you_mean
from trl_ext.report import Evaluation, evaluate_sandbox, files
from trl_ext.sandbox import Record, dataset

OURS = (
    "model",
    "adapter",
    "candidate",
    "checkpoints",
    "revision",
    "out",
    "store",
    "runs",
    "fail_if",
    "min_effect",
    "pilot",
)
"""Options of `trl-ext eval` that the pipeline sets itself, or that make no sense in it."""


@dataclass(frozen=True)
class StageEvals:
    """`rows` sandbox problems drawn from `seed`, or `options` of `trl-ext eval`. One of the two is empty."""

    rows: int = 0
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def words(self) -> str:
        """For the plan."""
        if self.rows:
            return f"{self.rows} held-out sandbox problems before the first stage and after each"
        return f"trl-ext eval {' '.join(_words(self.options))}, each stage against the one before"


def default_evals(sandbox: bool) -> StageEvals | None:
    """Held-out problems where a stage trains on the sandbox, else nothing."""
    return StageEvals(rows=SANDBOX_EVAL_ROWS) if sandbox else None


def make_evals(spec: Any, sandbox: bool) -> StageEvals | None:
    """From a recipe's `eval`; none for `rows: 0` or null. Raises ValueError for what cannot be asked."""
    if spec is None:
        return None
    if not isinstance(spec, Mapping):
        raise ValueError(f"expected {{rows: N}} or options of `trl-ext eval`, got {spec!r}")
    if not set(spec) <= {"rows", "seed"} or "rows" not in spec:
        return _harness({str(key): value for key, value in spec.items()})
    rows, seed = spec["rows"], spec.get("seed", 0)
    if type(rows) is not int or type(seed) is not int or rows < 0 or rows == 1:
        raise ValueError(f"rows {rows!r}, seed {seed!r}: expected whole numbers, at least 2 rows or 0 for none")
    if rows and not sandbox:
        raise ValueError("rows: these are problems of the sandbox, and no stage trains on it; name `tasks` instead")
    return StageEvals(rows, seed) if rows else None


def _harness(options: Mapping[str, Any]) -> StageEvals:
    """Options as `trl-ext eval` reads them, checked now and not after hours of training."""
    if "tasks" not in options:
        raise ValueError("tasks: name what to ask (`trl-ext eval --tasks help` lists it)")
    if taken := [key for key in options if key.replace("-", "_") in OURS]:
        raise ValueError(f"{', '.join(taken)}: the pipeline sets that itself; remove it")
    made = StageEvals(options=options)
    evals_cli.settings_of(_parsed(made, "somewhere", "elsewhere", "out", "store"), sandbox=False)
    return made


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        known = [name[2:] for action in self._actions for name in action.option_strings if name.startswith("--")]
        near = did_you_mean(message.rpartition("--")[2].split()[0], known) if "--" in message else ""
        raise ValueError(f"`trl-ext eval` does not take this: {message}{near}")


def _parsed(evals: StageEvals, before: str, after: str, out: str, store: str) -> argparse.Namespace:
    parser = _Parser(allow_abbrev=False)
    evals_cli.add_commands(parser.add_subparsers(dest="command"))
    words = ["eval", "--model", before, "--candidate", after, "--out", out, "--store", store]
    return parser.parse_args([*words, *_words(evals.options)])


def _words(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line: lists by comma, true as a flag."""
    words: list[str] = []
    for key, value in options.items():
        if value is None or value is False:
            continue
        text = json.dumps(value) if isinstance(value, Mapping) else str(value)
        if isinstance(value, Sequence) and not isinstance(value, str):
            text = ",".join(map(str, value))
        words += [f"--{key}"] if value is True else [f"--{key}", text]
    return words


def asked(evals: StageEvals, *models: str) -> dict[str, Any]:
    """What decides an evaluation: what is asked, and whom (the model, or the one before and this one)."""
    whole = {"rows": evals.rows, "seed": evals.seed, "options": evals.options, "models": models}
    return json.loads(json.dumps(whole))


def check_asked(file: Path, now: Mapping[str, Any]) -> None:
    """Raises CheckpointError when the evaluation in `file` asked something else, or another model, than `now`."""
    then = json.loads(file.read_text())["asked"] if file.exists() else now
    if keys := [key for key in {**then, **now} if then.get(key) != now.get(key)]:
        changes = "; ".join(f"{key} {then.get(key)!r} then, {now.get(key)!r} now" for key in keys)
        raise CheckpointError(
            f"eval: {file} holds another evaluation ({changes}), and all stages must answer the same. Resume with the same "
            "settings, or start without --resume."
        )


def sandbox_scores(evals: StageEvals, model: str, device: Any, file: Path, now: Mapping[str, Any]) -> Evaluation:
    """The model's replies to the problems, from `file` if they were given before, else asked and written there.

    `now`: as `asked` says. Raises CheckpointError for a file with another one.
    """
    check_asked(file, now)
    if file.exists():
        found = json.loads(file.read_text())
        return Evaluation(tuple(found["problems"]), tuple(Record(**r) for r in found["records"]), found["samples"])
    rows = list(dataset("math", n=evals.rows, seed=evals.seed, split="test"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(model).to(device)
    made = evaluate_sandbox(loaded, AutoTokenizer.from_pretrained(model), rows, evals.seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "asked": now,
        "problems": made.problems,
        "samples": made.samples,
        "records": [vars(r) for r in made.records],
    }
    files.write_json(file, content)
    return made


def harness_scores(
    evals: StageEvals, before: str, after: str, folder: Path, store: Path, main: bool, now: Mapping[str, Any]
) -> dict[str, Any]:
    """`trl-ext eval` of two models into `folder`, unless it was done; task -> scores, difference and verdict.

    That it was done, and what was asked (`now`, as `asked` says), is in a JSON file beside the folder. Called on all
    processes, which share the work; on others than `main` nothing is returned. Raises CheckpointError for another file.
    """
    from evals.report.files import load

    file = Path(f"{folder}.json")
    check_asked(file, now)
    if not file.exists():
        if main:
            shutil.rmtree(folder, ignore_errors=True)  # a report that was cut off; its replies are in the store
        evals_cli.run(_parsed(evals, before, after, str(folder), str(store)))
        if main:
            files.write_json(file, {"asked": now})
    return {task.name: _task(task) for task in load(folder).tasks} if main else {}


def _task(task: Any) -> dict[str, Any]:
    """One task of a report with one candidate, as plain data."""
    (versus,) = task.versus
    paired = versus.metrics[task.headline]
    before, after = (vars(scores.metrics[task.headline]) for scores in task.scores)
    found = {"metric": task.headline, "before": before, "after": after, "comparison": vars(paired.comparison)}
    return found | {"verdict": paired.verdict}
