"""Answers graded per second, against the libraries that the graders stand on.

Every reply of a kind is different, since math-verify keeps its last results and would look faster than it is. The
graders run with their isolation: math-verify in a worker that can be killed. The reference is math-verify in this
process with its own time limits, and a compiled validator of jsonschema behind `json.loads`.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

from tests.bench.common import machine, machine_text, say, table

Case = tuple[str, str]  # reply, gold
COUNTS = {"integers": 1500, "fractions": 1500, "equal surds": 400, "unequal surds": 150, "long thoughts": 600}
SCHEMA = {
    "type": "object",
    "properties": {
        "reasoning": {"type": "string", "minLength": 1},
        "answer": {"type": "number"},
        "steps": {"type": "array", "items": {"$ref": "#/$defs/step"}},
        "day": {"type": "string", "format": "date"},
    },
    "required": ["reasoning", "answer"],
    "additionalProperties": False,
    "$defs": {"step": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}},
}
REPLIES = 20_000


def math_cases(kind: str, count: int) -> list[Case]:
    """`count` replies with golds, half of them right; surds are all of one kind, for which the cost differs most."""
    return [_math_case(kind, n, right=n % 2 == 0) for n in range(count)]


def _math_case(kind: str, n: int, right: bool) -> Case:
    shift = 0 if right else 1
    if kind == "integers":
        return f"Step {n}: we add. So the result is $\\boxed{{{n + shift}}}$.", str(n)
    if kind == "fractions":
        return f"Thus $\\boxed{{\\frac{{{n + 1 + shift}}}{{{n + 7}}}}}$.", f"{n + 1}/{n + 7}"
    if kind == "equal surds":
        return f"Thus $\\boxed{{{n + 2}\\sqrt{{2}}}}$.", f"\\sqrt{{{2 * (n + 2) ** 2}}}"
    if kind == "unequal surds":
        return f"Thus $\\boxed{{{n + 2}\\sqrt{{3}}}}$.", f"\\sqrt{{{2 * (n + 2) ** 2}}}"
    return "".join(f"Try {i + n}, which fails. " for i in range(400)) + f"\\boxed{{{n + shift}}}", str(n)


def grade_all(cases: Sequence[Case]) -> float:
    """Seconds that our grader takes, its worker running already."""
    from evals.graders.math import equal, grade_math

    equal("\\sqrt{2}+0", "\\sqrt{2}")
    started = time.perf_counter()
    for text, gold in cases:
        grade_math(text, gold)
    return time.perf_counter() - started


def grade_all_in(processes: int, cases: Sequence[Case]) -> float:
    """The same with the cases dealt to several processes, each with its own worker: the slowest one's time."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return max(pool.map(grade_all, [cases[i::processes] for i in range(processes)], chunksize=1))


def verify_all(cases: Sequence[Case]) -> float:
    """Seconds that math-verify takes for parse and verify, with its default time limits."""
    from math_verify import parse, verify

    verify(parse("$1$"), parse("$\\frac{1}{2}$"))
    started = time.perf_counter()
    for text, gold in cases:
        verify(parse(f"\\boxed{{{gold}}}"), parse(text))
    return time.perf_counter() - started


def json_replies(count: int) -> list[str]:
    """Replies of which a third is invalid by the schema and a third stands in a fence."""
    replies = []
    for n in range(count):
        value: dict[str, Any] = {
            "reasoning": f"{n} plus {n} is {2 * n}, so there are {2 * n} apples.",
            "answer": 2 * n,
        }
        value |= {"steps": [{"n": n}, {"n": n + 1}], "day": "2024-02-29" if n % 3 else "2023-02-29"}
        text = json.dumps(value)
        replies.append(f"```json\n{text}\n```" if n % 3 == 1 else text)
    return replies


def structured_all(replies: Sequence[str]) -> float:
    """Seconds for all structured metrics."""
    from evals.graders.schema import Schema
    from evals.graders.structured import grade_structured

    schema = Schema(SCHEMA)
    golds = [{"reasoning": "", "answer": 2 * n} for n in range(len(replies))]
    started = time.perf_counter()
    for text, gold in zip(replies, golds, strict=True):
        grade_structured(text, schema, gold, answer_key="answer")
    return time.perf_counter() - started


def validity_all(replies: Sequence[str]) -> float:
    """Seconds for strict JSON and validity alone, by our loader and the compiled schema."""
    from evals.graders.schema import Schema
    from evals.graders.strict_json import load_tolerant

    schema = Schema(SCHEMA)
    started = time.perf_counter()
    for text in replies:
        parsed = load_tolerant(text)
        _ = parsed.ok and schema.valid(parsed.value)
    return time.perf_counter() - started


def jsonschema_all(replies: Sequence[str]) -> float:
    """Seconds for `json.loads` and jsonschema's validator, compiled once, formats asserted, on unfenced texts."""
    import jsonschema

    validator = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker())
    bare = [text.removeprefix("```json\n").removesuffix("\n```") for text in replies]
    started = time.perf_counter()
    for text in bare:
        validator.is_valid(json.loads(text))
    return time.perf_counter() - started


def measure_math(scale: float) -> dict[str, dict[str, float]]:
    """Replies per second by kind: one and two processes of ours, and math-verify."""
    result = {}
    for kind, most in COUNTS.items():
        cases = math_cases(kind, max(20, int(most * scale)))
        ways: dict[str, Callable[[], float]] = {
            "one": lambda cases=cases: grade_all(cases),
            "two": lambda cases=cases: grade_all_in(2, cases),
            "math_verify": lambda cases=cases: verify_all(cases),
        }
        result[kind] = {"replies": len(cases)} | {name: len(cases) / way() for name, way in ways.items()}
        say(kind)
    return result


def measure_json(scale: float) -> dict[str, float]:
    """Replies per second: all our metrics, our validity alone, jsonschema alone."""
    replies = json_replies(max(100, int(REPLIES * scale)))
    ways = {"metrics": structured_all, "validity": validity_all, "jsonschema": jsonschema_all}
    return {"replies": len(replies)} | {name: len(replies) / way(replies) for name, way in ways.items()}


def report(result: dict[str, Any]) -> str:
    """The two tables and the machine, as Markdown."""
    rows = []
    for kind, r in result["math"].items():
        rates = [f"{r[name]:,.0f}" for name in ("one", "two", "math_verify")]
        rows.append([kind, *rates, *(f"{r[name] / r['math_verify']:.1f}x" for name in ("one", "two"))])
    head = ["replies per second", "1 process", "2 processes", "math-verify", "1 / math-verify", "2 / math-verify"]
    s = result["json"]
    ours = [
        [name, f"{s[name]:,.0f}", f"{s[name] / s['jsonschema']:.1f}x"]
        for name in ("metrics", "validity", "jsonschema")
    ]
    parts = [
        table(head, rows),
        table(["JSON", "replies per second", "/ jsonschema"], ours),
        machine_text(result["machine"]),
    ]
    return "\n\n".join(parts)


def measure(scale: float) -> dict[str, Any]:
    """Both halves; `scale` sets the number of replies."""
    logging.disable(logging.WARNING)
    return {"machine": machine(), "math": measure_math(scale), "json": measure_json(scale)}
