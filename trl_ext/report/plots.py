"""The picture of a run: learning curves, and each method's own metrics on axes of their own."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from trl_ext.plan import Plan
from trl_ext.report.evaluation import MEASURES, Evaluation
from trl_ext.report.files import Entry, series
from trl_ext.report.progress import headline_of, is_reward_mean, own_metrics

WIDTH_INCHES, DPI = 12, 100
COLUMNS = 4
PER_METHOD = 8
"""Metrics of one method in the picture; the log holds all."""
COLOURS = ("#1f6feb", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#5c940d", "#0b7285", "#495057")
SMOOTH_FROM = 30
"""Points from which a curve gets a running mean over a tenth of its length."""

NOISE = 0.05
"""Relative range below which a method's metric counts as constant."""


@dataclass(frozen=True)
class Panel:
    """One plot: metric -> label. `share`: the values are shares, so the axis is 0 to 1."""

    title: str
    unit: str
    lines: Mapping[str, str]
    share: bool = False


def panels(entries: Sequence[Entry]) -> list[Panel]:
    """The panels that the log has numbers for."""
    keys = dict.fromkeys(key for entry in entries for key in entry)
    parts = {key: key.split("/")[1] for key in keys if is_reward_mean(key)}
    shares = all(0 <= v <= 1 for key in parts for v in series(entries, key)[1] if not math.isnan(v))
    pairs = {f"rewards/{name}": name for name in ("chosen", "rejected", "margins")}
    reward = f"Reward: {', '.join(parts.values())}" if len(parts) == 1 else "Reward"
    wanted = [
        Panel(reward, "mean over completions", {"reward": "reward"}, share=shares and len(parts) == 1),
        Panel("Parts of the reward", "mean over completions", parts if len(parts) > 1 else {}, share=shares),
        Panel("Implicit reward of pairs", "reward", pairs),
        Panel("Pairs ranked right", "share of pairs", {"rewards/accuracies": "share"}, share=True),
        Panel("Entropy", "nats per token", {"entropy": "entropy"}),
        Panel("Completion length", "tokens, mean", {"completions/mean_length": "length"}),
    ]
    if not {"reward", "rewards/margins"} & keys.keys():
        wanted.insert(0, Panel("Loss", "loss", {"loss": "loss"}))
    present = [Panel(p.title, p.unit, {k: v for k, v in p.lines.items() if k in keys}, p.share) for p in wanted]
    return [panel for panel in present if panel.lines]


def method_metrics(entries: Sequence[Entry], plan: Plan) -> dict[str, list[str]]:
    """Method -> at most `PER_METHOD` of its metrics: its headline, then those that move, since a flat line says least."""
    keys = list(dict.fromkeys(key for entry in entries for key in entry))
    chosen = {}
    for method in plan.methods:
        own = own_metrics(keys, method)
        kept = sorted(own, key=lambda key: key not in headline_of(method) and _flat(entries, key))[:PER_METHOD]
        chosen[method.name] = [key for key in own if key in kept]
    return {name: metrics for name, metrics in chosen.items() if metrics}


def _flat(entries: Sequence[Entry], key: str) -> bool:
    return len(set(series(entries, key)[1])) < 2


