"""Everything that an evaluation can be told, checked before a model is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.task import DataError, Sampling, Task
from evals.tasks import TASKS

PRESETS = ("offline", "quick", "full", "sampled")
OFFLINE_QUESTIONS = {"sandbox_json": 200, "others": 24}
MISSING = ("skip", "stand-in", "fail")


class SettingsError(ValueError):
    """Settings that make no sense, in words."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to evaluate; None leaves a field of `Sampling` to the preset of each task.

    `missing`: what happens when a task's data cannot be had. `limit`: questions per task. `control`: also ask the base
    under a grammar, on structured tasks. `judge`: a reward that chooses among the replies.
    `looks`: numbers of samples at which the replies are looked at, so that peeking is paid for. `store`: the folder of
    replies, one for all reports, so that a base is asked once.
    """

    tasks: tuple[Task, ...]
    preset: str = "quick"
    samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    limit: int | None = None
    data: str | None = None
    missing: str = "skip"
    targets: tuple[str, ...] = ()
    batch_size: int = 64
    backend: str = "hf"
    control: bool = False
    judge: str | None = None
    looks: tuple[int, ...] = ()
    allow_inactive: bool = False
    store: str = "evals_out/replies"

    def limit_for(self, task: Task) -> int | None:
        """Questions of a task: `limit`, else few of the offline preset's, which is there to be quick."""
        if self.limit is not None or self.preset != "offline":
            return self.limit
        return OFFLINE_QUESTIONS.get(task.name, OFFLINE_QUESTIONS["others"])

    def folder_for(self, task: Task) -> str | None:
        """The data folder of a task: `data/<task>`; `data` itself only when it is no folder of tasks' folders.

        Raises DataError when other tasks have a folder there and this one has none.
        """
        if self.data is None:
            return None
        own, others = Path(self.data) / task.name, [n for n in TASKS if (Path(self.data) / n).is_dir()]
        if own.is_dir():
            return str(own)
        if others:
            raise DataError(f"{task.name}: {self.data} holds {', '.join(others)} but no folder {task.name}")
        return self.data


def sampling_for(task: Task, settings: Settings) -> Sampling:
    """The task's preset with what the user changed. Raises SettingsError for values that make no sense."""
    if settings.preset not in task.presets:
        raise SettingsError(
            f"{task.name} has no preset {settings.preset}: choose --preset {' or '.join(task.presets)}"
        )
    preset = task.presets[settings.preset]
    names = ("samples", "temperature", "top_p", "top_k", "max_new_tokens")
    changes: Mapping[str, Any] = {n: getattr(settings, n) for n in names if getattr(settings, n) is not None}
    found = dataclasses.replace(preset, **changes, seed=settings.seed)
    problems = problems_of(found)
    if problems:
        raise SettingsError(f"{task.name}: {'; '.join(problems)}")
    if settings.looks and found.samples not in settings.looks:
        raise SettingsError(f"{task.name}: --samples {found.samples} is none of the planned --looks {settings.looks}")
    return found


def problems_of(sampling: Sampling) -> list[str]:
    """What is wrong with the values, in words."""
    checks: Sequence[tuple[bool, str]] = (
        (sampling.samples >= 1, f"samples {sampling.samples} must be at least 1"),
        (sampling.temperature >= 0, f"temperature {sampling.temperature} must not be negative"),
        (0 < sampling.top_p <= 1, f"top_p {sampling.top_p} must be above 0 and at most 1"),
        (sampling.top_k >= 0, f"top_k {sampling.top_k} must not be negative; 0 is off"),
        (sampling.max_new_tokens >= 1, f"max_new_tokens {sampling.max_new_tokens} must be at least 1"),
        (
            sampling.temperature > 0 or sampling.samples == 1,
            f"{sampling.samples} samples at temperature 0 would all be the same: raise the temperature, or --samples 1",
        ),
    )
    return [words for holds, words in checks if not holds]
