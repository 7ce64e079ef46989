"""Outer loops that call trainers: `loop: {NAME: settings}` in a recipe. One explicit table, nothing registered by import.

For scripts that play episodes between two roles themselves: `Episode`, `role_rows`, `capped`, `balance`, with an example
in `trl_ext.loops.labels`.
"""

from __future__ import annotations

from typing import Any

from trl_ext.loops.dstc_settings import Dstc
from trl_ext.loops.iterative_settings import Iterative
from trl_ext.loops.labels import Episode, balance, capped, role_labels, role_rows
from trl_ext.loops.settings import PasoDoble
from trl_ext.plan import cast_settings, did_you_mean, normalise

__all__ = ["LOOPS", "Episode", "Loop", "LoopError", "balance", "capped", "make_loop", "role_labels", "role_rows"]
Loop = PasoDoble | Iterative | Dstc
LOOPS: dict[str, type[Loop]] = {cls.name: cls for cls in (PasoDoble, Iterative, Dstc)}


def make_loop(spec: Any) -> Loop | None:
    """The settings object for `loop: spec` (a name, or a mapping of one name to settings); None for none.

    Raises ValueError with `problems` when the loop or a setting is unknown or out of range.
    """
    wanted = normalise(spec)
    if not wanted:
        return None
    problems = [f"unknown loop '{name}'{did_you_mean(name, LOOPS)} (known: {', '.join(LOOPS)})" for name in wanted]
    problems = [problem for problem, name in zip(problems, wanted, strict=True) if name not in LOOPS]
    if len(wanted) > 1:
        problems.append(f"name one loop, not {len(wanted)}")
    if problems:
        raise LoopError(problems)
    ((name, settings),) = wanted.items()
    found = cast_settings(LOOPS[name], settings)  # type: ignore[arg-type]
    if found.problems:
        raise LoopError([f"{name}: {problem}" for problem in found.problems])
    return LOOPS[name](**found.values)


class LoopError(ValueError):
    """A loop that cannot be made from its settings; `problems` lists every reason."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))
