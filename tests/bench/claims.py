"""What the cards claim about a method, as numbers of the learning bench: each is confirmed, contradicted, or not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tests.bench.learning_report import BASELINE, Metric, Runs, over_seeds, paired


@dataclass(frozen=True)
class Claim:
    """`text` in the card's words. `metric` of the method's arm is compared with that of `against`, by seed; `against` a
    number: with that number. `expected`: on which side it should lie; "not below": the interval must not lie below.
    """

    text: str
    metric: Metric
    expected: Literal["above", "below", "not below"]
    against: str | float = BASELINE


CLAIMS: Mapping[str, Sequence[Claim]] = {}


def check(runs: Runs, method: str) -> list[dict[str, Any]]:
    """Each claim with the difference found, its 95% t interval over seeds, and the outcome."""
    found = []
    for claim in CLAIMS[method]:
        control = f"{method}, {claim.against}" if f"{method}, {claim.against}" in runs else claim.against
        if isinstance(control, str) and control not in runs:
            continue  # an ablation that was not asked for
        found.append(_checked(runs, method, claim, control))
    return found


def _checked(runs: Runs, method: str, claim: Claim, control: str | float) -> dict[str, Any]:
    if isinstance(control, str):
        interval = paired(runs, method, control, claim.metric)
    else:
        interval = over_seeds(runs[method], claim.metric)
    if interval is None:
        return {"text": claim.text, "metric": claim.metric.name, "against": control, "outcome": "not measured"}
    level = 0.0 if isinstance(control, str) else control
    scale, digits = claim.metric.scale, claim.metric.digits
    return {
        "text": claim.text,
        "metric": claim.metric.name,
        "against": control,
        "expected": claim.expected,
        "found": interval.text(scale, digits, plus=isinstance(control, str)) + f" {claim.metric.unit}",
        "outcome": outcome(claim.expected, interval.low, interval.high, level),
    }


def outcome(expected: str, low: float | None, high: float | None, level: float) -> str:
    """ "confirmed", "contradicted" or "not seen" for an interval [low, high] against `level`."""
    if low is None or high is None:
        return "one seed only"
    above, below = low > level, high < level
    if expected == "not below":
        return "contradicted" if below else "confirmed"
    holds, opposite = (above, below) if expected == "above" else (below, above)
    return "confirmed" if holds else "contradicted" if opposite else "not seen"
