"""The picture of the learning bench: curves over steps, mean and 95% interval over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.bench.common import t_interval
from tests.bench.learning_report import Run, Runs

Curve = list[tuple[int, float]]
SMOOTH = 5  # steps in the running mean of what is logged at every step


def held_out(key: str) -> Callable[[Run], Curve]:
    """Percent at each evaluation."""
    return lambda run: [(int(e["step"]), 100 * e[key]) for e in run["held_out"]]


def logged(key: str) -> Callable[[Run], Curve]:
    """A logged number by step, as a running mean."""
    return lambda run: running_mean([(i + 1, v) for i, v in enumerate(run["log"].get(key, [])) if v is not None])


def lifted(key: str) -> Callable[[Run], Curve]:
    """A lift by step, as a running mean."""
    return lambda run: running_mean([(i + 1, s[key]) for i, s in enumerate(run["lift"]) if key in s])


def running_mean(curve: Curve, width: int = SMOOTH) -> Curve:
    """Each value becomes the mean of itself and up to width - 1 values before it."""
    values = [v for _, v in curve]
    means = [sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(values))]
    return [(step, mean) for (step, _), mean in zip(curve, means, strict=True)]


PANELS: Sequence[tuple[str, Callable[[Run], Curve]]] = (
    ("held-out accuracy, %", held_out("accuracy")),
    ("held-out JSON validity, %", held_out("valid")),
    ("training accuracy", logged("rewards/answer_correct/mean")),
    ("entropy, nats", logged("entropy")),
    ("completion length, tokens", logged("completions/mean_length")),
    ("lift of error tokens per step, nats", lifted("error_lift")),
)


def band(curves: Sequence[Curve]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps, mean, low and high over the curves, at the steps that all of them have."""
    tables = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(t) for t in tables)))
    found = [t_interval([t[s] for t in tables]) for s in steps]
    lows = [i.mean if i.low is None else i.low for i in found]
    highs = [i.mean if i.high is None else i.high for i in found]
    return steps, [i.mean for i in found], lows, highs


def draw(runs: Runs, path: Path, foot: str) -> None:
    """Writes the picture as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.4))
    for axis, (title, read) in zip(axes.flat, PANELS, strict=True):
        for number, (arm, own) in enumerate(runs.items()):
            steps, mean, low, high = band([read(run) for run in own.values()])
            axis.plot(steps, mean, color=f"C{number}", label=arm, linewidth=1.6)
            axis.fill_between(steps, low, high, color=f"C{number}", alpha=0.18, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.text(0.01, 0.01, foot, fontsize=7, color="0.35")
    figure.tight_layout(rect=(0, 0.03, 1, 0.94))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
