"""The model in training annotates its own rollouts (TRACE card: online self-annotation variant)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trl_ext.annotate.answers import annotate_with
from trl_ext.annotate.base import Request, Span


@dataclass(frozen=True)
class PolicyAnnotator:
    """An annotator on top of `generate`: conversations in, one answer text each out.

    `generate` is called once per batch, and not at all when no request has segments. Greedy decoding and thinking off
    are its business. `stats` counts since the start: `requests`, `parse_failures`, `seconds`.
    """

    generate: Callable[[list[list[dict[str, str]]]], list[str]]
    stats: dict[str, float] = field(
        default_factory=lambda: {"requests": 0, "parse_failures": 0, "seconds": 0.0}, init=False, compare=False
    )

    def __call__(self, requests: Sequence[Request]) -> list[list[Span]]:
        """Spans of each request, in order. Raises ValueError if `generate` returns a wrong number of answers."""
        return annotate_with(self.generate, requests, self.stats)
