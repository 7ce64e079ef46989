"""Inline SVG that stretches with the page: well-formed XML, coloured by the style sheet, named for screen readers.

Rows place everything in percent of their width, so text and strokes keep their size. Class "s0" is the base, "s1", ...
the candidates. The charts of fixed shape are in `evals.report.charts`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evals.report.clean import visible
from evals.report.words import points

COLOURS = 6
"""Subjects with a colour of their own; the seventh shares that of the first candidate."""


def escape(text: object) -> str:
    """Foreign text made visible and safe in HTML and XML, in content and in attributes."""
    return html.escape(visible(str(text)), quote=True)


def colour(index: int) -> str:
    """Class of subject `index`."""
    return f"s{index}" if index < COLOURS else f"s{1 + (index - COLOURS) % (COLOURS - 1)}"


def element(name: str, *children: str, **attributes: object) -> str:
    """One XML element; `kind` stands for class, underscores for hyphens, children are markup."""
    names = {"kind": "class"}
    written = "".join(
        f' {names.get(key, key.replace("_", "-"))}="{escape(_short(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{written}>{''.join(children)}</{name}>"


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def titled(name: str, title: str, **attributes: object) -> str:
    """An element with a text that shows when it is pointed at."""
    return element(name, element("title", escape(title)), **attributes)


def drawing(name: str, parts: Iterable[str], **attributes: object) -> str:
    """The svg element; `name` says in words what it shows."""
    return element("svg", *parts, role="img", aria_label=name, **attributes)


@dataclass(frozen=True)
class Span:
    """The values at the left and right edge of a row; a margin of 2 % keeps marks off the edges."""

    low: float
    high: float

    def at(self, value: float) -> str:
        """Place of `value`, for instance "31.4%"."""
        return f"{2 + 96 * (value - self.low) / (self.high - self.low):.3f}%"


def span_around_zero(values: Iterable[float]) -> Span:
    """The same distance to both sides of zero, a multiple of 5 points (at least 5) that holds all values."""
    far = max((abs(value) for value in values), default=0.0)
    edge = max(0.05, math.ceil(far * 20 - 1e-9) / 20)
    return Span(-edge, edge)


def interval_row(name: str, value: float, low: float, high: float, span: Span, kind: str, zero: bool = False) -> str:
    """A mark at `value` on a bar from `low` to `high`; with `zero` a line there, else the whole range as a track."""
    first = (
        element("line", x1=span.at(0), x2=span.at(0), y1=0, y2=28, kind="zero")
        if zero
        else element("line", x1=span.at(span.low), x2=span.at(span.high), y1=14, y2=14, kind="track")
    )
    bar = element("line", x1=span.at(low), x2=span.at(high), y1=14, y2=14, kind=f"bar {kind}")
    return drawing(
        name, [first, bar, element("circle", cx=span.at(value), cy=14, r=5, kind=f"mark {kind}")], kind="row"
    )


def dots_row(name: str, means: Sequence[float], span: Span) -> str:
    """A dot for each subject on one track, joined; the base is hollow and drawn last, so that it stays in sight."""
    track = element("line", x1=span.at(span.low), x2=span.at(span.high), y1=14, y2=14, kind="track")
    join = element("line", x1=span.at(min(means)), x2=span.at(max(means)), y1=14, y2=14, kind="join")
    dots = [
        element("circle", cx=span.at(mean), cy=14, r=5, kind=f"mark {colour(i)}{'' if i else ' hollow'}")
        for i, mean in reversed(list(enumerate(means)))
    ]
    return drawing(name, [track, join, *dots], kind="row")


def spread_row(name: str, gains: Sequence[float], mean: float, low: float, high: float, span: Span) -> str:
    """Gains of training runs as dots, their mean with its interval below."""
    zero = element("line", x1=span.at(0), x2=span.at(0), y1=0, y2=34, kind="zero")
    dots = [element("circle", cx=span.at(gain), cy=9, r=4, kind="mark s1 faint") for gain in gains]
    bar = element("line", x1=span.at(low), x2=span.at(high), y1=25, y2=25, kind="bar s1")
    mark = element("circle", cx=span.at(mean), cy=25, r=5, kind="mark s1")
    return drawing(name, [zero, *dots, bar, mark], kind="row tall")


def split_bar(name: str, from_format: float, from_content: float) -> str:
    """Two parts of a change as bars from zero: end to end if both have one sign, else to either side."""
    same = from_format * from_content >= 0
    start = from_format if same else 0.0
    span = span_around_zero((from_format, from_content, from_format + from_content))

    def bar(low: float, high: float, kind: str, words: str) -> str:
        low, high = min(low, high), max(low, high)
        width = 96 * (high - low) / (span.high - span.low)
        return titled("rect", words, x=span.at(low), width=f"{width:.3f}%", y=6, height=16, kind=kind)

    parts = [
        bar(0, from_format, "format", f"format {points(from_format)}"),
        bar(start, start + from_content, "content", f"content {points(from_content)}"),
        element("line", x1=span.at(0), x2=span.at(0), y1=0, y2=28, kind="zero"),
    ]
    return drawing(name, parts, kind="row")
