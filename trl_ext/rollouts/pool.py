"""A live pool of prompts (RODS, arXiv 2606.19047): seeds stay, generated rows come and go between two epochs.

With rbar the mean progress reward of a row's rollouts, phi(r) = 4 r (1 - r), and thresholds a_lo <= a_hi <= a_retire:

    hard: rbar < a_lo      boundary: a_lo <= rbar <= a_hi      mastered: rbar > a_hi

An epoch is one pass over the pool in random order, in whole rollouts, as TRL passes over a data set. A pool is plain
data (dictionaries, lists, text, numbers), so that a checkpoint holds all of it; the functions here are all that change it,
and depend on nothing else but their arguments: every process comes to the same pool.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

HARD, BOUNDARY, MASTERED = "hard", "boundary", "mastered"
REGIONS = (HARD, BOUNDARY, MASTERED)
SEED, GENERATED = "seed", "generated"
EVERYTHING = "all"
"""Category of rows that have none."""


class Entry(TypedDict):
    """One row of the pool. `rbar`, and the epoch `seen` it is of, are those of its last observation, None before.

    `added`: the first epoch in which it may be drawn; `asked`: the epoch in which it was last a seed of synthesis;
    `parent`: the id of the row that a generated one was made from; `row`: a generated row's content, None for a seed.
    """

    origin: str
    parent: int | None
    category: str
    rbar: float | None
    seen: int | None
    added: int
    asked: int | None
    row: dict[str, Any] | None


class Candidate(TypedDict):
    """An accepted generated row that waits for its place."""

    parent: int
    category: str
    row: dict[str, Any]


class Pool(TypedDict):
    """`entries`: id -> row; a seed's id is its place in the training set, generated rows go on from there and no id comes
    twice. `queue`: oldest first. `order`, `cursor`: this epoch's ids, and how many of them were drawn."""

    entries: dict[int, Entry]
    queue: list[Candidate]
    order: list[int]
    cursor: int
    epoch: int
    next_id: int


@dataclass(frozen=True)
class Bounds:
    """a_lo, a_hi and a_retire."""

    low: float
    high: float
    retire: float


def priority(rbar: float) -> float:
    """phi(r) = 4 r (1 - r): in [0, 1], 1 at one half; a quarter of it bounds the variance of rewards in [0, 1]."""
    return 4 * rbar * (1 - rbar)


def region(rbar: float, bounds: Bounds) -> str:
    """hard, boundary or mastered; both thresholds belong to the boundary."""
    return HARD if rbar < bounds.low else MASTERED if rbar > bounds.high else BOUNDARY


def new_pool(categories: Sequence[str], seed: int) -> Pool:
    """A pool of one seed for each category named, at the start of epoch 0."""
    entries = {
        i: Entry(origin=SEED, parent=None, category=name, rbar=None, seen=None, added=0, asked=None, row=None)
        for i, name in enumerate(categories)
    }
    pool = Pool(entries=entries, queue=[], order=[], cursor=0, epoch=0, next_id=len(entries))
    _shuffle(pool, seed)
    return pool


def _shuffle(pool: Pool, seed: int) -> None:
    pool["order"] = list(pool["entries"])
    random.Random(f"pool/{seed}/{pool['epoch']}").shuffle(pool["order"])
    pool["cursor"] = 0


def epoch_over(pool: Pool, count: int) -> bool:
    """Whether fewer than `count` rows of this epoch are left."""
    return pool["cursor"] + count > len(pool["order"])


def draw(pool: Pool, count: int) -> list[int]:
    """The next `count` ids of this epoch."""
    first = pool["cursor"]
    pool["cursor"] = first + count
    return pool["order"][first : first + count]


def observe(pool: Pool, row: int, rbar: float) -> bool:
    """Notes the mean progress reward of a row's rollouts; whether it is the first one. An id that left is passed over."""
    entry = pool["entries"].get(row)
    if entry is None:
        return False
    first = entry["rbar"] is None
    entry["rbar"], entry["seen"] = rbar, pool["epoch"]
    return first


