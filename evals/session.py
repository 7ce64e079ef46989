"""What an evaluation asked, in one file beside its report: enough to grade its replies again without a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evals.generation.store import StoreError
from evals.result import Skipped, Subject
from evals.task import Sampling, Source

NAME = "session.json"


@dataclass(frozen=True)
class Asked:
    """One task: where its items came from, how replies were drawn, the hash of each item's
    prompt, and what each subject's store is about, in order;
    `control`: the same of the base under a grammar.
    """

    task: str
    source: Source
    fingerprint: str
    sampling: Sampling
    prompts: Mapping[str, str]
    abouts: tuple[Mapping[str, Any], ...]
    control: Mapping[str, Any] | None = None
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
        """Writes `session.json`; the store's place is kept relative to it, so that both can move together."""
        content = asdict(self) | {"store": os.path.relpath(self.store, folder)}
        (Path(folder) / NAME).write_text(json.dumps(content, indent=1))


def load_session(folder: str | Path) -> Session:
    """The session of a report's folder. Raises StoreError when there is none that can be read."""
    path = Path(folder) / NAME
    try:
        raw = json.loads(path.read_text())
        tasks = tuple(
            Asked(
                **t
                | {
                    "source": Source(**t["source"]),
                    "sampling": Sampling(**t["sampling"]),
                    "abouts": tuple(t["abouts"]),
                    "notes": tuple(t["notes"]),
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
