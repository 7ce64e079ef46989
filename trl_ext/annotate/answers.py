"""The part that every model-backed annotator shares: requests -> prompts -> texts -> spans, with counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from trl_ext.annotate.base import Request, Span
from trl_ext.annotate.prompts import annotation_messages, parse_annotation

# A conversation per request in, one answer each out; None = no answer came.
Complete = Callable[[list[list[dict[str, str]]]], Sequence[str | None]]


def annotate_with(complete: Complete, requests: Sequence[Request], stats: dict[str, float]) -> list[list[Span]]:
    """Spans of each request, in order, from one call of `complete` for all requests that have segments.

    A request without segments, without an answer (None) or with an unreadable answer gets no spans. Adds to `stats`:
    `requests` (asked), `parse_failures` (answers that could not be read) and `seconds` (wall time).
    Raises ValueError if `complete` returns another number of answers than it got conversations.
    """
    start = time.perf_counter()
    asked = [i for i, request in enumerate(requests) if request.segments]
    answers = complete([annotation_messages(requests[i]) for i in asked]) if asked else []
    if len(answers) != len(asked):
        raise ValueError(
            f"annotator: {len(asked)} conversations but {len(answers)} answers; return one per conversation"
        )
    spans: list[list[Span]] = [[] for _ in requests]
    for i, answer in zip(asked, answers, strict=True):
        read = None if answer is None else parse_annotation(answer, len(requests[i].segments), requests[i].correct)
        spans[i] = read or []
        stats["parse_failures"] += answer is not None and read is None
    stats["requests"] += len(asked)
    stats["seconds"] += time.perf_counter() - start
    return spans
