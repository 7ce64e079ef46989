"""What an annotator is: the data that goes in, the data that comes out, and the label tables.

An annotator reads numbered pieces of a solution and its 0/1 verdict, and answers with at most three short spans,
each with one coarse type label. Source: TRACE, arXiv 2605.10194, card step 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Order matters: teacher notes list labels in the order of these tables (card: step 3).
ERROR_TYPES: tuple[str, ...] = (
    "missed_case",
    "illegal_step",
    "wrong_constraint",
    "wrong_equivalence",
    "premature_conclusion",
    "format_error",
    "arithmetic_slip",
    "sign_error",
    "off_by_one",
)
STEP_TYPES: tuple[str, ...] = (
    "case_split",
    "boundary_check",
    "invariant",
    "substitution",
    "constraint_use",
    "symmetry",
    "construction_step",
    "final_verification",
    "key_formula",
    "insight",
)
MAX_SPANS = 3  # per rollout (card: hyperparameters)
MAX_SEGMENTS_PER_SPAN = 3  # consecutive segment ids (card: hyperparameters)


class AnnotatorError(RuntimeError):
    """The annotator as a whole does not work (wrong address, wrong key, every request failed)."""


class RefusedError(AnnotatorError):
    """The server read every request of a batch and wanted none: their texts are at fault, or the settings."""


@dataclass(frozen=True)
class Request:
    """One rollout to annotate.

    `segments[i]` is the text of segment `i`; `correct` is the verdict R; `row` is the dataset row of the prompt,
    which only rule-based annotators read (it is never sent to a model).
    """

    problem: str
    segments: tuple[str, ...]
    correct: bool
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Span:
    """One to three consecutive segment ids and a label: from `ERROR_TYPES` if R=0, from `STEP_TYPES` if R=1."""

    segment_ids: tuple[int, ...]
    label: str


# One list of spans per request, in the order of the requests; an empty list leaves that rollout to plain GRPO.
Annotator = Callable[[Sequence[Request]], list[list[Span]]]


def label_table(correct: bool) -> tuple[str, ...]:
    """The labels that fit a verdict: `STEP_TYPES` for a right rollout, `ERROR_TYPES` for a wrong one."""
    return STEP_TYPES if correct else ERROR_TYPES
