"""math-verify in a process of its own that can be killed.

math-verify limits its time by signals, which fail outside the main thread and cancel other alarms, and some answers
(towers of exponents, factorials) keep sympy busy without end. Here one worker answers over a pipe. It is ended by the
kernel when one verdict has taken its CPU time, so a busy machine changes no verdict and no worker outlives its parent;
the parent kills it when it hangs. Works from any thread; a forked child starts a worker of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

START_SECONDS = 120.0
"""Time to import sympy on a machine that is busy."""
PATIENCE = 10
"""Wall time for one verdict, in units of its CPU time, until a worker is taken to hang."""
MEMORY = 2**30
"""Bytes of address space of the worker."""
KEPT = 100_000
"""Verdicts that are kept."""
VERDICTS = {"right": True, "wrong": False, "no gold": None}
_ALL: weakref.WeakSet[MathProcess] = weakref.WeakSet()


class MathProcess:
    """Asks a worker whether an answer equals a gold answer; started on first use. Verdicts are kept."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.verify = functools.lru_cache(KEPT)(self._verify)
        self._worker: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        _ALL.add(self)

    def _verify(self, answer: str, gold: str) -> bool | None:
        """math-verify's verdict on two LaTeX texts: False after `seconds` of CPU time, None when gold cannot be read.

        A worker that dies of anything but its time is replaced once, and the question asked again.
        """
        with self._lock:
            for _ in range(2):
                reply = self._ask(json.dumps([gold, answer]) + "\n")
                if reply is not None:
                    return VERDICTS[reply]
        return False

    def close(self) -> None:
        """Ends the worker, whatever it does."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.wait()
            _close_pipes(worker)
            atexit.unregister(self.close)

    def _ask(self, question: str) -> str | None:
        """The worker's word, "wrong" when it takes too long, None when it died of something else."""
        worker = self._running()
        assert worker.stdin is not None
        try:
            worker.stdin.write(question)
            worker.stdin.flush()
        except BrokenPipeError:
            self.close()
            return None
        try:
            reply = _line(worker, self.seconds * PATIENCE)
        except BaseException:  # Ctrl-C, say: the late answer must not meet the next question
            self.close()
            raise
        if reply in VERDICTS:
            return reply
        hangs = reply is None
        if not hangs:
            worker.wait()
        slow = hangs or worker.returncode == -signal.SIGPROF
        self.close()
        return "wrong" if slow else None

    def _running(self) -> subprocess.Popen[str]:
        if self._worker is not None and self._worker.poll() is not None:
            self.close()
        if self._worker is None:
            # -P: this folder has a `math.py`, which must not stand for Python's
            script = Path(__file__).with_name("math_worker.py")
            command = [sys.executable, "-P", str(script), str(self.seconds), str(MEMORY)]
            pipe = subprocess.PIPE
            self._worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
            atexit.register(self.close)
            if _line(self._worker, START_SECONDS) != "ready":
                self.close()
                raise RuntimeError(f"the math-verify worker did not start: {' '.join(command)}")
        return self._worker

    def _forget(self) -> None:
        """After a fork: the worker is the parent's, and so may be the thread that holds the lock."""
        self._lock = threading.Lock()
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.returncode = 0  # not ours to wait for
            _close_pipes(worker)


def _close_pipes(worker: subprocess.Popen[str]) -> None:
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None and not pipe.closed:
            with contextlib.suppress(BrokenPipeError):  # a question was on its way to a dead worker
                pipe.close()


def _line(worker: subprocess.Popen[str], seconds: float) -> str | None:
    """One line from the worker without its end; "" when the worker is gone, None after `seconds`."""
    assert worker.stdout is not None
    poll = select.poll()  # `select.select` fails in a process with more than 1,024 open files
    poll.register(worker.stdout, select.POLLIN)
    return worker.stdout.readline().strip() if poll.poll(seconds * 1000) else None


def _forget_all() -> None:
    for process in list(_ALL):
        process._forget()


os.register_at_fork(after_in_child=_forget_all)
