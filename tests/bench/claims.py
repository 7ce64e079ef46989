"""What the cards claim about a method, as numbers of the learning bench: each is confirmed, contradicted, or not seen."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tests.bench.learning_report import (
    ACCURACY,
    BASELINE,
    ENTROPY,
    TRAINING,
    Metric,
    Run,
    Runs,
    difference,
    distance,
    early,
    logged,
    mean_of,
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


def _drops(run: Run) -> float:
    """Steps at which the mean reward was more than 0.1 lower than at the step before."""
    return float(sum(after < before - 0.1 for before, after in itertools.pairwise(run["log"]["reward"])))


def _over_tau(run: Run) -> float | None:
    """How far SAFE's KL ends above its threshold; 0 below it."""
    kl, tau = tail("safe/kl")(run), tail("safe/tau")(run)
    return None if kl is None or tau is None else max(0.0, kl - tau)


def _entropy_when_active(run: Run) -> float | None:
    """Mean entropy of the steps at which SAFE's penalty was active, minus that of the others."""
    log = run["log"]
    pairs = list(zip(log["entropy"], log["safe/active"], strict=True))
    active, other = (mean_of([h for h, on in pairs if on == want]) for want in (1, 0))
    return None if active is None or other is None else active - other


def _uneven(run: Run) -> float | None:
    """How much the gradient norm changes from step to step, over its mean: losses of different scale compare."""
    changes, level = wobble("grad_norm")(run), logged("grad_norm")(run)
    return changes / level if changes is not None and level else None


def _ninety_percent(name: str, run: Run) -> int | None:
    """The step at which a moving mean over 5 steps has made nine tenths of its way from its start to its end."""
    values = [v for v in run["log"].get(name, []) if v is not None]
    means = [sum(values[i : i + 5]) / 5 for i in range(len(values) - 4)]
    if not means or means[-1] <= means[0]:
        return None  # it never rose
    aim = means[0] + 0.9 * (means[-1] - means[0])
    return next(i for i, value in enumerate(means) if value >= aim)


def _syntax_first(run: Run) -> float | None:
    """Steps by which RL-Struct's valid term is there before its correct term."""
    valid, correct = (_ninety_percent(f"rewards/rl_struct_{term}/mean", run) for term in ("valid", "correct"))
    return None if valid is None or correct is None else float(correct - valid)


def _held_ninety_percent(name: str, run: Run) -> float | None:
    """The step, between measurements by a straight line, at which a held-out share has made nine tenths of its way."""
    found = run["held_out"]
    aim = found[0][name] + 0.9 * (found[-1][name] - found[0][name])
    for before, after in itertools.pairwise(found):
        if before[name] < aim <= after[name]:
            share = (aim - before[name]) / (after[name] - before[name])
            return float(before["step"] + share * (after["step"] - before["step"]))
    return None  # it never rose


def _held_syntax_first(run: Run) -> float | None:
    """Steps by which held-out validity is there before accuracy."""
    valid, right = (_held_ninety_percent(name, run) for name in ("valid", "accuracy"))
    return None if valid is None or right is None else right - valid