def curves(
    entries: Sequence[Entry], plan: Plan, before: Evaluation | None, after: Evaluation | None, title: str
) -> bytes | None:
    """The picture as PNG, `WIDTH_INCHES` x `DPI` pixels wide; None when there is nothing to draw.

    On top the held-out problems before and after and TRL's curves, below each method's metrics, one axis for each.
    """
    main, own = panels(entries), method_metrics(entries, plan)
    count = len(main) + (before is not None and after is not None)
    rows = [2.9 * math.ceil(count / 2)] if count else []
    rows += [0.4 + 2.1 * math.ceil(len(metrics) / COLUMNS) for metrics in own.values()]
    if not rows:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, sum(rows) + 0.6), dpi=DPI, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=14, fontweight="bold")
    if len(entries) >= SMOOTH_FROM:
        figure.supxlabel("thin: each log; thick: running mean over a tenth of the run", fontsize=9, color="#495057")
    parts = list(figure.subfigures(len(rows), 1, squeeze=False, height_ratios=rows).flat)
    if count:
        axes = _grid(parts.pop(0), count, 2)
        if before is not None and after is not None:
            _held_out(axes.pop(0), before, after)
        for ax, panel in zip(axes, main, strict=True):
            _draw(ax, entries, panel)
    for part, (name, metrics), colour in zip(parts, own.items(), _colours(len(own)), strict=True):
        _method(part, entries, name, metrics, colour)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def _grid(part: SubFigure, count: int, columns: int) -> list[Axes]:
    axes = list(part.subplots(math.ceil(count / columns), columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.axis("off")
    return axes[:count]


def _draw(ax: Axes, entries: Sequence[Entry], panel: Panel) -> None:
    for (key, label), colour in zip(panel.lines.items(), _colours(len(panel.lines)), strict=True):
        _curve(ax, *series(entries, key), colour, label)
    if panel.share:
        ax.set_ylim(-0.03, 1.03)
    _dress(ax, panel.title, panel.unit)
    if len(panel.lines) > 1:
        ax.legend(fontsize=9, frameon=False)


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _curve(ax: Axes, steps: Sequence[int], values: Sequence[float], colour: str, label: str) -> None:
    """The values; when there are many, thin, with their running mean on top."""
    if len(values) < SMOOTH_FROM:
        ax.plot(steps, values, color=colour, marker="o", markersize=3, label=label)
        return
    ax.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
    ax.plot(steps, running_mean(values, len(values) // 10 | 1), color=colour, linewidth=2, label=label)


def running_mean(values: Sequence[float], width: int) -> NDArray[np.float64]:
    """Centred mean over `width` values, fewer at the ends; NaN values are left out of it."""
    x, kernel = np.asarray(values, dtype=float), np.ones(width)
    known = np.isfinite(x)
    count = np.convolve(known, kernel, "same")
    total = np.convolve(np.where(known, x, 0), kernel, "same")
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _held_out(ax: Axes, before: Evaluation, after: Evaluation) -> None:
    """Mean and 95 % interval of both measures, before and after, joined by a line."""
    for i, (measure, colour) in enumerate(zip(MEASURES, _colours(len(MEASURES)), strict=True)):
        found = [before.estimate(measure), after.estimate(measure)]
        means, places = [100 * e.mean for e in found], np.array([0, 1]) + 0.06 * (i - 0.5)
        errors = [[100 * (e.mean - e.low) for e in found], [100 * (e.high - e.mean) for e in found]]
        ax.errorbar(places, means, errors, color=colour, marker="o", capsize=4, linewidth=2, label=measure)
        for x, mean, side in zip(places, means, (-1, 1), strict=True):
            ax.annotate(
                f"{mean:.1f}",
                (x, mean),
                xytext=(side * 10, 0),
                textcoords="offset points",
                ha="right" if side < 0 else "left",
                va="center",
                fontsize=10,
                color=colour,
            )
    _dress(ax, f"Held-out problems (n = {len(before.problems)})", "% of replies, 95% interval")
    ax.set(xlim=(-0.4, 1.4), ylim=(-3, 103), xticks=[0, 1], xlabel="")
    ax.set_xticklabels(["before training", "after training"], fontsize=10)
    ax.legend(fontsize=9, frameon=False, loc="best")


def _method(part: SubFigure, entries: Sequence[Entry], name: str, metrics: Sequence[str], colour: str) -> None:
    part.suptitle(f"method {name}", fontsize=12, fontweight="bold", x=0.01, ha="left", color=colour)
    for ax, key in zip(_grid(part, len(metrics), COLUMNS), metrics, strict=True):
        _curve(ax, *series(entries, key), colour, key)
        _dress(ax, key.removeprefix(f"{name}/"), "")
        ax.title.set_fontsize(10)
        low, high = ax.get_ylim()
        if high - low < NOISE * abs(low + high) / 2:  # rounding must not look like a trend
            ax.set_ylim(low * (1 - NOISE), high * (1 + NOISE))


def _dress(ax: Axes, title: str, unit: str) -> None:
    ax.set_title(title, fontsize=12, loc="left")
    ax.set_xlabel("optimizer step", fontsize=9)
    ax.set_ylabel(unit, fontsize=10)
    ax.tick_params(labelsize=9)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
