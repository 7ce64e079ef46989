"""What the learning bench says: means over seeds with 95% t intervals, paired differences, and sentences from them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.common import Interval, machine_text, t_interval, table

BASELINE = "grpo"
WINDOW = 40  # optimizer steps of TRACE's default window
Run = Mapping[str, Any]
Runs = Mapping[str, Mapping[int, Run]]  # arm -> seed -> run


@dataclass(frozen=True)
class Metric:
    """A number of one run: how to read it, its unit, and the factor and digits with which it is shown."""

    name: str
    unit: str
    read: Callable[[Run], float | None]
    scale: float = 1.0
    digits: int = 3
    verb: str = "is"


def _held(key: str, at: int = -1) -> Callable[[Run], float]:
    return lambda run: run["held_out"][at][key]


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of what is there; None when nothing is."""
    there = [v for v in values if v is not None and math.isfinite(v)]
    return statistics.fmean(there) if there else None


def tail(name: str) -> Callable[[Run], float | None]:
    """Mean of a logged number over the last tenth of the steps."""

    def read(run: Run) -> float | None:
        values = run["log"].get(name, [])
        return mean_of(values[-max(1, len(values) // 10) :])

    return read


def logged(name: str) -> Callable[[Run], float | None]:
    return lambda run: mean_of(run["log"].get(name, []))


def early(name: str) -> Callable[[Run], float | None]:
    """Mean of a logged number over the first quarter of the steps."""

    def read(run: Run) -> float | None:
        values = run["log"].get(name, [])
        return mean_of(values[: max(1, len(values) // 4)])

    return read


def rise(name: str) -> Callable[[Run], float | None]:
    """Mean over the last tenth of the steps minus that over the first."""

    def read(run: Run) -> float | None:
        values = run["log"].get(name, [])
        first, last = mean_of(values[: max(1, len(values) // 10)]), tail(name)(run)
        return None if first is None or last is None else last - first

    return read


def wobble(name: str) -> Callable[[Run], float | None]:
    """SD of a logged number's change from step to step, over the second half of the steps."""

    def read(run: Run) -> float | None:
        values = [v for v in run["log"].get(name, []) if v is not None]
        late = values[len(values) // 2 :]
        changes = [b - a for a, b in itertools.pairwise(late)]
        return statistics.pstdev(changes) if changes else None

    return read


def difference(one: str, other: str) -> Callable[[Run], float | None]:
    """Mean of one logged number minus that of another."""

    def read(run: Run) -> float | None:
        values = mean_of(run["log"].get(one, [])), mean_of(run["log"].get(other, []))
        return None if None in values else values[0] - values[1]  # type: ignore[operator]

    return read


def distance(name: str, target: float) -> Callable[[Run], float | None]:
    """How far a logged number ends from a target."""

    def read(run: Run) -> float | None:
        value = tail(name)(run)
        return None if value is None else abs(value - target)

    return read


def _lift(name: str) -> Callable[[Run], float | None]:
    """Mean over the optimizer steps of the window."""
    return lambda run: mean_of([step.get(name) for step in run["lift"][:WINDOW]])


def _mass(kind: str) -> Callable[[Run], float | None]:
    """Mean |change| inside spans over that outside, in the window."""

    def read(run: Run) -> float | None:
        inside, outside = _lift(f"{kind}_mass")(run), _lift("outside_mass")(run)
        return inside / outside if inside is not None and outside else None

    return read


ACCURACY = Metric("held-out accuracy", "points", _held("accuracy"), 100, 1, "ends")
VALID = Metric("JSON validity", "points", _held("valid"), 100, 1, "ends")
ENTROPY = Metric("entropy at the end", "nats", tail("entropy"))
LENGTH = Metric("completion length at the end", "tokens", tail("completions/mean_length"), 1, 1)
TRAINING = Metric("training accuracy at the end", "points", tail("rewards/answer_correct/mean"), 100, 1)
MAIN = (ACCURACY, VALID, TRAINING, ENTROPY, LENGTH)
LIFTS = (
    Metric("lift of error tokens per step", "nats", _lift("error_lift"), 1, 4),
    Metric("lift of key tokens per step", "nats", _lift("key_lift"), 1, 4),
    Metric("lift of teacher-supported key tokens per step", "nats", _lift("key_lift_supported"), 1, 4),
)
MASSES = (
    Metric("update mass, error tokens over outside", "times", _mass("error"), 1, 2),
    Metric("update mass, key tokens over outside", "times", _mass("key"), 1, 2),
)
BEFORE = (
    Metric("held-out accuracy before", "points", _held("accuracy", 0), 100, 1),
    Metric("JSON validity before", "points", _held("valid", 0), 100, 1),
)


def over_seeds(runs: Mapping[int, Run], metric: Metric) -> Interval | None:
    """The metric's mean and interval over the seeds that have it."""
    values = [v for v in map(metric.read, runs.values()) if v is not None]
    return t_interval(values) if values else None


def paired(runs: Runs, arm: str, other: str, metric: Metric) -> Interval | None:
    """Mean and interval of arm - other over the seeds that both have."""
    pairs = [(metric.read(runs[arm][s]), metric.read(runs[other][s])) for s in runs[arm] if s in runs[other]]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    return t_interval(differences) if differences else None


def sentence(arm: str, other: str, metric: Metric, found: Interval) -> str:
    """What the interval allows to say, and no more."""
    shown = found.text(metric.scale, metric.digits, plus=True)
    if found.low is None or found.high is None:
        return f"{arm} against {other}, {metric.name}: {shown} {metric.unit}, one seed, so no interval."
    seeds = f"(95% interval over {found.n} seeds)"
    if found.sign == 0:
        return f"{arm} against {other}, {metric.name}: no difference could be told, {shown} {metric.unit} {seeds}."
    side = "above" if found.sign > 0 else "below"
    low, high = sorted((abs(found.low), abs(found.high)))
    shown = Interval(abs(found.mean), low, high, found.n).text(metric.scale, metric.digits)
    return f"{arm} {metric.verb} {shown} {metric.unit} {side} {other} in {metric.name} {seeds}."


def verdict(runs: Runs) -> list[str]:
    """Sentences: every arm against plain GRPO, ablations against their method, and the cards' claims."""
    lines = []
    for arm in runs:
        if arm == BASELINE:
            continue
        for metric in (ACCURACY, VALID, ENTROPY, LENGTH):
            lines += _compared(runs, arm, BASELINE, metric)
        parent = arm.split(",")[0]
        if parent != arm and parent in runs:
            for metric in (ACCURACY, ENTROPY, LENGTH):
                lines += _compared(runs, parent, arm, metric)
        lines += _spans(runs, arm) if arm.startswith("trace") else []
        lines += _entropies(runs[arm], arm)
    return lines


def _compared(runs: Runs, arm: str, other: str, metric: Metric) -> list[str]:
    found = paired(runs, arm, other, metric)
    return [sentence(arm, other, metric, found)] if found else []


def _spans(runs: Runs, arm: str) -> list[str]:
    """Lift and update mass while the KL is on, against plain GRPO on its own rollouts."""
    lines = [line for metric in LIFTS for line in _compared(runs, arm, BASELINE, metric)]
    for metric in MASSES:
        own, base = over_seeds(runs[arm], metric), over_seeds(runs[BASELINE], metric)
        if own and base:
            lines.append(f"{metric.name}: {arm} {own.text(1, 2)}, {BASELINE} {base.text(1, 2)} times.")
    return lines


def _entropies(runs: Mapping[int, Run], arm: str) -> list[str]:
    kept, dropped = (
        over_seeds(runs, Metric(name, "nats", logged(f"high_entropy/entropy_{name}"))) for name in ("kept", "dropped")
    )
    if not kept or not dropped:
        return []
    return [f"{arm}: mean entropy of kept tokens {kept.text()}, of dropped ones {dropped.text()} nats."]


def summary(runs: Runs) -> dict[str, Any]:
    """Every metric of every arm, and its paired difference to plain GRPO, as plain numbers."""
    metrics = (*BEFORE, *MAIN, *LIFTS, *MASSES)
    return {
        arm: {
            metric.name: {
                "mean": _plain(over_seeds(own, metric)),
                "minus_grpo": _plain(paired(runs, arm, BASELINE, metric)) if arm != BASELINE else None,
            }
            for metric in metrics
        }
        for arm, own in runs.items()
    }


def _plain(interval: Interval | None) -> list[float | None] | None:
    return None if interval is None else [interval.mean, interval.low, interval.high]


def tables(runs: Runs) -> str:
    """Means with intervals, then differences to plain GRPO."""
    parts = [_table(runs, (*BEFORE, *MAIN), lambda arm, m: over_seeds(runs[arm], m), plus=False)]
    others = {arm: own for arm, own in runs.items() if arm != BASELINE}
    if others and BASELINE in runs:
        words = f"Paired differences to {BASELINE}, by seed:"
        parts += [words, _table(others, (*MAIN, *LIFTS), lambda arm, m: paired(runs, arm, BASELINE, m), plus=True)]
    return "\n\n".join(parts)


def _table(runs: Runs, metrics: Sequence[Metric], read: Callable[[str, Metric], Interval | None], plus: bool) -> str:
    """Metrics down, arms across."""
    rows = []
    for metric in metrics:
        found = [read(arm, metric) for arm in runs]
        cells = [i.text(metric.scale, metric.digits, plus) if i else "" for i in found]
        if any(cells):
            rows.append([f"{metric.name}, {metric.unit}", *cells])
    return table(["", *runs], rows)


def markdown(result: Mapping[str, Any]) -> str:
    """The stored result as text: tables, verdict, conditions."""
    return "\n\n".join([result["tables"], "\n".join(f"- {line}" for line in result["verdict"]), foot(result)])


def foot(result: Mapping[str, Any]) -> str:
    """One sentence with the conditions of a stored result."""
    about = result["about"]
    return (
        f"{len(about['seeds'])} seeds, {about['steps']} steps, {about['eval_rows']} held-out problems, equal rollouts; "
        f"means with 95% t intervals over seeds. {machine_text(result['machine'])}."
    )
