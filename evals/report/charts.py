"""Charts as inline SVG, `WIDTH` units wide, which a phone shows unscaled: scatter, pass@k, lengths, checkpoints."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evals.report.svg import colour, drawing, element, escape, titled
from evals.report.words import count, percent
from evals.result import Curve
from evals.stats import Estimate

WIDTH, HEIGHT = 340, 250
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 10, 40
BINS = 20
"""About as many bins as a histogram has."""
MOST_POINTS, GRID = 400, 40
"""With more different points than that, a scatter plot rounds both scores to 1/40."""


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, kind=kind)


def _text(x: float, y: float, words: str, anchor: str = "middle", **attributes: object) -> str:
    return element("text", escape(words), x=x, y=y, text_anchor=anchor, **attributes)


@dataclass(frozen=True)
class Frame:
    """Values at the edges of a chart's plot area."""

    x0: float
    x1: float
    y0: float = 0.0
    y1: float = 1.0

    def x(self, value: float) -> float:
        """Horizontal place of a value."""
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x0) / (self.x1 - self.x0)

    def y(self, value: float) -> float:
        """Vertical place of a value."""
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.y0) / (self.y1 - self.y0)


def _ticks(frame: Frame) -> list[tuple[float, str]]:
    """About four steps of a share from zero to the top, in percent, at round values."""
    step = nice(frame.y1 / 4)
    return [(i * step, f"{100 * i * step:.4g}") for i in range(int(frame.y1 / step + 1e-9) + 1)]


def nice(value: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `value` (> 0)."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))


def _chart(
    name: str,
    frame: Frame,
    ticks: tuple[Sequence[tuple[float, str]], Sequence[tuple[float, str]]],
    axes: tuple[str, str],
    inside: Iterable[str],
) -> str:
    """Grid, ticks (across, up) and names of the axes around `inside`."""
    across, up = ticks
    middle = f"translate(11 {(HEIGHT - BOTTOM + TOP) / 2:.0f}) rotate(-90)"
    parts = [_line(LEFT, frame.y(v), WIDTH - RIGHT, frame.y(v), "grid") for v, _ in up]
    parts += [_text(LEFT - 6, frame.y(v) + 4, words, "end") for v, words in up]
    parts += [_text(frame.x(v), HEIGHT - BOTTOM + 16, words) for v, words in across]
    parts += [
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, axes[0], kind="axis"),
        _text(0, 0, axes[1], kind="axis", transform=middle),
    ]
    return drawing(name, [*parts, *inside], viewBox=f"0 0 {WIDTH} {HEIGHT}", kind="chart")


def _rounded(pairs: Sequence[tuple[float, float]]) -> Counter[tuple[float, float]]:
    found = Counter(pairs)
    if len(found) <= MOST_POINTS:
        return found
    return Counter((round(a * GRID) / GRID, round(b * GRID) / GRID) for a, b in pairs)


def scatter(base: Sequence[float], candidate: Sequence[float], names: tuple[str, str]) -> str:
    """Score of each question, base across and candidate up; area of a bubble = questions at that point."""
    frame = Frame(-0.04, 1.04, -0.04, 1.04)
    found = _rounded(list(zip(base, candidate, strict=True)))
    largest = max(found.values(), default=1)
    unit = min(4.0, 13 / math.sqrt(largest))
    ticks = [(v / 4, f"{25 * v}") for v in range(5)]
    parts = [_line(frame.x(v), TOP, frame.x(v), HEIGHT - BOTTOM, "grid") for v, _ in ticks]
    parts.append(_line(frame.x(0), frame.y(0), frame.x(1), frame.y(1), "diagonal"))
    for (a, b), number in sorted(found.items(), key=lambda item: -item[1]):
        kind = "bubble up" if b > a else "bubble down" if b < a else "bubble same"
        words = f"{count(number, 'question')}: {names[0]} {percent(a)}, {names[1]} {percent(b)}"
        radius = max(1.5, unit * math.sqrt(number))
        parts.append(titled("circle", words, cx=frame.x(a), cy=frame.y(b), r=radius, kind=kind))
    up = sum(b > a for a, b in zip(base, candidate, strict=True))
    down = sum(b < a for a, b in zip(base, candidate, strict=True))
    moved = f"{up} higher, {down} lower, {len(base) - up - down} equal"
    name = f"Score of each question, {names[0]} across and {names[1]} up: {moved}"
    return _chart(name, frame, (ticks, ticks), (f"{_clip(names[0])}, %", f"{_clip(names[1])}, %"), parts)


def _clip(name: str, limit: int = 30) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _band(frame: Frame, x: Sequence[float], low: Sequence[float], high: Sequence[float], kind: str) -> str:
    there = [f"{frame.x(a):.2f},{frame.y(b):.2f}" for a, b in zip(x, low, strict=True)]
    back = [f"{frame.x(a):.2f},{frame.y(b):.2f}" for a, b in zip(x, high, strict=True)]
    return element("polygon", points=" ".join(there + back[::-1]), kind=f"band {kind}")


