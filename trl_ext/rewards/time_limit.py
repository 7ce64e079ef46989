"""A bound on the time of one call of a reward function, so that one that hangs ends in a message and not in silence.

A thread waits beside the call. When the time is up it sends the main thread a SIGINT, as Ctrl-C does: that ends a wait for
a network, a lock or a process, and a loop in Python. Code in C that never looks back at Python is interrupted once it does.
SIGALRM is left to those who use it, math-verify among them.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from trl_ext.rewards.checked import RewardError

T = TypeVar("T")


def within(seconds: float | None, name: str, call: Callable[[], T]) -> T:
    """`call()`, or RewardError when reward `name` took longer than `seconds`; None: no bound.

    Only the main thread can be interrupted; in any other one there is no bound. A Ctrl-C stays a KeyboardInterrupt.
    A function that swallows the interrupt is interrupted again each `seconds`, and its result is not used.
    """
    if seconds is None or not _can_interrupt():
        return call()
    watch, result = _Watch(seconds), None
    try:
        watch.start()
        try:
            result = call()
        finally:
            watch.over = True
    except BaseException:
        if not watch.late:
            raise
    finally:
        watch.stop()
    if watch.late:
        raise _too_long(name, seconds)
    return result  # type: ignore[return-value]


async def within_async(seconds: float | None, name: str, wait: Awaitable[T]) -> T:
    """`within` for an asynchronous function, which is interrupted where it awaits; one that blocks its loop is not."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await wait
    except TimeoutError:
        if limit.expired():
            assert seconds is not None
            raise _too_long(name, seconds) from None
        raise


@contextlib.contextmanager
def with_others() -> Iterator[None]:
    """Around what all processes do together inside of a reward function: nobody is interrupted while it waits for a slower
    one, which has its own bound, and half a collective would break the next one."""
    watch = _Watch.running
    if watch is None or not _can_interrupt():
        yield
        return
    watch.waits = True
    try:
        yield
    finally:
        watch.waits = False


def _too_long(name: str, seconds: float) -> RewardError:
    return RewardError(
        f"reward '{name}' did not return within {seconds:g} seconds (reward_seconds). Look at what it waits for: an "
        "endpoint, a lock, a program without an end. If it only takes long, raise reward_seconds; null sets no bound."
    )


def _can_interrupt() -> bool:
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(signal.SIGINT) is not None  # None: a handler that is not Python's


class TimeUp(BaseException):
    """Not an Exception: many a reward function turns those into a score."""


class _Watch:
    """SIGINT to the main thread each `seconds` until `stop`; `late` tells whether there was one.

    `over` is set when the call has ended. A signal that is on its way by then finds our handler, which raises nothing.
    """

    running: _Watch | None = None

    def __init__(self, seconds: float) -> None:
        self.seconds, self.over, self.late, self.waits = seconds, False, False, False
        self._coming = False
        self._ended, self._lock = threading.Event(), threading.Lock()

    def start(self) -> None:
        """From the main thread."""
        # Not all processes have Python's own handler: one that a script starts with & or nohup ignores SIGINT
        self._before: Any = signal.signal(signal.SIGINT, self._interrupted)
        _Watch.running = self
        threading.Thread(target=self._wait, name="reward_seconds", daemon=True).start()

    def stop(self) -> None:
        """Waits for a signal that was sent: the handler from before must not see it."""
        with self._lock:
            self._ended.set()
        while self._coming:
            time.sleep(0.001)
        signal.signal(signal.SIGINT, self._before)
        _Watch.running = None

    def _wait(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while not self._ended.wait(self.seconds):
            with self._lock:
                if not (self.waits or self._ended.is_set()):
                    self.late = self._coming = True
                    signal.pthread_kill(main, signal.SIGINT)

    def _interrupted(self, number: int, frame: Any) -> None:
        if self._coming:
            self._coming = False
            if not (self.waits or self.over):
                raise TimeUp
        elif callable(self._before):
            self._before(number, frame)
