"""Two evaluations as one report: the last subject of each, on the replies that are stored already."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from evals.compare import require_comparable
from evals.generation.store import StoreError
from evals.session import Asked, Session, load_session


def compare_reports(before: str | Path, after: str | Path, allow_mismatch: bool = False) -> Session:
    """A session whose base is the last subject of `before` and whose candidate is the last one of `after`.

    Raises Mismatch when anything but the model differs (unless `allow_mismatch`, which is noted), StoreError when they
    share no task or keep their replies in different places.
    """
    first, second = load_session(before), load_session(after)
    if Path(first.store).resolve() != Path(second.store).resolve():
        raise StoreError(f"the replies lie in {first.store} and {second.store}: evaluate both with one --store")
    others = {asked.task: asked for asked in second.tasks}
    pairs = [(asked, others[asked.task]) for asked in first.tasks if asked.task in others]
    if not pairs:
        raise StoreError(f"{before} and {after} share no task")
    mismatches = [reason for pair in pairs for reason in _mismatches(*pair, allow_mismatch)]
    base = dataclasses.replace(first.subjects[-1], name=f"{Path(before).name}: {first.subjects[-1].name}")
    candidate = dataclasses.replace(second.subjects[-1], name=f"{Path(after).name}: {second.subjects[-1].name}")
    return Session(
        (base, candidate),
        tuple(dataclasses.replace(a, abouts=(a.abouts[-1], b.abouts[-1]), control=None) for a, b in pairs),
        first.store,
        second.environment,
        first.skipped,
        repeats=False,
        notes=tuple(f"compared although they differ: {reason}" for reason in mismatches),
    )


def _mismatches(a: Asked, b: Asked, allow: bool) -> list[str]:
    return require_comparable(_described(a), _described(b), a.prompts, b.prompts, allow)


def _described(asked: Asked) -> dict[str, Any]:
    sampling = dataclasses.asdict(asked.sampling)
    return {**asked.abouts[-1], "sampling": sampling, "data_fingerprint": asked.fingerprint}
