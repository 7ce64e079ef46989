"""Comparison of runs that other tools made: sample files of lm-eval and details of lighteval.

lm-eval: `samples_<task>_<time>.jsonl`, with `results_<time>.json` beside it for the settings. lighteval:
`details_<task>_<time>.parquet`, from version 0.10 with the columns `doc`, `model_response`, `metric`, before with
`example`, `full_prompt`, `metrics`. Reading parquet needs pyarrow, which `datasets` brings.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NAME = re.compile(r"(?:samples|details)_(?P<task>.+)_(?P<time>\d{4}-\d{2}-\d{2}T[\d\-.:]+)$")


class ImportProblem(ValueError):
    """A file cannot be used; the message names it, says why, and what to do."""


@dataclass(frozen=True)
class Row:
    """One question of a foreign run: hashes of its document and of its prompt, and a score for each reply."""

    document: str
    prompt: str
    scores: tuple[float, ...]


@dataclass(frozen=True)
class ForeignRun:
    """One task of a foreign run. `settings`: what decides the score beside the model, as far as the tool recorded it."""

    path: Path
    task: str
    metric: str
    rows: Mapping[str, Row]
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_runs(path: str | Path, metric: str | None = None, choice: str | None = None) -> list[ForeignRun]:
    """All tasks in a file or a folder (searched downwards), by task name. `choice`: lm-eval's filter.

    Raises ImportProblem for no files, a task that occurs twice, repeated questions, no such metric or filter, and where
    several metrics or filters could be meant (the message lists them).
    """
    root = Path(path)
    files = [root] if root.is_file() else sorted([*root.rglob("samples_*.jsonl"), *root.rglob("details_*.parquet")])
    if not files:
        raise ImportProblem(
            f"{root}: no samples_*.jsonl of lm-eval (--log_samples) and no details_*.parquet of lighteval"
        )
    runs: dict[str, ForeignRun] = {}
    for run in (_read(file, metric, choice) for file in files):
        if run.task in runs:
            raise ImportProblem(
                f"task {run.task} occurs in {runs[run.task].path} and {run.path}: name one of the files"
            )
        runs[run.task] = run
    return list(runs.values())


def _read(path: Path, metric: str | None, choice: str | None) -> ForeignRun:
    found = _NAME.match(path.stem)
    task, time = (found["task"], found["time"]) if found else (path.stem, "")
    entries = list(_lighteval(path) if path.suffix == ".parquet" else _lm_eval(path, choice))
    name = _metric(path, [scores for *_, scores in entries], metric)
    rows: dict[str, Row] = {}
    for document, prompt, scores in entries:
        if document in rows:
            raise ImportProblem(
                f"{path}: a question occurs twice (document hash {document[:12]}); two runs in one file?"
            )
        rows[document] = Row(document, prompt, _values(path, name, scores))
    return ForeignRun(path, task, name, rows, _settings(path, task, time))


Entry = tuple[str, str, Mapping[str, Any]]
"""Document hash, prompt hash, values by metric."""


def _lm_eval(path: Path, choice: str | None) -> Iterator[Entry]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    filters = sorted({str(line.get("filter", "none")) for line in lines})
    if choice is None and len(filters) > 1:
        raise ImportProblem(f"{path}: scored by several filters; choose one of {', '.join(filters)}")
    if choice is not None and choice not in filters:
        raise ImportProblem(f"{path}: no filter {choice}; there are {', '.join(filters)}")
    for number, line in enumerate(lines, 1):
        if choice is not None and line.get("filter") != choice:
            continue
        if "doc_hash" not in line or "prompt_hash" not in line:
            raise ImportProblem(
                f"{path}, line {number}: no doc_hash or prompt_hash, so nothing to pair by: lm-eval >= 0.4.3"
            )
        named = line.get("metrics") or [key for key, value in line.items() if _numeric(value) and key != "doc_id"]
        yield line["doc_hash"], line["prompt_hash"], {name: line[name] for name in named if name in line}


def _lighteval(path: Path) -> Iterator[Entry]:
    import pyarrow.parquet as parquet

    for row in parquet.read_table(path).to_pylist():
        row = {key: _parsed(value) for key, value in row.items()}
        if "doc" in row:
            doc, response = row["doc"], row["model_response"]
            question = [doc.get("query"), doc.get("choices"), doc.get("gold_index")]
            prompt, scores = response.get("input") or doc.get("query"), row["metric"]
        elif "example" in row:
            question = [row["example"], row.get("choices"), row.get("gold_index"), row.get("gold")]
            prompt, scores = row["full_prompt"], row["metrics"]
        else:
            raise ImportProblem(
                f"{path}: neither lighteval's columns doc, metric nor example, metrics: {', '.join(row)}"
            )
        yield _hash(question), _hash(prompt), scores


def _parsed(value: Any) -> Any:
    """lighteval writes columns that do not fit one type as `str(value)`."""
    if not isinstance(value, str) or value[:1] not in "[{":
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value  # a text that begins with a bracket


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, list) and bool(value) and all(isinstance(v, int | float) for v in value)
    )


def _metric(path: Path, scores: Sequence[Mapping[str, Any]], wanted: str | None) -> str:
    names = sorted({name for row in scores for name, value in row.items() if _numeric(value)})
    if wanted in names:
        return str(wanted)
    if wanted is None and len(names) == 1:
        return names[0]
    reason = "several metrics; choose one of" if wanted is None else f"no metric {wanted}; there are"
    raise ImportProblem(f"{path}: {reason} {', '.join(names) or 'none'}")


def _values(path: Path, metric: str, scores: Mapping[str, Any]) -> tuple[float, ...]:
    value: Any = scores.get(metric)
    if not _numeric(value):
        raise ImportProblem(f"{path}: a question has no value for {metric}")
    values = tuple(float(v) for v in (value if isinstance(value, list) else [value]))
    if not all(0 <= v <= 1 for v in values):
        raise ImportProblem(f"{path}: {metric} is {values} on a question; only scores from 0 to 1 can be compared")
    return values


def _settings(path: Path, task: str, time: str) -> dict[str, Any]:
    """From lm-eval's results file of the same time: version, shots, sampling, repeats, template."""
    results = path.with_name(f"results_{time}.json")
    if not time or not results.exists():
        return {}
    found = json.loads(results.read_text(encoding="utf-8"))
    config = found.get("configs", {}).get(task, {})
    return {
        "version": found.get("versions", {}).get(task),
        "shots": found.get("n-shot", {}).get(task),
        "generation_kwargs": config.get("generation_kwargs"),
        "repeats": config.get("repeats"),
        "higher_is_better": found.get("higher_is_better", {}).get(task, {}),
        "chat_template_sha": found.get("chat_template_sha"),
        "system_instruction_sha": found.get("system_instruction_sha"),
    }
