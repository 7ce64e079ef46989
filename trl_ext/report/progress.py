"""Progress for people: the few numbers that matter, as a live bar in a terminal or as plain lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from trl_ext.method import Method
from trl_ext.plan import Plan

LINES = 20
"""Plain lines of a whole run, about."""
PER_METHOD = 2
"""Metrics of each method that progress shows."""
FIXED = {
    "reward": "reward",
    "rewards/accuracies": "pairs right",
    "rewards/margins": "margin",
    "entropy": "entropy",
    "completions/mean_length": "length",
}
"""TRL's metric -> what it is called here. Without a reward the loss stands first."""


def headline(entry: Mapping[str, Any], plan: Plan) -> list[tuple[str, Any]]:
    """(label, value) of one log entry: reward or loss, each reward function's mean, entropy, length, methods' own."""
    parts = {key: key.split("/")[1] for key in entry if is_reward_mean(key)}
    parts = parts if len(parts) > 1 else {}  # one part is the reward
    first = {} if "reward" in entry else {"loss": "loss"}
    names = first | {"reward": "reward"} | parts | FIXED
    for method in plan.methods:
        names |= {key: key for key in own_metrics(entry, method)[:PER_METHOD]}
    return [(label, entry[key]) for key, label in names.items() if key in entry]


def is_reward_mean(key: str) -> bool:
    """Whether a metric is one reward function's mean: "rewards/NAME/mean"."""
    return key.startswith("rewards/") and key.endswith("/mean") and key.count("/") == 2


def headline_of(method: Method) -> list[str]:
    """The metrics that a method names as its most telling ones (`headline`), under their logged names."""
    return [f"{method.name}/{name}" for name in getattr(type(method), "headline", ())]


def own_metrics(keys: Iterable[str], method: Method) -> list[str]:
    """The metrics under a method's name, its headline first, without its timings: those are in the log."""
    own = [key for key in keys if key.startswith(f"{method.name}/") and not key.endswith("_seconds")]
    first = [key for key in headline_of(method) if key in own]
    return first + [key for key in own if key not in first]


def short(value: Any) -> str:
    """Three significant digits; "nan" for a number that was not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "nan"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = max(0, round(seconds))
    minutes = f"{whole // 60 % 60}:{whole % 60:02d}"
    return minutes if whole < 3600 else f"{whole // 3600}:{minutes:0>5}"


def time_left(elapsed: float, done: int, remaining: int) -> str:
    """What is left at the mean pace of `done` steps in `elapsed` seconds; "?" before the first one."""
    return clock(elapsed / done * remaining) if done > 0 else "?"


class PlainLines:
    """One line every few steps, for logs and pipes."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total = console, total
        self.every = max(1, math.ceil(total / LINES))
        self._next = 0

    def advance(self, step: int, left: str) -> None:
        """Nothing to show between two logs."""

    def show(self, step: int, left: str, numbers: list[tuple[str, Any]]) -> None:
        """Prints the numbers when their turn has come: the first, every `every` steps, and the last."""
        if step < self._next and step < self.total:
            return
        self._next = (step // self.every + 1) * self.every
        words = " · ".join(f"{label} {short(value)}" for label, value in numbers)
        line = f"step {step}/{self.total} · {left} left · {words}"
        self.console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)

    def close(self) -> None:
        """Nothing is open."""


class _Bar(Progress):
    numbers: RenderableType = Text()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield self.numbers


class LiveBar:
    """A bar with step and time left, and the numbers on the line below it."""

    def __init__(self, console: Console, total: int) -> None:
        self.total = total
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[left]} left"),
        )
        self._bar = _Bar(*columns, console=console, refresh_per_second=4)
        self._task = self._bar.add_task("training", total=total, left="?")
        self._bar.start()

    def advance(self, step: int, left: str) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step, left=left)

    def show(self, step: int, left: str, numbers: list[tuple[str, Any]]) -> None:
        """Puts new numbers below the bar."""
        pairs = [Text.assemble((f"{label} ", "dim"), (short(value), "bold")) for label, value in numbers]
        self._bar.numbers = Columns(pairs, padding=(0, 3))  # a narrow terminal wraps between pairs, not within
        self.advance(step, left)

    def close(self) -> None:
        """Leaves the last state on the screen and gives the cursor back."""
        self._bar.stop()
