"""What several processes do together: hear of each other's values, and fail as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from trl_ext.rewards.time_limit import TimeUp, with_others

T = TypeVar("T")


def distributed() -> bool:
    """Whether there are other processes to talk to."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gathered(values: list[Any]) -> list[Any]:
    """Those of all processes, in their order."""
    from accelerate.utils import gather_object

    with with_others():
        return list(gather_object(values))


def on_all(make: Callable[[], T], who: str = "it", error: type[Exception] = RuntimeError) -> T:
    """`make()`, each process its own, before something that they do together. What it raises on one, all hear of: the
    others, where they would wait, raise `error`, which names `who` and the process."""
    if not distributed():
        return make()
    problem: BaseException | None = None
    try:
        made = make()
    except (Exception, TimeUp) as raised:
        problem = raised
    failed = gathered([problem is not None])
    if problem is not None:
        raise problem
    if any(failed):
        raise error(f"{who} failed on process {failed.index(True)}, which says what was wrong")
    return made
