"""The report of a staged pipeline: a row for each stage, and what each stage changed, paired by question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from trl_ext.loops.stages import Pipeline
from trl_ext.report import Evaluation, files
from trl_ext.report.evaluation import MEASURES, SAMPLES, TEMPERATURE, compare, percent, verdict

STATE = "pipeline.json"


@dataclass(frozen=True)
class Row:
    """A stage's result. `run`: its folder, None for the start; `model`: whole weights; `tasks`: of `trl-ext eval`."""

    label: str
    trainer: str | None
    run: Path | None
    model: str
    scores: Evaluation | None
    tasks: dict[str, Any]


def write(folder: Path, pipeline: Pipeline, rows: Sequence[Row], finished: bool) -> str:
    """Writes `pipeline.json`, and at the end `report.md`; returns the text to print."""
    last = rows[-1]
    state = {
        "recipe": pipeline.path.stem,
        "finished": finished,
        "evaluation": None if pipeline.evals is None else pipeline.evals.words(),
        "stages": [_data(row, rows[:i], folder) for i, row in enumerate(rows)],
        # what `trl-ext publish` and `trl-ext eval` of the whole pipeline mean
        "last": {"run": _inside(last.run, folder), "model": _inside(Path(last.model), folder)} if finished else None,
    }
    files.write_json(folder / STATE, state)
    body = _body(pipeline, rows, folder)
    if finished:
        files.write_text(folder / "report.md", _markdown(pipeline, rows, body, folder))
    ask = f"trl-ext eval --model {rows[0].model} --candidate {last.model}"
    return "\n".join([*body, "", f"Written to {folder}: report.md, {STATE}", f"The last model: {last.model}; {ask}"])


def _inside(path: Path | None, folder: Path) -> str | None:
    """A path as seen from the pipeline's folder; the first model keeps its name alone, since a report may be published."""
    if path is None:
        return None
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name


def _data(row: Row, earlier: Sequence[Row], folder: Path) -> dict[str, Any]:
    """One stage as data."""
    found: dict[str, Any] = {"stage": row.label, "trainer": row.trainer}
    found |= {"run": _inside(row.run, folder), "model": _inside(Path(row.model), folder), **_training(row.run)}
    if row.scores is not None:
        found["scores"] = {m: asdict(row.scores.estimate(m)) for m in MEASURES}
        found["mean_length"] = row.scores.mean_length
        for name, other in _others(earlier).items():
            found[f"versus_{name}"] = {m: _difference(other, row.scores, m) for m in MEASURES}
    if row.tasks:
        found["tasks"] = row.tasks
    return found


def _others(earlier: Sequence[Row]) -> dict[str, Evaluation]:
    """The stage before and, where that is another one, the start."""
    scored = [row.scores for row in earlier if row.scores is not None]
    return ({"previous": scored[-1]} if scored else {}) | ({"start": scored[0]} if len(scored) > 1 else {})


def _difference(before: Evaluation, after: Evaluation, measure: str) -> dict[str, Any]:
    found = compare(before, after, measure)
    return asdict(found) | {"verdict": found.verdict, "words": verdict(found)}


def _training(run: Path | None) -> dict[str, Any]:
    """Steps and seconds of a run, from its log."""
    log = [] if run is None else files.read_log(run)
    seconds = [entry["train_runtime"] for entry in log if "train_runtime" in entry]
    return {"steps": max((entry["step"] for entry in log), default=None), "seconds": seconds[-1] if seconds else None}


def _body(pipeline: Pipeline, rows: Sequence[Row], folder: Path) -> list[str]:
    """The table and the differences, for people."""
    lines = [f"{pipeline.path.stem}: {' -> '.join(stage.name for stage in pipeline.stages)}", ""]
    lines += _sandbox(rows) if rows[0].scores is not None else []
    for row in rows:
        for name, task in row.tasks.items():
            change = task["comparison"]
            lines.append(
                f"  {row.label:<16}{name} ({task['metric']}): {100 * task['before']['mean']:.1f}% -> "
                f"{100 * task['after']['mean']:.1f}%, {100 * change['difference']:+.1f} points "
                f"[{100 * change['low']:.1f}, {100 * change['high']:.1f}], {task['verdict']}"
            )
    if rows[0].scores is None and not any(row.tasks for row in rows):
        lines += [f"  {row.label:<16}{_training(row.run)['steps']} steps" for row in rows if row.run is not None]
        lines.append("No evaluation: name tasks under `eval`.")
    return lines


def _sandbox(rows: Sequence[Row]) -> list[str]:
    scored = [row for row in rows if row.scores is not None]
    first = scored[0].scores
    assert first is not None
    lines = [
        f"The same {len(first.problems)} held-out problems to every model, {SAMPLES} sampled replies to each at temperature "
        f"{TEMPERATURE:g}, 95% intervals:",
        f"  {'stage':<16}{'steps':<8}{'accuracy':<24}validity",
    ]
    for row in scored:
        assert row.scores is not None
        steps = _training(row.run)["steps"] or ""
        values = [percent(row.scores.estimate(measure)) for measure in MEASURES]
        lines.append(f"  {row.label:<16}{steps!s:<8}{values[0]:<24}{values[1]}")
    lines += ["", "Each against the one before, paired by problem:"]
    for before, after in pairwise(scored):
        lines += [f"  {after.label:<16}{m:<10}{_words(before, after, m)}" for m in MEASURES]
    if len(scored) > 2:
        lines += ["", "The last against the start:"]
        lines += [f"  {scored[-1].label:<16}{m:<10}{_words(scored[0], scored[-1], m)}" for m in MEASURES]
    return lines


def _words(before: Row, after: Row, measure: str) -> str:
    assert before.scores is not None and after.scores is not None
    return verdict(compare(before.scores, after.scores, measure))


def _markdown(pipeline: Pipeline, rows: Sequence[Row], body: Sequence[str], folder: Path) -> str:
    parts = [f"# {pipeline.path.stem}", "", "```text", *body, "```", ""]
    parts += ["The intervals cover the choice of problems and replies, not the noise of another training seed.", ""]
    parts += ["## Stages", ""]
    for row in rows[1:]:
        run, model = _inside(row.run, folder), _inside(Path(row.model), folder)
        parts.append(f"- `{row.label}` ({row.trainer}): report [{run}/report.md]({run}/report.md), weights `{model}`")
    return "\n".join([*parts, "", f"All numbers: [{STATE}]({STATE})"]) + "\n"
