"""What the cards claim about a method, as numbers of the learning bench: each is confirmed, contradicted, or not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tests.bench.learning_report import (
    ACCURACY,
    BASELINE,
    ENTROPY,
    Metric,
    Runs,
    difference,
    distance,
    early,
    logged,
    over_seeds,
    paired,
    rise,
    tail,
    wobble,
)


@dataclass(frozen=True)
class Claim:
    """`text` in the card's words. `metric` of the method's arm is compared with that of `against`, by seed; `against` a
    number: with that number. `expected`: on which side it should lie; "not below": the interval must not lie below.
    """

    text: str
    metric: Metric
    expected: Literal["above", "below", "not below"]
    against: str | float = BASELINE


def _nats(name: str, read: Any) -> Metric:
    return Metric(name, "nats", read)


NOT_WORSE = Claim("accuracy not below GRPO's", ACCURACY, "not below")
ENTROPY_TARGET = 0.2  # of recipes/sandbox_dcpo.yaml
CLAIMS: Mapping[str, Sequence[Claim]] = {
    "dgpo": (
        NOT_WORSE,
        Claim(
            "the policy moves away from the reference", Metric("rise of d_mean", "", rise("dgpo/d_mean")), "above", 0
        ),
        Claim("entropy does not collapse", ENTROPY, "not below"),
        Claim("steadier gradient norm", Metric("wobble of grad_norm", "", wobble("grad_norm")), "below"),
    ),
    "dcpo": (
        NOT_WORSE,
        Claim(
            "entropy settles nearer to H0",
            _nats("distance of entropy to H0", distance("entropy", ENTROPY_TARGET)),
            "below",
        ),
        Claim("higher entropy than without the second ratio", ENTROPY, "above", "one temperature"),
    ),
    "capo": (
        Claim("accuracy above GRPO's where GRPO collapses", ACCURACY, "above"),
        Claim(
            "rejects under 8% of the tokens", Metric("rejected", "%", logged("capo/rejected"), 100, 1), "below", 0.08
        ),
        Claim("under 2% at the end", Metric("rejected at the end", "%", tail("capo/rejected"), 100, 1), "below", 0.02),
        Claim("accuracy above the same run without rejections", ACCURACY, "above", "nothing rejected"),
    ),
    "velocity_rank": (
        NOT_WORSE,
        Claim(
            "effective rank not below the same run without bonus",
            Metric("effective rank at the end", "", tail("velocity_rank/er")),
            "not below",
            "no bonus",
        ),
        Claim(
            "right answers accelerate more",
            Metric(
                "ERA of right minus wrong", "", difference("velocity_rank/era_right", "velocity_rank/era_wrong"), 1, 4
            ),
            "above",
            0,
        ),
        Claim(
            "ER and ERV nearly uncorrelated (below 0.3)",
            Metric("correlation of ER and ERV", "", logged("velocity_rank/er_erv_correlation")),
            "below",
            0.3,
        ),
    ),
    "pgpo": (
        NOT_WORSE,
        Claim("dependency on the evidence rises", _nats("rise of mean S", rise("pgpo/dependency")), "above", 0),
        Claim("accuracy above that without Eq. 7", ACCURACY, "above", "mass not kept"),
    ),
    "d3s": (
        NOT_WORSE,
        Claim(
            "uses fewer than 20% of the tokens",
            Metric("token_use", "%", logged("d3s/token_use"), 100, 1),
            "below",
            0.2,
        ),
        Claim(
            "more of the kept rollouts have A != 0",
            Metric(
                "share with A != 0, kept minus all",
                "points",
                difference("d3s/nonzero_kept", "d3s/nonzero_before"),
                100,
                1,
            ),
            "above",
            0,
        ),
        Claim("larger gradient norm early", Metric("early grad_norm", "", early("grad_norm")), "above"),
        Claim("reward rises faster", Metric("early reward", "", early("reward")), "above"),
        Claim("the schedule ends above the fixed aggressive rate", ACCURACY, "above", "no schedule"),
    ),
    "epo": (
        NOT_WORSE,
        Claim("the corridor keeps the bonus from blowing up: accuracy", ACCURACY, "above", "bonus alone"),
        Claim("the corridor keeps the bonus from blowing up: entropy", ENTROPY, "below", "bonus alone"),
        Claim("steadier entropy than GRPO's", _nats("wobble of entropy", wobble("entropy")), "below"),
        Claim(
            "steadier entropy than with the bonus alone",
            _nats("wobble of entropy", wobble("entropy")),
            "below",
            "bonus alone",
        ),
        Claim("higher entropy than GRPO's", ENTROPY, "above"),
    ),
}
"""Method -> its card's claims ("What a user would see") as far as the sandbox can show them."""


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
    """ "confirmed", "contradicted" or "not seen" for an interval [low, high] against `level`; "no loss seen" when it should
    not lie below and does not.
    """
    if low is None or high is None:
        return "one seed only"
    above, below = low > level, high < level
    if expected == "not below":
        return "contradicted" if below else "no loss seen"
    holds, opposite = (above, below) if expected == "above" else (below, above)
    return "confirmed" if holds else "contradicted" if opposite else "not seen"
