"""The end of a run: before against after, a picture, and where everything is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trl_ext.plan import Plan
from trl_ext.report import files
from trl_ext.report.evaluation import (
    MEASURES,
    TEMPERATURE,
    Evaluation,
    compare,
    examples,
    percent,
    verdict,
)
from trl_ext.report.opening import changed
from trl_ext.report.plots import curves

CONTENTS = {
    "adapter_model.safetensors": "the trained adapter",
    "model.safetensors": "the trained model",
    "model.safetensors.index.json": "the trained model, in shards",
    "README.md": "the model card",
    "report.md": "this report",
    "report.json": "its numbers",
    "curves.png": "learning curves",
    "log.jsonl": "every logged number, one line per log",
    "log.csv": "the same as a table",
    "questions.jsonl": "every question and verdict of the loop",
    "rounds": "samples, scores, training rows and weights of every round",
    "proposer": "the Proposer's adapter",
    "recipe.yaml": "the recipe with every default filled in",
    "plan.txt": "stages, costs, schedule",
    "versions.json": "versions, commit, machine, seeds",
}
"""Files of a run that are listed when they are there."""
EXAMPLES = 2
MAX_CHARACTERS = 400
"""Of a reply that is shown."""


def finish(
    output_dir: str,
    recipe: Any,
    plan: Plan,
    before: Evaluation | None,
    after: Evaluation | None,
    method_lines: Sequence[str],
) -> str:
    """Writes `curves.png`, `report.json` and `report.md`; returns the text to print.

    Without `before` and `after` there are only curves and files. Paths in the files are relative to `output_dir`.
    """
    folder = Path(output_dir)
    picture = curves(files.read_log(folder), plan, before, after, title=f"{recipe.name} ({_called(recipe, plan)})")
    if picture is not None:
        files.write_bytes(folder / "curves.png", picture)
    summary = _summary(recipe, plan, before, after, method_lines)
    files.write_json(folder / "report.json", summary)
    body = [*_result(before, after), *_own(method_lines)]
    files.write_text(folder / "report.md", _markdown(folder, recipe, plan, body, before, after))
    listed = [f"  {name:<30}{what}" for name, what in contents(folder).items()]
    return "\n".join([*body, f"Written to {output_dir}:", *listed])


def names(plan: Plan) -> str:
    """The methods in order, or "plain TRL"."""
    return ", ".join(method.name for method in plan.methods) or "plain TRL"


def _called(recipe: Any, plan: Plan) -> str:
    """The loop, if there is one, and the methods."""
    loop = getattr(recipe, "loop", None)
    return names(plan) if loop is None else f"{loop.name} loop, {names(plan)}"


def contents(folder: Path) -> dict[str, str]:
    """File name -> what it holds, for those that exist, and the report, which lists itself."""
    return {name: what for name, what in CONTENTS.items() if name == "report.md" or (folder / name).exists()}


def model_name(recipe: Any) -> str:
    """The model's name; of a local folder the last part, since a report may be published."""
    name = str(recipe.model_args.model_name_or_path)
    return Path(name).name if Path(name).is_absolute() else name


def _result(before: Evaluation | None, after: Evaluation | None) -> list[str]:
    """The comparison in words and numbers; nothing without evaluations."""
    if before is None or after is None:
        return []
    lines = [
        f"Before -> after on {len(before.problems)} held-out problems, {before.samples} sampled "
        f"{'reply' if before.samples == 1 else 'replies'} to each at temperature {TEMPERATURE:g}, 95% intervals:"
    ]
    for measure in MEASURES:
        lines.append(f"  {measure:<9}{percent(before.estimate(measure))} -> {percent(after.estimate(measure))}")
        lines.append(f"           {verdict(compare(before, after, measure))}")
    shares = " -> ".join("none" if e != e else f"{100 * e:.1f}%" for e in _pair("correct_among_valid", before, after))
    lengths = " -> ".join(f"{e:.1f}" for e in _pair("mean_length", before, after))
    return [*lines, f"  Right among valid replies: {shares}; length: {lengths} tokens", ""]