def _polyline(frame: Frame, x: Sequence[float], y: Sequence[float], kind: str) -> str:
    places = " ".join(f"{frame.x(a):.2f},{frame.y(b):.2f}" for a, b in zip(x, y, strict=True))
    return element("polyline", points=places, kind=f"curve {kind}")


def curves(found: Sequence[tuple[int, str, Curve]], samples: int, what: str = "pass@k") -> str:
    """pass@k, or best of k, of (subject, its name, curve) over log2 k, with bands. k = K is "any of the K replies", so a maximum."""
    most = max(max(curve.k) for _, _, curve in found)
    frame = Frame(-0.1, max(math.log2(most), 1) + 0.1)
    ticks = sorted({k for _, _, curve in found for k in curve.k})
    if len(ticks) > 8:
        ticks = [k for k in ticks if k & (k - 1) == 0]
    parts = []
    for index, _, curve in found:
        x = [math.log2(k) for k in curve.k]
        parts += [
            _band(frame, x, curve.low, curve.high, colour(index)),
            _polyline(frame, x, curve.mean, colour(index)),
        ]
    for index, name, curve in found:
        for k, mean, low, high in zip(curve.k, curve.mean, curve.low, curve.high, strict=True):
            words = f"{name}, {what[:-1]}{k}: {percent(mean)} [{100 * low:.1f}, {100 * high:.1f}]"
            place = {"cx": frame.x(math.log2(k)), "cy": frame.y(mean)}
            parts.append(titled("circle", words, **place, r=3.5, kind=f"mark {colour(index)}"))
    labels = [(math.log2(k), f"{k} = K" if k == samples and k > 1 else str(k)) for k in ticks]
    label = f"{what}: " + "; ".join(f"{name} {percent(c.mean[-1])} at k = {c.k[-1]}" for _, name, c in found)
    return _chart(label, frame, (labels, _ticks(frame)), ("replies drawn, k", f"{what}, %"), parts)


def bins(lengths: Sequence[Sequence[int]]) -> tuple[float, list[list[float]]]:
    """(width of a bin, share of each subject's replies per bin). Bins start at 0 and have a round width."""
    longest = max((max(values) for values in lengths if values), default=1)
    width = max(1.0, nice(max(longest, 1) / BINS))
    number = int(longest // width) + 1
    shares = []
    for values in lengths:
        counts = Counter(int(value // width) for value in values)
        shares.append([counts[i] / max(1, len(values)) for i in range(number)])
    return width, shares


def lengths(found: Sequence[tuple[str, Sequence[int]]]) -> str:
    """Outline histograms of tokens per reply, one for each (name, lengths)."""
    width, shares = bins([values for _, values in found])
    number = len(shares[0])
    highest = max(max(share) for share in shares) or 1.0
    step = nice(highest / 4)
    frame = Frame(0, number * width, 0, min(1.0, step * math.ceil(highest / step - 1e-9)))
    parts = []
    for index, share in enumerate(shares):
        x = [edge * width for i in range(number) for edge in (i, i + 1)]
        y = [value for value in share for _ in range(2)]
        floor = [0.0] * len(y)
        parts += [_band(frame, x, floor, y, colour(index)), _polyline(frame, x, y, colour(index))]
    step = nice(number * width / 5)
    ticks = [(i * step, f"{i * step:,.0f}") for i in range(int(number * width / step + 1e-9) + 1)]
    label = "Tokens of a reply: " + "; ".join(
        f"{name} mean {sum(values) / max(1, len(values)):,.0f}" for name, values in found
    )
    return _chart(label, frame, (ticks, _ticks(frame)), ("tokens of a reply", "replies, %"), parts)


def steps(base: Estimate, checkpoints: Sequence[tuple[int, int, Estimate]]) -> str:
    """Headline over training steps: (step, subject, estimate) with intervals, and the base as a level line."""
    ordered = sorted(checkpoints)
    first, last = min(0, ordered[0][0]), ordered[-1][0]
    margin = max(last - first, 1) * 0.05
    frame = Frame(first - margin, last + margin)
    parts = [
        element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=frame.y(base.mean), y2=frame.y(base.mean), kind="curve s0"),
        _polyline(frame, [s for s, _, _ in ordered], [e.mean for _, _, e in ordered], "s1"),
    ]
    for step, _, found in ordered:
        words = f"step {step:,}: {percent(found.mean)} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
        parts.append(_line(frame.x(step), frame.y(found.low), frame.x(step), frame.y(found.high), "bar thin s1"))
        parts.append(titled("circle", words, cx=frame.x(step), cy=frame.y(found.mean), r=4, kind="mark s1"))
    every = max(1, math.ceil(len(ordered) / 6))
    ticks = [(first, f"{first:,}")] + [(step, f"{step:,}") for step, _, _ in ordered[::every] if step != first]
    label = f"Score by training step; base {percent(base.mean)}, step {last:,} {percent(ordered[-1][2].mean)}"
    return _chart(label, frame, (ticks, _ticks(frame)), ("training step", "score, %"), parts)
