"""Whether two runs may be compared: the same questions, asked in the same way, graded by the same code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MUST_AGREE = (
    "task",
    "task_version",
    "grader_version",
    "data_fingerprint",
    "template_hash",
    "seed_scheme",
    "quantization",
    "dtype",
    "control",
)
"""Fields of a run's description that decide its score, beside `sampling`; the model and the adapter may differ."""
SHOWN = 3
"""Items named in a message."""

Description = Mapping[str, Any]
Prompts = Mapping[str, str]


class Mismatch(ValueError):
    """Two runs are not comparable; `mismatches` lists all reasons."""

    def __init__(self, mismatches: list[str]) -> None:
        lines = "".join(f"\n  {reason}" for reason in mismatches)
        super().__init__(
            f"these runs differ in more than the model:{lines}\n"
            "Run both again with the same settings, or compare anyway with --allow-mismatch (the report will say so)."
        )
        self.mismatches = mismatches


def check_comparable(
    a: Description, b: Description, prompts_a: Prompts | None = None, prompts_b: Prompts | None = None
) -> list[str]:
    """All mismatches of two run descriptions, in words; [] when the runs may be compared.

    A description is the JSON beside a store: the fields `MUST_AGREE` and `sampling`, a dict in which every field counts
    (K is `samples`, the token limit `max_new_tokens`). A field that both lack is not checked; one that a single side lacks
    is a mismatch. `prompts`: item id -> prompt hash, given for both sides or neither (ValueError).
    """
    if (prompts_a is None) != (prompts_b is None):
        raise ValueError("check_comparable: prompts of one side only")
    found = [_differ(name, a, b) for name in MUST_AGREE]
    first, second = a.get("sampling") or {}, b.get("sampling") or {}
    found += [_differ(name, first, second, "sampling.") for name in sorted({*first, *second})]
    if prompts_a is not None and prompts_b is not None:
        found += _prompts(prompts_a, prompts_b)
    return [reason for reason in found if reason]


def require_comparable(
    a: Description,
    b: Description,
    prompts_a: Prompts | None = None,
    prompts_b: Prompts | None = None,
    allow_mismatch: bool = False,
) -> list[str]:
    """`check_comparable`, raising `Mismatch` unless there is none or `allow_mismatch`; returns what the report must show."""
    found = check_comparable(a, b, prompts_a, prompts_b)
    if found and not allow_mismatch:
        raise Mismatch(found)
    return found


def _differ(name: str, a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> str | None:
    missing = "not recorded"
    first, second = a.get(name, missing), b.get(name, missing)
    return None if first == second else f"{prefix}{name}: {first} against {second}"


def _prompts(a: Prompts, b: Prompts) -> list[str | None]:
    changed = [item for item in a if item in b and a[item] != b[item]]
    return [
        _items("item ids: only in the first run", [item for item in a if item not in b]),
        _items("item ids: only in the second run", [item for item in b if item not in a]),
        _items("prompt hashes: other prompts for", changed),
    ]


def _items(what: str, items: list[str]) -> str | None:
    if not items:
        return None
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{what} {', '.join(items[:SHOWN])}{more}"
