"""Runs jobs in sandboxes of one kind. The verdict is kept here, outside of them.

A job with a test has two sandboxes that share nothing; this process passes lines from one to the other and reads of them
only their first letter. A pass is a line of the test's sandbox with a secret that was drawn for this job and sent there
alone; anything else (an early exit, a crash, a line too long, silence) is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import secrets
import signal
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_ext.executor.base import Job, Limits, NoIsolation, Outcome
from trl_ext.executor.isolation import ENVIRONMENT, FOLDER, SET_UP_S, Isolation, Launch

MARK = "trl-ext-sandbox"
_MAX_REASON = 300
_END_S = 10.0  # the kernel needs a moment to take a killed sandbox down, more on a machine with a high load


class Ended(Exception):
    """The job is over; the message is the reason.

    `judged`: it is the judge's verdict, the only way to pass. `killed`: this process must end it.
    """

    timed_out = False

    def __init__(self, reason: str, killed: bool = False, judged: bool = False) -> None:
        super().__init__(reason)
        self.killed, self.judged = killed, judged


@functools.cache
def _source() -> str:
    return Path(__file__).with_name("inside.py").read_text(encoding="utf-8")


@dataclass
class Sandbox:
    """A started sandbox: its process, what it printed so far, and how to end it."""

    launch: Launch
    process: Process
    limits: Limits
    printed: bytearray = field(default_factory=bytearray)
    too_much: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.listener = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, isolation: Isolation, limits: Limits) -> Sandbox:
        """Starts one, which gives up its privileges and waits for its job. NoIsolation if there is no such program."""
        launch = isolation.launch(_source(), limits, f"{MARK}-{os.getpid()}-{secrets.token_hex(8)}")
        pipes: dict[str, Any] = {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE, "limit": limits.message_bytes}
        try:
            process = await asyncio.create_subprocess_exec(
                *launch.argv, **pipes, env=launch.environment, start_new_session=True
            )
        except FileNotFoundError as error:
            raise NoIsolation(f"there is no program {launch.argv[0]}") from error
        box = cls(launch, process, limits)
        own = {"uid": launch.uid, "old_root": launch.old_root, "remount": launch.remount, "folder": FOLDER}
        with contextlib.suppress(Ended):  # `confined` says why it ended
            await box.give(rlimits=rlimits(limits), environment=ENVIRONMENT, **own)
        return box

    async def give(self, **values: Any) -> None:
        """Sends how to confine itself, then the job: role, text, entry point and, to a judge, the secret."""
        await self.send(json.dumps(values).encode() + b"\n")

    async def confined(self) -> None:
        """Waits until it says that it gave up its privileges; no untrusted text is sent before. NoIsolation if not."""
        if (line := await self.line()) == b"confined\n":
            return
        await asyncio.wait([self.listener], timeout=1)
        said = " ".join((line + bytes(self.printed)).decode(errors="replace").split())
        raise NoIsolation(f"{self.launch.argv[0]} did not set up a sandbox: {said[:_MAX_REASON] or 'it said nothing'}")

    async def send(self, line: bytes) -> None:
        """Writes a line; Ended if nobody reads it any more."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
            await self.process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            raise Ended("ended early") from None

    async def line(self) -> bytes:
        """The next line; empty if the sandbox ended; Ended if it is too long."""
        assert self.process.stdout is not None
        try:
            return await self.process.stdout.readline()
        except ValueError:
            raise Ended(f"a message above {self.limits.message_bytes} bytes", killed=True) from None

    async def _listen(self) -> None:
        """Collects what is printed, up to the bound; more than that ends the job."""
        assert self.process.stderr is not None
        while part := await self.process.stderr.read(65_536):
            self.printed += part[: self.limits.output_bytes - len(self.printed)]
            if len(self.printed) >= self.limits.output_bytes:
                self.too_much.set()
                return

    async def end(self) -> int:
        """Kills everything in it; the status of the process that was started.

        What it left in its pipe is read first, as far as allowed: with the last process the pipe ends. NoIsolation if
        it does not end, for then something in it got away.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.launch.stop:
            killer = await asyncio.create_subprocess_exec(*self.launch.stop, stdout=PIPE, stderr=PIPE)
            with contextlib.suppress(TimeoutError):  # its container ends by itself later
                await asyncio.wait_for(killer.communicate(), _END_S)
        await asyncio.wait([self.listener], timeout=1)
        self.listener.cancel()
        try:
            async with asyncio.timeout(_END_S):
                for stream in (self.process.stdout, self.process.stderr):
                    await _emptied(stream)
                return await self.process.wait()
        except TimeoutError:
            self.process._transport.close()  # type: ignore[attr-defined]  # there is no public way to let go of pipes
            raise NoIsolation(f"{self.launch.argv[0]}: what it started outlives it; end it by hand") from None


async def _emptied(stream: asyncio.StreamReader | None) -> None:
    """Reads a dead process's pipe to its end; asyncio would wait for ever for one that it stopped reading when full.

    A process that outlives its sandbox keeps the pipe open: bound the wait.
    """
    while stream is not None and await stream.read(65_536):
        pass


def rlimits(limits: Limits) -> dict[str, int]:
    """Bounds of the kernel for each process, by their names in `resource`."""
    return {
        "RLIMIT_AS": limits.memory_mb * 2**20,
        "RLIMIT_CPU": limits.cpu_s,
        "RLIMIT_FSIZE": limits.file_mb * 2**20,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_NPROC": limits.processes,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }


@dataclass(frozen=True)
class Sandboxes:
    """An `Executor` on one kind of isolation. Use `trl_ext.executor.make_executor`, which tries it out first."""

    isolation: Isolation

    @property
    def name(self) -> str:
        """The isolation's name."""
        return self.isolation.name

    def run(self, job: Job, limits: Limits = Limits()) -> Outcome:
        """Runs one job. NoIsolation if its sandbox could not be set up: nothing of the job was run then."""
        return self.run_all([job], limits, at_once=1)[0]

    def run_all(self, jobs: Sequence[Job], limits: Limits = Limits(), at_once: int | None = None) -> list[Outcome]:
        """Runs many, `at_once` at a time (none: one for each processor of ours). The first NoIsolation ends it.

        It may be called where an event loop runs (a notebook, a server), and blocks that until all are done.
        """

        def run() -> list[Outcome]:
            return asyncio.run(self._run_all(jobs, limits, at_once or len(os.sched_getaffinity(0))))

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return run()
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(run).result()

    async def _run_all(self, jobs: Sequence[Job], limits: Limits, at_once: int) -> list[Outcome]:
        places = asyncio.Semaphore(at_once)

        async def in_turn(job: Job) -> Outcome:
            async with places:
                return await self._run(job, limits)

        return list(await asyncio.gather(*map(in_turn, jobs)))

    async def _run(self, job: Job, limits: Limits) -> Outcome:
        began, secret = time.monotonic(), secrets.token_hex(16)
        given = roles(job, secret)
        boxes: list[Sandbox] = []
        try:
            await self._set_up(boxes, len(given), limits)
            began = time.monotonic()  # only now is it the job's time
            async with asyncio.timeout(limits.wall_s):
                judging = verdict(boxes, given, secret)
                end = Ended(await _first(judging, *(box.too_much.wait() for box in boxes)), judged=True)
        except TimeoutError:
            end = Ended(f"no verdict after {limits.wall_s:g} s", killed=True)
            end.timed_out = True
        except Ended as ended:
            end = ended
        finally:
            status = await asyncio.gather(*(box.end() for box in boxes))
        return _outcome(end, status, boxes, limits, time.monotonic() - began)

    async def _set_up(self, boxes: list[Sandbox], count: int, limits: Limits) -> None:
        """Adds confined sandboxes to `boxes`, which its caller ends."""
        try:
            async with asyncio.timeout(SET_UP_S):
                for _ in range(count):
                    boxes.append(await Sandbox.start(self.isolation, limits))
                for box in boxes:
                    await box.confined()
        except TimeoutError:
            raise NoIsolation(f"{self.name} did not set up a sandbox within {SET_UP_S:g} s") from None