def _second_half(name: str) -> Callable[[Run], float | None]:
    """Mean of a logged number over the second half of the steps."""

    def read(run: Run) -> float | None:
        values = run["log"].get(name, [])
        return mean_of(values[len(values) // 2 :])

    return read


def _variance_ratio(run: Run) -> float | None:
    """RODS: reward variance of groups in the boundary zone over that of the others, both as means over the run."""
    inside, outside = (logged(f"rods/variance_{where}")(run) for where in ("boundary", "outside"))
    return None if inside is None or not outside else inside / outside


def _rl_struct(term: str, when: str = "at the end") -> Metric:
    name = f"rewards/rl_struct_{term}/mean"
    read = tail(name) if when == "at the end" else logged(name)
    return Metric(f"{term} term {when}", "%", read, 100, 1)


def _held_at(share: float) -> Any:
    """Held-out accuracy at the measurement that lies at this share of the steps."""
    return lambda run: run["held_out"][round(share * (len(run["held_out"]) - 1))]["accuracy"]


EARLIER = Metric("held-out accuracy after two fifths", "points", _held_at(0.4), 100, 1)


def _rollouts_right(run: Run) -> float | None:
    """Share of right rollouts at the end; OTC changes the reward itself, so its own count comes first."""
    own = tail("otc/accuracy")(run)
    return tail("rewards/answer_correct/mean")(run) if own is None else own


def _productivity(run: Run) -> float | None:
    """Right rollouts per tool call at the end."""
    right, calls = _rollouts_right(run), tail("tools/call_frequency")(run)
    return right / calls if right is not None and calls else None


def _inconsistent(run: Run) -> float | None:
    """Share of valid replies at the end whose steps do not lead to the answer."""
    consistent = tail("rewards/steps_consistent/mean")(run)
    return None if consistent is None else 1 - consistent


CALLS = Metric("calls per rollout at the end", "", tail("tools/call_frequency"))
PRODUCTIVITY = Metric("right rollouts per call at the end", "", _productivity)
STEPS_TRUE = Metric("right equations at the end", "%", tail("rewards/steps_true/mean"), 100, 1)
FEWER_CALLS = (
    Claim(
        "equal accuracy, of rollouts with the tool",
        Metric("right at the end", "%", _rollouts_right, 100, 1),
        "not below",
    ),
    Claim("fewer calls than GRPO", CALLS, "below"),
    Claim("more right answers per call", PRODUCTIVITY, "above"),
)
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
    "real": (
        Claim("accuracy above GRPO's", ACCURACY, "above"),
        Claim("entropy does not collapse", ENTROPY, "not below"),
        Claim("smoother gradient norm", Metric("wobble of grad_norm over its mean", "", _uneven), "below"),
        Claim("logits of right rollouts rise above 0", _nats("s_positive", logged("real/s_positive")), "above", 0),
        Claim("logits of wrong rollouts fall below 0", _nats("s_negative", logged("real/s_negative")), "below", 0),
        Claim("accuracy above that without the anchor", ACCURACY, "above", "no anchor"),
    ),
    "group_dpo": (
        NOT_WORSE,
        Claim(
            "implicit accuracy above 0.5 early",
            Metric("early implicit_acc", "", early("group_dpo/implicit_acc")),
            "above",
            0.5,
        ),
        Claim("the weight shrinks", Metric("weight at the end", "", tail("group_dpo/weight")), "below", 0.5),
        Claim(
            "and with it the way from the reference",
            _nats("KL to the reference at the end", tail("group_dpo/kl")),
            "below",
            "mean over the group",
        ),
    ),
    "fg_expo": (
        NOT_WORSE,
        Claim(
            "fewer groups all right or all wrong than with uniform draws and a fixed KL",
            Metric("groups without variance", "%", logged("frac_reward_zero_std"), 100, 1),
            "below",
        ),
        Claim(
            "larger KL while the accuracy is low than with a fixed KL",
            _nats("early KL to the reference", early("kl")),
            "above",
        ),
    ),
    "mdpo": (
        NOT_WORSE,
        Claim("KL to the old policy falls as t falls", _nats("rise of kl_old", rise("mdpo/kl_old")), "below", 0),
        Claim(
            "ratios bounded, unlike without the KL",
            Metric("largest ratio of a completion", "", logged("mdpo/ratio_max")),
            "below",
            "no KL",
        ),
        Claim("entropy not lower than GRPO's", ENTROPY, "not below"),
    ),
    "target_surrogate": (
        NOT_WORSE,
        Claim("stable where reuse without a target diverges: accuracy", ACCURACY, "above", "no target"),
        Claim(
            "stable where reuse without a target diverges: log-ratios",
            _nats("|d|", logged("target_surrogate/d_abs")),
            "below",
            "no target",
        ),
    ),
    "safe": (
        NOT_WORSE,
        Claim("fewer reward drops of more than 0.1 than GRPO", Metric("reward drops", "steps", _drops, 1, 1), "below"),
        Claim(
            "KL near the threshold instead of drifting",
            _nats("KL above tau at the end", _over_tau),
            "below",
            "without gradient",
        ),
        Claim("lower KL", _nats("KL at the end", tail("safe/kl")), "below", "without gradient"),
        Claim(
            "the penalty acts mostly when entropy is low",
            _nats("entropy of steps with penalty minus others", _entropy_when_active),
            "below",
            0,
        ),
    ),
    "paced": (
        NOT_WORSE,
        Claim(
            "fewer wasted updates: groups without variance",
            Metric("groups without variance", "%", logged("frac_reward_zero_std"), 100, 1),
            "below",
        ),
        Claim("higher accuracy than with equal weights", ACCURACY, "above"),
    ),
    "rods": (
        NOT_WORSE,
        Claim(
            "fewer groups without variance than with static data",
            Metric("groups without variance in the second half", "%", _second_half("frac_reward_zero_std"), 100, 1),
            "below",
        ),
        Claim(
            "reward variance in the boundary zone is about twice that outside",
            Metric("variance inside over outside", "", _variance_ratio, 1, 2),
            "above",
            1.5,
        ),
        Claim(
            "new rows land in [0.25, 0.75]",
            Metric("new rows with rbar in [0.25, 0.75]", "%", logged("rods/new_in_band"), 100, 1),
            "above",
            0.5,
        ),
        Claim(
            "boundary seeds give more new rows in [0.25, 0.75] than random ones",
            Metric("new rows with rbar in [0.25, 0.75]", "%", logged("rods/new_in_band"), 100, 1),
            "above",
            "random seeds",
        ),
        Claim("accuracy above that with random seeds", ACCURACY, "above", "random seeds"),
        Claim("accuracy above that without retirement", ACCURACY, "above", "no retirement"),
        Claim("accuracy above that without new rows", ACCURACY, "above", "no injection"),
    ),
    "trace+paced": (
        Claim("higher accuracy than unweighted distillation", ACCURACY, "above", "trace"),
        Claim("steadier gradient norm", Metric("wobble of grad_norm", "", wobble("grad_norm")), "below", "trace"),
    ),
    "riskpo": (
        NOT_WORSE,
        Claim("entropy clearly higher than GRPO's", ENTROPY, "above"),
        Claim("weight on the upper tail makes the entropy collapse", ENTROPY, "above", "risk seeking"),
        Claim(
            "the lower tail is higher than with weight on the upper one",
            Metric("cvar at the end", "", tail("riskpo/cvar")),
            "above",
            "risk seeking",
        ),
        Claim(
            "prompts without a gradient in GRPO get one",
            Metric("flat prompts with a signal", "%", logged("riskpo/flat_with_signal"), 100, 1),
            "above",
            0,
        ),
    ),
    "oblr_po": (
        NOT_WORSE,
        Claim("steadier training than GRPO's", Metric("wobble of reward", "", wobble("reward")), "below"),
        Claim("rho falls as the accuracy saturates", Metric("rise of rho", "", rise("oblr_po/rho")), "below", 0),
        Claim("accuracy above that with the mean as baseline", ACCURACY, "above", "mean baseline"),
    ),
    "scaf_grpo": (
        NOT_WORSE,
        Claim("solves hard problems without hints that GRPO does not learn", TRAINING, "above"),
        Claim(
            "solves them sooner",
            Metric("early accuracy without hints", "points", early("rewards/answer_correct/mean"), 100, 1),
            "above",
        ),
        Claim(
            "questions graduate: fewer groups without a success as training goes on",
            Metric("rise of failed groups", "groups", rise("scaf_grpo/failed_groups"), 1, 1),
            "below",
            0,
        ),
        Claim("accuracy above that without the hint in the prompt", TRAINING, "above", "hint not in the prompt"),
    ),
    "dynamic_sampling": (
        NOT_WORSE,
        Claim("rises faster per optimizer step: accuracy after two fifths of the steps", EARLIER, "above"),
        Claim(
            "no groups without variance",
            Metric("groups without signal after the refill", "%", logged("dynamic_sampling/flat_after"), 100, 1),
            "below",
            0.01,
        ),
        Claim("accuracy above that with middle accuracies only", ACCURACY, "above", "middle accuracies only"),
    ),
    "otc": (
        *FEWER_CALLS,
        Claim(
            "right answers take fewer calls",
            Metric("rise of calls_correct", "", rise("otc/calls_correct")),
            "below",
            0,
        ),
        Claim("more right answers per call than without n", PRODUCTIVITY, "above", "no fewest calls"),
    ),
    "hdpo": (
        *FEWER_CALLS,
        Claim(
            "right answers take fewer calls",
            Metric("rise of calls_correct", "", rise("hdpo/calls_correct")),
            "below",
            0,
        ),
        Claim(
            "more rollouts qualify as accuracy grows",
            Metric("rise of qualifying", "points", rise("hdpo/qualifying"), 100, 1),
            "above",
            0,
        ),
        Claim("fewer calls with a stronger tool loss: the default has more", CALLS, "above", "stronger tool loss"),
    ),
    "fgrpo": (
        NOT_WORSE,
        Claim("more true steps than GRPO", STEPS_TRUE, "above"),
        Claim("fewer inconsistent replies", Metric("inconsistent at the end", "%", _inconsistent, 100, 2), "below"),
        Claim(
            "the constraint's mean climbs",
            Metric("rise of steps_true", "points", rise("fgrpo/score_steps_true"), 100, 1),
            "above",
            0,
        ),
        Claim(
            "the multiplier of a constraint that holds falls",
            Metric("rise of lambda of steps_consistent", "", rise("fgrpo/lambda_steps_consistent")),
            "below",
            0,
        ),
        Claim("more true steps than with fixed multipliers", STEPS_TRUE, "above", "fixed multipliers"),
    ),
    "rl_struct": (
        Claim(
            "syntax saturates before content: valid is at 90% of its rise before correct is",
            Metric("lead of syntax", "steps", _syntax_first, 1, 1),
            "above",
            0,
        ),
        Claim(
            "the same for held-out problems: valid JSON before right answers",
            Metric("lead of syntax, held out", "steps", _held_syntax_first, 1, 1),
            "above",
            0,
        ),
        Claim("more required keys than without the struct term", _rl_struct("struct"), "above", "without struct"),
        Claim("more valid JSON than without the valid term", _rl_struct("valid"), "above", "without valid"),
        Claim("more required keys while learning", _rl_struct("struct", "over the run"), "above", "without struct"),
        Claim("more valid JSON while learning", _rl_struct("valid", "over the run"), "above", "without valid"),
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
