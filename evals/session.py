"""What an evaluation asked, in one file beside its report: enough to grade its replies again without a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evals.generation.store import StoreError
from evals.report.clean import scrub
from evals.result import Skipped, Subject
from evals.task import Sampling, Source

NAME = "session.json"


@dataclass(frozen=True)
class Asked:
    """One task: where its items came from, how replies were drawn, the hash of each item's prompt, and what each subject's
    store is about, in order. `thinking`: prompts end inside an open thought, in which a reply then begins. `control`: what
    the store of the base under a grammar is about, and `controlled` the items that have one. `candidate_prompts`: the
    prompts of the second subject where two reports are compared.
    """

    task: str
    source: Source
    fingerprint: str
    sampling: Sampling
    prompts: Mapping[str, str]
    thinking: bool
    abouts: tuple[Mapping[str, Any], ...]
    control: Mapping[str, Any] | None = None
    controlled: tuple[str, ...] = ()
    candidate_prompts: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Session:
    """`subjects[0]` is the base. `store`: the folder of replies. `targets`: the tasks that training aimed at, of which
    the others guard against forgetting; empty: none is singled out. `judge`: a reward that chooses among replies.
    `repeats`: the candidates are training runs of one recipe, so that their spread means something.
    `looks`: see `analysis.verdict.finish_result`.
    """

    subjects: tuple[Subject, ...]
    tasks: tuple[Asked, ...]
    store: str
    environment: Mapping[str, Any]
    skipped: tuple[Skipped, ...] = ()
    targets: tuple[str, ...] = ()
    judge: str | None = None
    repeats: bool = True
    looks: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def save(self, folder: str | Path) -> None:
        """Writes `session.json`, without machine paths or tokens; store and data folder are kept relative to it."""
        content = asdict(self) | {"store": os.path.relpath(self.store, folder)}
        for name in ("environment", "notes", "skipped"):
            content[name] = scrub(content[name])
        for asked in content["tasks"]:
            place = asked["source"]["folder"]
            asked["source"]["folder"] = None if place is None else os.path.relpath(place, folder)
            asked["notes"] = scrub(asked["notes"])
        (Path(folder) / NAME).write_text(json.dumps(content, indent=1))


def _source(raw: Mapping[str, Any], folder: str | Path) -> Source:
    place = raw["folder"]
    return Source(**{**raw, "folder": None if place is None else str(Path(folder) / place)})


def load_session(folder: str | Path) -> Session:
    """The session of a report's folder. Raises StoreError when there is none that can be read."""
    path = Path(folder) / NAME
    try:
        raw = json.loads(path.read_text())
        tasks = tuple(
            Asked(
                **t
                | {
                    "source": _source(t["source"], folder),
                    "sampling": Sampling(**t["sampling"]),
                    "abouts": tuple(t["abouts"]),
                    "notes": tuple(t["notes"]),
                    "controlled": tuple(t["controlled"]),
                }
            )
            for t in raw.pop("tasks")
        )
        raw["subjects"] = tuple(Subject(**s) for s in raw["subjects"])
        raw["skipped"] = tuple(Skipped(**s) for s in raw["skipped"])
        lists = {key: tuple(raw[key]) for key in ("targets", "notes", "looks")}
        return Session(**raw | lists | {"tasks": tasks, "store": str(Path(folder) / raw["store"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is missing or is not of this version, so nothing can be graded: {error}") from error