def _pair(name: str, before: Evaluation, after: Evaluation) -> list[float]:
    return [getattr(before, name), getattr(after, name)]


def _own(method_lines: Sequence[str]) -> list[str]:
    return ["From the methods:", *(f"  {line}" for line in method_lines), ""] if method_lines else []


def _summary(
    recipe: Any, plan: Plan, before: Evaluation | None, after: Evaluation | None, method_lines: Sequence[str]
) -> dict[str, Any]:
    """The report as data."""
    summary: dict[str, Any] = {
        "recipe": recipe.name,
        "trainer": recipe.trainer,
        "model": model_name(recipe),
        "methods": {method.name: changed(method) for method in plan.methods},
        "loop": recipe.loop.name if getattr(recipe, "loop", None) else None,
        "method_lines": list(method_lines),
        "evaluation": None,
    }
    if before is not None and after is not None:
        summary["evaluation"] = {
            "problems": len(before.problems),
            "samples": before.samples,
            "temperature": TEMPERATURE,
            "measures": {measure: _measure(before, after, measure) for measure in MEASURES},
            "correct_among_valid": _pair("correct_among_valid", before, after),
            "mean_length": _pair("mean_length", before, after),
        }
    return summary


def _measure(before: Evaluation, after: Evaluation, measure: str) -> dict[str, Any]:
    found = compare(before, after, measure)
    both = {"before": asdict(before.estimate(measure)), "after": asdict(after.estimate(measure))}
    return both | {"comparison": asdict(found), "verdict": found.verdict, "words": verdict(found)}


def _markdown(
    folder: Path,
    recipe: Any,
    plan: Plan,
    body: Sequence[str],
    before: Evaluation | None,
    after: Evaluation | None,
) -> str:
    methods = [f"- `{m.name}`: {m.title} (arXiv {m.paper}); {changed(m)}" for m in plan.methods]
    run = f"`{recipe.trainer}` on `{model_name(recipe)}`, {_called(recipe, plan)}."
    parts = [f"# {recipe.name}", "", run, "", *methods, ""]
    if body:
        parts += ["## Result", "", *_fence("\n".join(body).rstrip()), ""]
    if before is not None and after is not None:
        parts += [
            "The intervals cover the choice of problems and replies, not the noise of another training seed.",
            "",
        ]
    if (folder / "curves.png").exists():
        parts += ["## Curves", "", "![learning curves](curves.png)", ""]
    if before is not None and after is not None:
        parts += _examples(before, after)
    parts += ["## Files", "", *(f"- [{name}]({name}): {what}" for name, what in contents(folder).items())]
    return "\n".join(parts) + "\n"


def _examples(before: Evaluation, after: Evaluation) -> list[str]:
    """Replies that changed sides, as the model wrote them, cut at `MAX_CHARACTERS`."""
    lines: list[str] = []
    for old, new in examples(before, after, EXAMPLES):
        change = "wrong before, right after" if new.correct else "right before, wrong after"
        text = [f"problem: {before.problems[old.row]}", *(f"{k}: {_cut(r.text)}" for k, r in _labels(old, new))]
        lines += [f"### {change}", "", *_fence("\n".join(text)), ""]
    return ["## Replies that changed sides", "", *lines] if lines else []


def _labels(old: Any, new: Any) -> list[tuple[str, Any]]:
    return [("before", old), ("after", new)]


def _cut(text: str) -> str:
    """Model-written text on one line, control characters escaped, at most `MAX_CHARACTERS`."""
    shown = json.dumps(text[:MAX_CHARACTERS], ensure_ascii=False)
    return shown + " ..." if len(text) > MAX_CHARACTERS else shown


def _fence(text: str) -> list[str]:
    """A Markdown block that no run of backticks in `text` can end."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    ticks = "`" * max(3, longest + 1)
    return [f"{ticks}text", text, ticks]
