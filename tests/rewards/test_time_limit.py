"""The bound on one reward call: it ends what hangs, and leaves Ctrl-C and the next call alone."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from trl_ext.rewards import RewardError
from trl_ext.rewards.time_limit import with_others, within, within_async

FOR_EVER = 60.0
"""Seconds that no test waits for."""


@pytest.fixture(autouse=True)
def _same_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before
    assert not [t for t in threading.enumerate() if t.name == "reward_seconds" and t.join(5) is None and t.is_alive()]


def test_what_returns_in_time_is_returned() -> None:
    assert within(FOR_EVER, "r", lambda: 3) == 3
    assert within(None, "r", lambda: 4) == 4


@pytest.mark.parametrize(
    "wait", [lambda: time.sleep(FOR_EVER), lambda: threading.Event().wait(FOR_EVER), lambda: os.read(os.pipe()[0], 1)]
)
def test_what_hangs_is_told(wait) -> None:
    with pytest.raises(RewardError, match=r"reward 'slow' did not return within 0\.05 seconds \(reward_seconds\)"):
        within(0.05, "slow", wait)


def test_a_loop_in_python_is_ended() -> None:
    def spin() -> None:
        while True:
            pass

    with pytest.raises(RewardError, match="did not return"):
        within(0.05, "spins", spin)


def test_a_function_that_swallows_the_interrupt_is_not_believed() -> None:
    """One that makes a score of anything: it is interrupted again where it waits again."""
    calls = []

    def swallow() -> list[float]:
        for _ in range(2):
            try:
                time.sleep(FOR_EVER)
            except BaseException:
                calls.append(1)
        return [0.0]

    with pytest.raises(RewardError, match="did not return"):
        within(0.05, "swallows", swallow)
    assert len(calls) == 2


def test_its_own_error_stays_its_own() -> None:
    with pytest.raises(KeyError, match="gold"):
        within(FOR_EVER, "r", lambda: {}["gold"])


def test_a_ctrl_c_stays_one() -> None:
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(FOR_EVER)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            within(FOR_EVER, "r", stop)
    finally:
        signal.signal(signal.SIGINT, before)


def test_it_works_where_sigint_is_ignored() -> None:
    """A script that starts a run with & does that."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(RewardError, match="did not return"):
            within(0.05, "slow", lambda: time.sleep(FOR_EVER))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_late_signal_does_not_hit_what_comes_after() -> None:
    """Calls that end when their time does: each gives its result or the error, and nothing comes after it."""
    late = 0
    for _ in range(300):
        try:
            assert within(0.002, "r", lambda: time.sleep(0.00195) or 1) == 1
        except RewardError:
            late += 1
        sum(range(200))  # where a late signal would raise
    assert 0 <= late <= 300


def test_outside_the_main_thread_there_is_no_bound() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(within(0.01, "r", lambda: time.sleep(0.1) or 5)))
    thread.start()
    thread.join()
    assert found == [5]


def test_an_asynchronous_function() -> None:
    async def reply(value: int) -> int:
        return value

    async def own() -> None:
        raise TimeoutError("the endpoint's own")

    assert asyncio.run(within_async(FOR_EVER, "r", reply(3))) == 3
    assert asyncio.run(within_async(None, "r", reply(4))) == 4
    with pytest.raises(RewardError, match=r"reward 'slow' did not return within 0\.05 seconds"):
        asyncio.run(within_async(0.05, "slow", asyncio.sleep(FOR_EVER)))
    with pytest.raises(TimeoutError, match="the endpoint's own"):
        asyncio.run(within_async(FOR_EVER, "r", own()))


def test_what_waits_for_other_processes_is_not_interrupted() -> None:
    """Its time goes on where that is over."""

    def waits() -> int:
        with with_others():
            time.sleep(0.2)
        return 6

    def then_hangs() -> None:
        waits()
        time.sleep(FOR_EVER)

    assert within(0.05, "r", waits) == 6
    with with_others():  # outside of a call it changes nothing
        pass
    with pytest.raises(RewardError, match="did not return"):
        within(0.05, "r", then_hangs)
