"""What an executor is given and gives back: a job, its limits, an outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class NoIsolation(RuntimeError):
    """This machine cannot run untrusted code apart from the rest; the message says what was tried and what to install."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one job; a job has at most two sandboxes, and each bound but `wall_s` holds for each of them.

    With `processes` 1 nothing can be forked and no thread be started, so `memory_mb` bounds what its process can allocate;
    with n > 1 it is up to n times that. `disk_mb` is the whole of what files can hold, in memory; it goes with the job.
    `files` is how many files, folders and links there can be, for each takes memory of the kernel (about 1 kB) whatever it
    holds; podman cannot set it, and has its bound of memory count them.
    """

    wall_s: float = 5.0
    cpu_s: int = 5
    memory_mb: int = 512
    processes: int = 1
    disk_mb: int = 16
    files: int = 1024
    file_mb: int = 4
    open_files: int = 32
    output_bytes: int = 65_536
    message_bytes: int = 1_000_000

    def __post_init__(self) -> None:
        wrong = [name for name, value in vars(self).items() if not value > 0]
        if wrong:
            raise ValueError(f"limits must be above 0: {', '.join(wrong)}")


@dataclass(frozen=True)
class Job:
    """Python text to run. With `test` and `entry_point`: `code` is loaded in one sandbox and `test` runs in another.

    There the entry point is a stand-in that sends plain arguments over and returns plain results (None, numbers, text,
    bytes, lists, tuples, sets, dictionaries, ranges, those of `collections`; iterators are read to their end), or raises
    the built-in exception of the same name (never StopIteration). So the code has no way to the verdict but through what its function returns. The test is the judge:
    one that asserts nothing lets everything pass.

    Without a test the text judges itself: it passes if it runs to its end. Leaving early in any way is no pass, but a
    text that attacks its own process could claim one. Use that form only where the text has nobody to deceive.
    """

    code: str
    test: str | None = None
    entry_point: str | None = None

    def __post_init__(self) -> None:
        if (self.test is None) != (self.entry_point is None):
            raise ValueError("a job has a test and an entry point, or neither")


@dataclass(frozen=True)
class Outcome:
    """`passed`: the test ran to its end and called the entry point. `reason`: "passed", or why not.

    `timed_out`: the wall clock. `killed`: ended by the runner or by a signal. `exit`: status of a judge that ended by
    itself, negative for a signal; None for one that gave its verdict. `output`: what code and test printed, cut off.
    `seconds`: from sending the texts to the end of the sandboxes; setting these up does not count, nor against `wall_s`.
    """

    passed: bool
    timed_out: bool
    killed: bool
    exit: int | None
    output: str
    reason: str
    seconds: float


class Executor(Protocol):
    """Runs untrusted Python text apart from this process, its files, its network and its environment."""

    @property
    def name(self) -> str:
        """Of its isolation."""

    def run(self, job: Job, limits: Limits = ...) -> Outcome:
        """Runs one job."""

    def run_all(self, jobs: Sequence[Job], limits: Limits = ..., at_once: int | None = ...) -> list[Outcome]:
        """Runs many, `at_once` at a time (none: one for each processor), outcomes in the order of the jobs."""
