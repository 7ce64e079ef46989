"""Small pieces of markup that the page is made of. Plain text goes in, escaped markup comes out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

from evals.report import svg, words
from evals.report.svg import element, escape
from evals.result import TaskResult

CHIPS = {"better": ("▲ ", "better"), "worse": ("▼ ", "worse")}
NUMBER = '<td class="number"'


def number(text: str) -> str:
    """A cell that is aligned to the right, with a true minus sign."""
    return element("td", escape(text.replace("-", "−")), kind="number")


def value_range(value: str, whole: str) -> str:
    """`whole` = `value` and its interval; the interval is set back."""
    rest = element("span", escape(whole.removeprefix(value).replace("-", "−")), kind="range")
    return escape(value.replace("-", "−")) + rest


def ranged(value: str, whole: str) -> str:
    """A cell with a number and its interval."""
    return element("td", value_range(value, whole), kind="number")


def chip(verdict: str) -> str:
    """The verdict with a mark, so that its colour is not needed."""
    mark, kind = CHIPS.get(verdict, ("", "none"))
    return element("span", mark + escape(verdict), kind=kind)


def table(caption: str, head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in a box of its own that scrolls on narrow screens; cells are markup, the first of a row its heading."""
    rows = [list(cells) for cells in body]
    right = [bool(rows) and all(line[i].startswith(NUMBER) for line in rows) for i in range(len(head))]
    top = [
        element("th", escape(text), scope="col", **({"kind": "number"} if aligned else {}))
        for text, aligned in zip(head, right, strict=True)
    ]
    lines = []
    for first, *rest in rows:
        cells = [cell if cell.startswith("<td") else element("td", cell) for cell in rest]
        lines.append(element("tr", element("th", first, scope="row"), *cells))
    grid = element("table", element("thead", element("tr", *top)), element("tbody", *lines))
    return element("div", grid, kind="scroll", role="region", aria_label=caption, tabindex=0)


def line_of(name: str, plot: str, value: str) -> str:
    """A line of name, plot (markup) and value (markup); on a phone the plot stands below the two others."""
    parts = (element("div", escape(name), kind="name"), plot, element("div", value, kind="value"))
    return element("div", *parts, kind="line")


def row(name: str, plot: str, value: str, whole: str) -> str:
    """A line whose value is a number with its interval."""
    return line_of(name, plot, value_range(value, whole))


def ends(*texts: str) -> str:
    """What the left edge, the middle and the right edge of the plots above mean."""
    return element("div", element("div", *(element("span", text) for text in texts), kind="ends"), kind="line")


def key(subjects: Sequence[tuple[int, str]]) -> str:
    """The legend of subjects."""
    return element("ul", *(element("li", escape(name), kind=svg.colour(i)) for i, name in subjects), kind="key")


def notes(texts: Sequence[str]) -> str:
    """What a reader must know, as a list; nothing for none."""
    return element("ul", *(element("li", escape(text)) for text in texts), kind="notes") if texts else ""


def labels(task: TaskResult) -> str:
    """ "generated" and "gated", beside a task's name."""
    made = [" " + element("span", words.GENERATED, kind="label")] if task.generated else []
    return "".join(made + ([" " + element("span", "gated", kind="label plain")] if task.gated else []))


def anchor(task: TaskResult) -> str:
    """The id of a task's section; unique also where two names differ in signs only."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", task.name)
    tail = "" if plain == task.name else "-" + hashlib.sha256(task.name.encode("utf-8", "replace")).hexdigest()[:6]
    return f"task-{plain}{tail}"
