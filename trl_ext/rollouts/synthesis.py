"""New rows from seed rows: what is asked, who makes it, what is accepted, and a line on disk for each attempt.

A synthesiser gets `Ask`s and makes one `Offer` for each; offers are vetted, and what was refused is asked for again a
few times. Every attempt has a number that never comes twice in a run and seeds its random numbers. The main process
alone does this; the others get the result.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from trl_ext.rollouts.pool import Candidate
from trl_ext.rollouts.vetting import ACCEPTED, Vetting, with_question
from trl_ext.sandbox import tasks
from trl_ext.sandbox.problems import hints

Synthesize = Callable[[Mapping[str, Any], Mapping[str, Any], int, random.Random], Sequence[dict[str, Any]]]
"""synthesize(seed_row, stats, n, rng) -> at most n new rows with the seed's columns; `stats`: `SeedStats`."""


class SeedStats(TypedDict):
    """What is known of a seed row: its mean progress reward, phi of it, its category, and the epoch."""

    rbar: float
    priority: float
    category: str
    epoch: int


@dataclass(frozen=True)
class Ask:
    """One variant that is wanted of a seed row. `refused`: why the attempt before was, None for the first one."""

    number: int
    parent: int
    row: Mapping[str, Any]
    stats: SeedStats
    attempt: int = 0
    refused: str | None = None


@dataclass(frozen=True)
class Offer:
    """A new row, or why there is none. `notes`: more for the record, such as what a judge said."""

    row: dict[str, Any] | None
    refused: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


class Made(TypedDict):
    """Accepted rows, the number of attempts, and of refused ones."""

    accepted: list[Candidate]
    attempts: int
    refused: int


Make = Callable[[Sequence[Ask]], Sequence[Offer]]


def synthesise(
    asks: Sequence[Ask],
    make: Make,
    vetting: Vetting,
    repairs: int,
    note: Callable[[list[dict[str, Any]]], None],
    limit: int | None = None,
) -> Made:
    """Makes and vets one row for each ask, asking again at most `repairs` times (K_max) for what was refused.

    At most `limit` attempts in all. `note` gets the records of each round as soon as it is over, so that what breaks the next one loses nothing.
    """
    made = Made(accepted=[], attempts=0, refused=0)
    first, waiting = (asks[0].number if asks else 0), list(asks)
    while waiting:
        offers = make(waiting)
        records = [_record(ask, offer, vetting) for ask, offer in zip(waiting, offers, strict=True)]
        note(records)
        made["attempts"] += len(records)
        refused = []
        for ask, record in zip(waiting, records, strict=True):
            if record["verdict"] == ACCEPTED:
                made["accepted"].append(
                    Candidate(parent=ask.parent, category=ask.stats["category"], row=record["row"])
                )
            else:
                refused.append((ask, record["verdict"]))
        made["refused"] += len(refused)
        number = itertools.count(first + made["attempts"])
        waiting = [
            dataclasses.replace(ask, number=next(number), attempt=ask.attempt + 1, refused=verdict)
            for ask, verdict in refused
            if ask.attempt < repairs
        ]
        if limit is not None:
            waiting = waiting[: max(0, limit - made["attempts"])]
    return made


def _record(ask: Ask, offer: Offer, vetting: Vetting) -> dict[str, Any]:
    """A line of the provenance file, but for what the run adds; a refused row that is not JSON is left out."""
    row = offer.row
    verdict = offer.refused or vetting.verdict(row, ask.row)
    if verdict == ACCEPTED or not verdict.startswith(("not JSON", "columns")):
        row = json.loads(json.dumps(row))
    else:
        row = None
    return {
        "number": ask.number,
        "parent": ask.parent,
        "attempt": ask.attempt,
        "verdict": verdict,
        **offer.notes,
        "stats": dict(ask.stats),
        "row": row,
    }


def append_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Adds lines to the provenance file, in order of `number`.

    Lines from the first new number on are dropped: they are of a run that went on from this point before and was cut
    off. So is a last line that was not written to its end.
    """
    if not records:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in before if _number(line) < records[0]["number"]]
    lines = [*kept, *(json.dumps(record) for record in records)]
    temporary = path.with_suffix(".part")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _number(line: str) -> float:
    try:
        return int(json.loads(line)["number"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def from_function(synthesize: Synthesize, seed: int) -> Make:
    """A synthesiser that calls a function once for all variants of one seed row. ValueError if it returns more rows."""

    def make(asks: Sequence[Ask]) -> list[Offer]:
        offers: list[Offer] = []
        for _, same in itertools.groupby(asks, lambda ask: ask.parent):
            group = list(same)
            rng = random.Random(f"rods/{seed}/{group[0].number}")
            rows = list(synthesize(dict(group[0].row), dict(group[0].stats), len(group), rng))
            if len(rows) > len(group):
                raise ValueError(f"the synthesiser returned {len(rows)} rows, asked for {len(group)}")
            offers += [Offer(row) for row in rows]
            offers += [Offer(None, "nothing was returned")] * (len(group) - len(rows))
        return offers

    return make


def sandbox(
    seed_row: Mapping[str, Any], stats: Mapping[str, Any], n: int, rng: random.Random
) -> Sequence[dict[str, Any]]:
    """Sandbox problems of the seed's level with its operations in its order, other numbers, names and things.

    Never of the held-out split. ValueError for rows that are not of `sandbox/math` or `sandbox/tool`.
    """
    if seed_row.get("kind") not in ("math", "tool"):
        raise ValueError(
            "rods: the sandbox synthesiser makes rows of sandbox/math and sandbox/tool; for other data set synthesizer to "
            "your module.function, or to the fields of an endpoint"
        )
    operations = seed_row["hints"][0]
    stream = (p for p in tasks.problems(rng, "train", int(seed_row["level"])) if hints(p)[0] == operations)
    return [_like(seed_row, tasks.math_row(p, seed_row["kind"])) for p in itertools.islice(stream, n)]


def _like(seed_row: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """The new columns over the seed's, and the new question in the seed's own prompt (a recipe may add to it)."""
    prompt = with_question(seed_row["prompt"], seed_row["problem"], made["problem"])
    return {**seed_row, **{key: value for key, value in made.items() if key in seed_row}, "prompt": prompt}


def seed_texts(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Their prompts as one text each; a row without a text prompt has none to compare."""
    return [text for row in rows if isinstance(text := _prompt_text(row), str)]


def _prompt_text(row: Mapping[str, Any]) -> Any:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else prompt[-1].get("content")