def seeds_for_synthesis(
    pool: Pool, bounds: Bounds, budget: int, quota: int | None, cooldown: int, rng: random.Random | None = None
) -> list[int]:
    """At most `budget` ids to make variants of, `quota` of each category: boundary rows, highest phi first.

    Rows observed in this epoch only, and none that were seeds in the last `cooldown` epochs. With `rng` (the control of
    the paper's ablation) they are drawn at random from all of these, whatever their region.
    """
    entries, epoch = pool["entries"], pool["epoch"]
    fresh = [
        row
        for row, e in entries.items()
        if e["seen"] == epoch and (e["asked"] is None or epoch - e["asked"] > cooldown)
    ]
    if rng is not None:
        rng.shuffle(fresh)
    else:
        fresh = [row for row in fresh if region(_rbar(entries[row]), bounds) == BOUNDARY]
        fresh.sort(key=lambda row: -priority(_rbar(entries[row])))
    return _within_quota(fresh, lambda row: entries[row]["category"], budget, quota)


def _rbar(entry: Entry) -> float:
    assert entry["rbar"] is not None
    return entry["rbar"]


def _within_quota(rows: Iterable[int], category: Callable[[int], str], budget: int, quota: int | None) -> list[int]:
    taken: list[int] = []
    counts: dict[str, int] = {}
    for row in rows:
        name = category(row)
        if len(taken) < budget and (quota is None or counts.get(name, 0) < quota):
            counts[name] = counts.get(name, 0) + 1
            taken.append(row)
    return taken


def retire(pool: Pool, bounds: Bounds, stale: int | None, seeds_too: bool, keep: int) -> list[int]:
    """Takes rows out: observed, and mastered for good (rbar > a_retire) or too hard (rbar < a_lo); their ids.

    A row without an observation stays on trial. `stale`: generated rows also leave after so many epochs. Seeds stay,
    unless `seeds_too`; at least `keep` rows remain.
    """

    def leaves(entry: Entry) -> bool:
        if entry["origin"] == SEED and not seeds_too:
            return False
        old = stale is not None and entry["origin"] == GENERATED and pool["epoch"] - entry["added"] + 1 >= stale
        rbar = entry["rbar"]
        return old or (rbar is not None and (rbar > bounds.retire or rbar < bounds.low))

    gone = [row for row, entry in pool["entries"].items() if leaves(entry)]
    gone = gone[: max(0, len(pool["entries"]) - keep)]
    for row in gone:
        del pool["entries"][row]
    return gone


def inject(pool: Pool, fraction: float, capacity: int) -> tuple[list[int], list[int]]:
    """Rows of the queue enter the next epoch, oldest first: at most floor(fraction x size of the pool) of them.

    Beyond `capacity` (P_max) generated rows, observed ones with the lowest phi leave; rows on trial are not put out, so
    no more enter than there is room beside those. Returns the ids that entered and those that were put out.
    """
    entries = pool["entries"]
    generated = [row for row, entry in entries.items() if entry["origin"] == GENERATED]
    observed = [row for row in generated if entries[row]["rbar"] is not None]
    room = capacity - (len(generated) - len(observed))
    count = max(0, min(math.floor(fraction * len(entries) + 1e-9), room, len(pool["queue"])))
    excess = max(0, len(generated) + count - capacity)
    put_out = sorted(observed, key=lambda row: priority(_rbar(entries[row])))[:excess]
    for row in put_out:
        del entries[row]
    entering = pool["queue"][:count]
    del pool["queue"][:count]
    return [_enter(pool, candidate) for candidate in entering], put_out


def _enter(pool: Pool, candidate: Candidate) -> int:
    row = pool["next_id"]
    pool["next_id"] = row + 1
    pool["entries"][row] = Entry(
        origin=GENERATED,
        parent=candidate["parent"],
        category=candidate["category"],
        rbar=None,
        seen=None,
        added=pool["epoch"] + 1,
        asked=None,
        row=candidate["row"],
    )
    return row


def next_epoch(pool: Pool, seed: int) -> None:
    """The next pass begins, over the rows that are there now."""
    pool["epoch"] += 1
    _shuffle(pool, seed)


def shares(pool: Pool, bounds: Bounds) -> dict[str, float]:
    """Region -> its share of the rows that were observed at least once; empty before the first observation."""
    found = [region(entry["rbar"], bounds) for entry in pool["entries"].values() if entry["rbar"] is not None]
    return {name: found.count(name) / len(found) for name in REGIONS} if found else {}


def generated(pool: Pool) -> int:
    """How many generated rows are in the pool."""
    return sum(entry["origin"] == GENERATED for entry in pool["entries"].values())
