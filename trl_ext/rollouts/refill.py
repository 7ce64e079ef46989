"""Groups without a signal are replaced by groups of fresh prompts, in rounds, within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def has_signal(rewards: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """(P, G) -> (P,) bool: not all rewards of the group are equal, and low <= their mean <= high where these are given.

    Equal means equal, not a small standard deviation: that of equal numbers need not be zero in floating point. NaN is
    a completion that nobody scored, which has no advantage either.
    """
    unscored = rewards.isnan()
    found = rewards.masked_fill(unscored, -torch.inf).amax(1) > rewards.masked_fill(unscored, torch.inf).amin(1)
    mean = rewards.nanmean(1)
    if low is not None:
        found &= mean >= low
    if high is not None:
        found &= mean <= high
    return found


@dataclass(frozen=True)
class Refill:
    """`taken`: place -> number of the fresh group that goes there; `left`: places for which the budget gave none.

    `rounds` that were made, and `made` groups in all of them, numbered 0, 1, ... in the order in which they were made.
    """

    taken: dict[int, int]
    left: tuple[int, ...]
    rounds: int
    made: int


def refill(
    missing: Sequence[int],
    make: Callable[[int], Tensor],
    rounds: int,
    oversample: float = 1.0,
    most: int | None = None,
) -> Refill:
    """Fills `missing` places with fresh groups that have a signal, the first ones first.

    `make(n)` makes at most n groups and says which of them have a signal, bool (made,). Each of at most `rounds` rounds
    asks for `oversample` times as many as are still missing, rounded up, and for `most` at most.

    >>> refill([2, 5], lambda n: torch.tensor([False, True, True])[:n], rounds=2, oversample=1.5)
    Refill(taken={2: 1, 5: 2}, left=(), rounds=1, made=3)
    """
    left, taken, made, used = list(missing), {}, 0, 0
    while left and used < rounds:
        wanted = math.ceil(oversample * len(left))
        good = make(wanted if most is None else min(wanted, most))
        for number in torch.nonzero(good).flatten().tolist():
            if left:
                taken[left.pop(0)] = made + number
        made, used = made + len(good), used + 1
    return Refill(taken, tuple(left), used, made)
