"""How well a reply follows a JSON Schema, and whether its content is right: RL-Struct's metrics and stricter ones.

What is judged is the text as it stands if that is JSON (the raw form), else the text after the thought, without one
surrounding fence (the tolerant form). No Unicode normalisation. Source: EVALS.md section 5, RL-Struct (2512.00319).
"""

from __future__ import annotations

import json
import re
from fractions import Fraction
from typing import Any

from evals.graders import rl_struct
from evals.graders.math import canonical, equal_numbers, numbers
from evals.graders.repair import repaired
from evals.graders.rl_struct import Style
from evals.graders.schema import ITEMS, Path, Schema
from evals.graders.strict_json import load, load_inner
from evals.graders.text import after_thought
from evals.graders.values import MAX_ANSWER
from evals.task import Grade, Metric

STRUCTURED_METRICS: dict[str, Metric] = {
    "valid_and_correct": Metric("Passes the schema and has the right answer."),
    "json_validity": Metric("JSON after removal of a thought and of one surrounding code fence."),
    "json_validity_raw": Metric("JSON as it stands, nothing removed."),
    "schema_valid": Metric("JSON that passes the schema, formats asserted."),
    "structural_accuracy": Metric("Each required key stands in the text as a quoted key (RL-Struct, Eq. 1)."),
    "structural_accuracy_strict": Metric("Each required key is in the parsed value, in its place."),
    "key_recall": Metric("Required keys that are present, by path (RL-Struct: schema compliance); 0 if not JSON."),
    "key_precision": Metric("Keys that the schema allows, by path; 0 if not JSON, 1 for a value without keys."),
    "type_accuracy": Metric("Required keys that are present with a value of the right type; 0 if not JSON."),
    "hallucination_rate": Metric(
        "Keys that the schema does not have, of all keys in all replies that are JSON.",
        higher_is_better=False,
        ratio=("keys_invented", "keys_all"),
    ),
    "format_consistency": Metric("Keeps to the form that was asked for: bare JSON, or a code block tagged json."),
    "answer_accuracy": Metric("The answer equals the gold answer, whatever the rest of the value is."),
    "answer_accuracy_lenient": Metric("The same after repair of broken JSON: the difference is the cost of format."),
    "content_f1": Metric("Token F1 of the values (RL-Struct, Eq. 4); 0 if not JSON."),
}
NEEDS_GOLD = ("valid_and_correct", "answer_accuracy", "answer_accuracy_lenient", "content_f1")
"""Metrics that a task without gold values does not have."""
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "number": (int, float),
}


def grade_structured(
    text: str, schema: Schema, gold: Any, *, style: Style = "raw", answer_key: str | None = None
) -> Grade:
    """Metrics `STRUCTURED_METRICS`; with `gold` None only those that need none (`NEEDS_GOLD`).

    `answer_key`: the key whose value is the answer; None: the whole value is. Its canonical text is the vote. A number
    may be written as a string ("1,200", "$18", "18%"). Never raises on any text.
    """
    raw = load(text)
    parsed = raw if raw.ok else load_inner(text)
    visible = text if raw.ok else after_thought(text) or ""
    value = parsed.value
    passes = parsed.ok and schema.valid(value)
    follows = float(raw.ok) if style == "raw" else rl_struct.form(visible, style) / 0.8
    scores = {
        "json_validity": float(parsed.ok),
        "json_validity_raw": float(raw.ok),
        "schema_valid": float(passes),
        "structural_accuracy": rl_struct.struct(visible, schema.required_keys),
        "format_consistency": follows,
        **_key_scores(schema, value, parsed.ok),
    }
    if gold is not None:
        scores |= _content_scores(visible, value, parsed.ok, passes, gold, answer_key)
    return Grade(scores, _vote(_answer(value, answer_key)) if parsed.ok else None)


def _key_scores(schema: Schema, value: Any, ok: bool) -> dict[str, float]:
    names = ("structural_accuracy_strict", "key_recall", "key_precision", "type_accuracy")
    if not ok:
        return dict.fromkeys((*names, "keys_invented", "keys_all"), 0.0)
    present = [path for path in schema.required if values_at(value, path)]
    right = [path for path in present if all(has_type(v, schema.required[path]) for v in values_at(value, path))]
    invented, total = schema.key_counts(value)
    count = len(schema.required)
    return {
        "structural_accuracy_strict": float(len(present) == count),
        "key_recall": len(present) / count if count else 1.0,
        "key_precision": 1 - invented / total if total else 1.0,
        "type_accuracy": len(right) / count if count else 1.0,
        "keys_invented": float(invented),
        "keys_all": float(total),
    }


def values_at(value: Any, path: Path) -> list[Any]:
    """The values at a key path; none if it is missing anywhere, as in one of the elements of an array."""
    found = [value]
    for part in path:
        if part == ITEMS and found and all(isinstance(v, list) and v for v in found):
            found = [element for v in found for element in v]
        elif found and all(isinstance(v, dict) and part in v for v in found):
            found = [v[part] for v in found]
        else:
            return []
    return found


def has_type(value: Any, types: frozenset[str] | None) -> bool:
    """JSON Schema's types: 1.0 is an integer, true is no number. None: any type."""
    if types is None:
        return True
    if isinstance(value, bool):
        return "boolean" in types
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return ("integer" in types and whole) or any(isinstance(value, _TYPES.get(name, ())) for name in types)


def _content_scores(
    visible: str, value: Any, ok: bool, passes: bool, gold: Any, answer_key: str | None
) -> dict[str, float]:
    wanted = _answer(gold, answer_key)
    right = ok and _answers_equal(_answer(value, answer_key), wanted)
    lenient = right or (not ok and _answers_equal(_answer(repaired(visible), answer_key), wanted))
    return {
        "answer_accuracy": float(right),
        "answer_accuracy_lenient": float(lenient),
        "content_f1": rl_struct.content_f1(value, gold) if ok else 0.0,
        "valid_and_correct": float(passes and right),
    }


def _answer(value: Any, key: str | None) -> Any:
    if key is None:
        return value
    return value.get(key) if isinstance(value, dict) else None


def _answers_equal(found: Any, wanted: Any) -> bool:
    """Numbers by value, also when one of them is written as a string; all else as JSON has it."""
    if found is None or wanted is None:
        return False
    if not (isinstance(found, str) and isinstance(wanted, str)):
        one, other = _numbers(found), _numbers(wanted)
        if one and other:
            return equal_numbers(one, other)
    return _json_equal(found, wanted)


def _numbers(value: Any) -> tuple[Fraction, ...]:
    """The value of a number, or of a string of digits with commas, currency or percent; nothing for all else."""
    if isinstance(value, str):
        return numbers(value) if len(value) <= MAX_ANSWER and not re.search(r"[^\W\d_]|\\", value) else ()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ()
    return (Fraction(value) if isinstance(value, int) else Fraction(repr(value)),)  # 0.1 as it was written


def _json_equal(one: Any, other: Any) -> bool:
    """Equality of JSON values: 1 is 1.0, but true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_json_equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_json_equal, one, other))
    return bool(one == other)


def _vote(answer: Any) -> str | None:
    """The answer's value as text, so that 18, 18.0 and "18" vote together."""
    if answer is None:
        return None
    found = _numbers(answer)
    if found:
        return canonical(answer) if isinstance(answer, str) else str(found[0])
    return json.dumps(answer, sort_keys=True, ensure_ascii=False)