def _outcome(end: Ended, status: Sequence[int], boxes: Sequence[Sandbox], limits: Limits, seconds: float) -> Outcome:
    reason = str(end)[:_MAX_REASON]
    code = None if end.judged or end.killed or not status else status[0]
    output = b"".join(bytes(box.printed) for box in boxes)[: limits.output_bytes].decode(errors="replace")
    killed = end.killed or (code or 0) < 0
    return Outcome(end.judged and reason == "passed", end.timed_out, killed, code, output, reason, seconds)


def roles(job: Job, secret: str) -> list[dict[str, Any]]:
    """What each sandbox of a job is sent: the judge, then the code if there is a test. The code never gets the secret."""
    if job.test is None:
        return [{"role": "test", "text": job.code, "entry_point": None, "secret": secret}]
    judge = {"role": "test", "text": job.test, "entry_point": job.entry_point, "secret": secret}
    return [judge, {"role": "code", "text": job.code, "entry_point": job.entry_point}]


async def verdict(boxes: Sequence[Sandbox], given: Sequence[dict[str, Any]], secret: str) -> str:
    """Sends the job to its sandboxes, then passes calls to the code and values back until the judge speaks.

    Its reason, "passed" for a pass.
    """
    judge = boxes[0]
    for box, values in zip(boxes, given, strict=True):
        await box.give(**values)
    if len(boxes) == 2 and (said := await boxes[1].line()) != b"ready\n":
        text = said.decode(errors="replace").removeprefix("broken ").strip()
        raise Ended(f"the code does not load: {text or 'it ended early'}")
    while line := await judge.line():
        if line.startswith(b"v"):
            return _read(line[1:], secret)
        if not (line.startswith(b"c") and len(boxes) == 2):
            raise Ended("the judge broke the protocol", killed=True)
        await boxes[1].send(line[1:])
        if not (reply := await boxes[1].line()):
            raise Ended("the code ended during a call")
        await judge.send(reply)
    raise Ended("ended before the test did")


def _read(line: bytes, secret: str) -> str:
    """The reason in a verdict; Ended if the line has not the secret."""
    try:
        said = json.loads(line)
        if secrets.compare_digest(str(said["secret"]).encode(), secret.encode()):
            return str(said["reason"])
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise Ended("a verdict without the secret", killed=True)


async def _first(judging: Any, *too_much: Any) -> str:
    """The verdict, or Ended if a sandbox prints too much before it."""
    tasks = [asyncio.ensure_future(judging), *map(asyncio.ensure_future, too_much)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0] not in done:
            raise Ended("more output than allowed", killed=True)
        return str(await tasks[0])
    finally:
        for task in tasks:
            task.cancel()
