"""math-verify in a process of its own that can be killed.

math-verify limits its time by signals, which fail outside the main thread and cancel other alarms, and some answers
(towers of exponents, factorials) keep sympy busy without end. Here one worker answers over a pipe; the parent waits
for a fixed time, kills it when it overruns, and starts another. The worker limits its own CPU time and memory as well,
so none outlives a parent that was killed.
"""

from __future__ import annotations

import atexit
import json
import select
import subprocess
import sys
from pathlib import Path

START_SECONDS = 120.0
"""Time to import sympy on a machine that is busy."""
MEMORY = 2**30
"""Bytes of address space of the worker."""
VERDICTS = {"right": True, "wrong": False, "no gold": None}


class MathProcess:
    """Asks a worker whether an answer equals a gold answer; started on first use."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._worker: subprocess.Popen[str] | None = None

    def verify(self, answer: str, gold: str) -> bool | None:
        """math-verify's verdict on two LaTeX texts; False after `seconds`, None when the gold cannot be read."""
        worker = self._running()
        assert worker.stdin is not None
        worker.stdin.write(json.dumps([gold, answer]) + "\n")
        worker.stdin.flush()
        reply = _line(worker, self.seconds)
        if reply not in VERDICTS:  # too slow, or dead at its limits
            self.close()
            return False
        return VERDICTS[reply]

    def close(self) -> None:
        """Ends the worker, whatever it does."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()
            atexit.unregister(self.close)

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


def _line(worker: subprocess.Popen[str], seconds: float) -> str:
    """One line from the worker without its end; empty after `seconds`, or when the worker is gone."""
    assert worker.stdout is not None
    ready, _, _ = select.select([worker.stdout], [], [], seconds)
    return worker.stdout.readline().strip() if ready else ""
