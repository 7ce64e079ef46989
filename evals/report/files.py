"""The report as files: results.json (lm-eval's layout and ours), report.html, report.md; and back from results.json."""

from __future__ import annotations

import json
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evals.report.clean import gated_texts, publishable, scrub, withhold
from evals.report.html import page
from evals.report.markdown import markdown
from evals.report.words import default_title
from evals.result import Result

SECTION = "trl_ext"
"""The key of our part in results.json; all others are lm-eval's."""


class Files(NamedTuple):
    """Where the report was written."""

    results: Path
    page: Path
    card: Path


def write(folder: str | Path, result: Result, lm_eval_results: Mapping[str, Any] | None = None) -> Files:
    """results.json, report.html and report.md in `folder`, which is made if need be; each appears whole or not at all.

    `lm_eval_results`: what lm-eval's `simple_evaluate` returned; its keys stand at the top level of results.json, but
    for "samples". Without gated texts, machine paths, tokens and sources of functions. All three texts are made before
    the first is written. Raises ValueError for an infinite number, which JSON cannot say; NaN becomes null.
    """
    foreign = publishable_results(lm_eval_results or {}, result)
    result = publishable(result)
    plain = _without_nan({**foreign, SECTION: result.as_json()})
    # ASCII, so that lone surrogates of a reply survive
    data = json.dumps(plain, indent=1, allow_nan=False) + "\n"
    folder = Path(folder)
    files = Files(folder / "results.json", folder / "report.html", folder / "report.md")
    contents = (data, page(result, default_title(result)), markdown(result))
    encoded = [content.encode("utf-8") for content in contents]
    for path, content in zip(files, encoded, strict=True):
        write_whole(path, content)
    return files


def publishable_results(lm_eval_results: Mapping[str, Any], result: Result) -> Any:
    """lm-eval's dictionary as JSON may hold it: without gated texts, machine paths, tokens, sources and NaN."""
    return _without_nan(withhold(scrub(lm_eval_results), gated_texts(result)))


def write_whole(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: whoever reads `path` meets the old or the new file, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


def load(path: str | Path) -> Result:
    """The `Result` of a results.json (or of the folder that holds it), equal to the one that was written.

    Raises ValueError when the file is not JSON, has no part of ours, or does not fit this version.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); is it the results.json of an evaluation?") from None
    if not isinstance(content, dict) or SECTION not in content:
        raise ValueError(f"{path}: no key {SECTION!r}, so this report was not written by `trl-ext eval`; run it again")
    try:
        return _build(Result, content[SECTION], SECTION)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; it was written by another version, so evaluate again") from None


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` from JSON as `kind`: dataclasses, tuples, mappings, unions with None, plain types. NaN was null."""
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _build(next(a for a in inner if a is not type(None)), value, where)
    if origin is tuple:
        _expect(isinstance(value, list), where, "a list", value)
        if inner[-1] is Ellipsis:
            return tuple(_build(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        _expect(len(value) == len(inner), where, f"{len(inner)} values", value)
        return tuple(_build(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(inner, value, strict=True)))
    if origin is Mapping:
        _expect(isinstance(value, dict), where, "an object", value)
        return {key: _build(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float:
        _expect(
            value is None or (isinstance(value, int | float) and not isinstance(value, bool)), where, "a number", value
        )
        return math.nan if value is None else value
    _expect(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), where, kind.__name__, value)
    return value


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), where, "an object", value)
    names = [field.name for field in fields(kind)]
    if set(value) != set(names):
        wrong = sorted(set(value) ^ set(names))
        raise ValueError(f"{where}: missing or unknown {', '.join(wrong)}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _build(hints[name], value[name], f"{where}.{name}") for name in names})


def _expect(right: bool, where: str, what: str, value: Any) -> None:
    if not right:
        raise ValueError(f"{where}: expected {what}, found {type(value).__name__}")
