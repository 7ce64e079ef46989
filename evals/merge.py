"""Two evaluations as one report: the last subject of each, on the replies that are stored already."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from evals.compare import require_comparable
from evals.generation.store import StoreError
from evals.graders.math import GRADER_VERSION
from evals.runs import distinct
from evals.session import Asked, Session, load_session


def compare_reports(before: str | Path, after: str | Path, allow_mismatch: bool = False) -> Session:
    """A session whose base is the last subject of `before` and whose candidate is the last one of `after`.

    Each side keeps its own prompts and number of samples; questions are those that both answered. With
    `allow_mismatch` what differs is noted. Raises Mismatch when anything but the model differs, StoreError when they
    share no task or keep their replies in different places.
    """
    first, second = load_session(before), load_session(after)
    if Path(first.store).resolve() != Path(second.store).resolve():
        raise StoreError(f"the replies lie in {first.store} and {second.store}: evaluate both with one --store")
    others = {asked.task: asked for asked in second.tasks}
    pairs = [(asked, others[asked.task]) for asked in first.tasks if asked.task in others]
    if not pairs:
        raise StoreError(f"{before} and {after} share no task")
    notes = [
        f"compared although they differ: {reason}" for pair in pairs for reason in _mismatches(*pair, allow_mismatch)
    ]
    alone = sorted({asked.task for asked in (*first.tasks, *second.tasks)} - {asked.task for asked, _ in pairs})
    notes += [f"left out, since only one of the reports has them: {', '.join(alone)}"] if alone else []
    names = [f"{Path(p).name}: {s.subjects[-1].name}" for p, s in ((before, first), (after, second))]
    subjects = zip(distinct(names, ()), (first, second), strict=True)
    return Session(
        tuple(dataclasses.replace(s.subjects[-1], name=name) for name, s in subjects),
        tuple(_merged(*pair) for pair in pairs),
        first.store,
        second.environment,
        targets=tuple(t for t in second.targets if t not in alone),
        repeats=False,
        looks=second.looks,
        notes=tuple(notes),
    )


def _merged(a: Asked, b: Asked) -> Asked:
    shared = [item for item in a.prompts if item in b.prompts]
    if len(shared) < 2:
        raise StoreError(f"{a.task}: the two reports share {len(shared)} questions; at least 2 are needed")
    if a.thinking != b.thinking:
        raise StoreError(f"{a.task}: one side's prompts open a thought and the other's do not, so no grade fits both")
    samples = min(a.sampling.samples, b.sampling.samples)
    return dataclasses.replace(
        a,
        sampling=dataclasses.replace(a.sampling, samples=samples),
        prompts={item: a.prompts[item] for item in shared},
        candidate_prompts={item: b.prompts[item] for item in shared},
        abouts=(a.abouts[-1], b.abouts[-1]),
        control=None,
        controlled=(),
    )


def _mismatches(a: Asked, b: Asked, allow: bool) -> list[str]:
    return require_comparable(_described(a), _described(b), a.prompts, b.prompts, allow)


def _described(asked: Asked) -> dict[str, Any]:
    sampling = dataclasses.asdict(asked.sampling)
    return {
        **asked.abouts[-1],
        "sampling": sampling,
        "data_fingerprint": asked.fingerprint,
        "grader_version": GRADER_VERSION,
    }
