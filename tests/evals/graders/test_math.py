"""Are two answers equal? Exact values, what never matches a number, what never reaches sympy, and the worker."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from evals.graders.math import MATH_METRICS, canonical, check_gold, equal, gold_answer, grade_math, shared_process
from evals.graders.math_process import MathProcess

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def process():
    process = MathProcess(seconds=2.0)
    yield process
    process.close()


EQUAL = [
    ("17", "17.0", True),
    ("033", "33", True),
    ("16", "17", False),
    ("33.0000001", "33", False),
    ("1/3", "0.333333", True),
    ("0.333333", "1/3", True),
    ("0.333", "1/3", False),
    ("0.3333333333", "1/3", True),
    ("1e3", "1000", True),
    ("1e3", "1", False),
    ("1", "1e3", False),
    (r"\$1,080", "1080", True),
    (r"5\text{ cm}", "5", True),
    (r"5\text{ million}", "5", False),
    ("5 million", "5", False),
    (r"90^\circ", "90", True),
    # percent
    ("50%", "50", True),
    ("50%", "0.5", True),
    (r"50\%", r"50\%", True),
    ("0.5", "50", False),
    ("0.5", "50%", True),
    ("50", "50%", True),
    ("5%", "50%", False),
    ("50%", "5", False),
    # never a single number
    ("3, 4", "3", False),
    ("3, 4", "4", False),
    ("(3, 4)", "3", False),
    ("[3, 3]", "3", False),
    ("[3]", "3", False),
    (r"\{3\}", "3", False),
    ("(2,4)", "3", False),
    (r"\pm 3", "3", False),
    ("±3", "3", False),
    (r"3 \pm 0", "3", False),
    (r"x \ge 3", "3", False),
    ("x > 3", "3", False),
    ("3 < x", "3", False),
    ("x^2=25", "25", False),
    ("2x=10", "10", False),
    ("5=x", "5", False),
    ("x=5", "5", True),
    ("x=5, y=6", "5", False),
    (r"5 \text{ or } 6", "5", False),
    (r"5 \text{ and } 6", "56", False),
    ("5 or 6", "5", False),
    ("5 mod 7", "5", False),
    (r"3 \approx 3.1", "3", False),
    ("3 to 4", "3", False),
    ("1, 2, \\ldots", "1", False),
    (r"\infty", "3", False),
    (r"x \neq 3", "3", False),
    ("about 3", "3", False),
    ("5 6", "56", False),  # math-verify reads 5 6 as 56 or, with a space command, as their sum
    ("5 6", "11", False),
    (r"5 \quad 6", "11", False),
    (r"5 \\ 6", "11", False),
    (r"5 \Rightarrow 6", "6", False),
    (r"x \mapsto 5", "5", False),
    ("101_2", "101", False),
    ("101_2", "101_2", True),
    # one expression may equal a number
    ("(5)", "5", True),
    (r"\sqrt{25}", "5", True),
    ("2+3", "5", True),
    (r"\sqrt[3]{125}", "5", True),
    (r"5 \cdot 6", "30", True),
    ("10^{2}", "100", True),
    ("2^{10}", "1024", True),
    # everything else is math-verify's
    (r"2\sqrt{2}", r"\sqrt{8}", True),
    (r"2\sqrt{3}", r"\sqrt{8}", False),
    (r"\sqrt{8}", r"2\sqrt2", True),
    ("x^2+2x+1", "(x+1)^2", True),
    (r"\frac{\pi}{2}", r"0.5\pi", True),
    ("(1,2)", "(1,2)", True),
    ("(2,1)", "(1,2)", False),
    ("2, 1", "1, 2", True),
    ("1", "1, 2", False),
    (r"\{1,2\}", "(1,2)", False),
    ("(1,2)", r"\{1,2\}", False),
    (r"\{1,2\}", "2, 1", True),
    ("2^(1/2)+3^(1/2)", r"\sqrt{2}+\sqrt{3}", True),
    ("1<x<2", "1<x<2", True),
    ("(1,2)", "1<x<2", True),  # in this order only; swapped, math-verify says no
    ("2^{1000}", "2^{1000}", True),
    ("4^{500}", "2^{1000}", True),  # a gold without LaTeX delimiters, which a bare `parse` reads as nothing
    ("10", "10^{100}", False),
    (r"\text{east}", "east", True),
    ("East", r"\text{east}", True),
    ("seat", "east", False),  # math-verify multiplies the letters
    (r"\text{Tuesday}", "Tuesday", True),
    ("3", "}{", None),
    ("", "3", False),
    ("", r"\sqrt{2}", False),
    ("", "}{", None),
]


@pytest.mark.parametrize(("answer", "gold", "same"), EQUAL)
def test_equal(answer: str, gold: str, same: bool | None, process: MathProcess) -> None:
    assert equal(answer, gold, process) is same


BOMBS = [
    "9^{9^{9^{9^{9}}}}",
    "9^9^9",
    "9**9**9",
    "(9^{9})^{(9^{9})}",
    "2^{10000000}",
    "2^{-99999}",
    "10^{-10^{10}}",
    "100000000!",
    r"\binom{10^9}{10^8}",
    r"\sum_{n=1}^{9999} n",
    r"\prod_{n=1}^{9999} n",
    r"\int_0^1 x dx",
    "(" * 200 + "1" + ")" * 200,
    "(" * 21 + "1" + ")" * 21,
    "9" * 41,
    "9" * 5000,
    "1+" * 150 + "1",
    "1} \\boxed{2",
    "}" * 50,
]


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_does_not_reach_sympy(bomb: str) -> None:
    class Silent(MathProcess):
        def _ask(self, question: str) -> str | None:
            assert bomb not in question
            return "wrong"

    assert equal(bomb, r"\sqrt{2}", Silent(1.0)) is False
    assert equal(bomb, "2", Silent(1.0)) is False


def test_what_the_gold_contains_is_allowed(process: MathProcess) -> None:
    assert equal("5!", "120", process) is False
    assert equal("5!+x", "x+5!", process) is True
    assert equal(r"\binom{n}{3}", r"\binom{n}{n-3}", process) is not None
    assert equal("e^{x^{2}}", "e^{x^{2}}", process) is True


@pytest.mark.parametrize("bomb", ["9^{9^{9^{9^{9}}}}", "100000000!", r"\binom{10^9}{10^8}"])
def test_an_answer_that_never_ends_costs_its_time_and_nothing_more(bomb: str) -> None:
    process = MathProcess(seconds=0.5)
    assert process.verify("1", r"\sqrt{1}") is True
    started = time.perf_counter()
    assert process.verify(bomb, r"\sqrt{2}") is False
    assert time.perf_counter() - started < 10
    assert process.verify(r"2\sqrt{2}", r"\sqrt{8}") is True, "the next answer finds a new worker"
    worker = process._worker
    assert worker is not None
    process.close()
    assert worker.poll() is not None, "no worker is left behind"


def test_a_worker_that_died_is_replaced(process: MathProcess) -> None:
    process.verify("1", "1+0")
    assert process._worker is not None
    process._worker.kill()
    process._worker.wait()
    assert process.verify("1", "1+0+0") is True


def test_a_worker_that_dies_of_the_question_is_asked_again_once_in_a_fresh_interpreter() -> None:
    class Dying(MathProcess):
        asked = 0

        def _ask(self, question: str) -> str | None:
            self.asked += 1
            return None if self.asked == 1 else "right"

    process = Dying(1.0)
    assert process.verify("1", "x") is True
    assert process.asked == 2


def test_a_late_answer_does_not_meet_the_next_question() -> None:
    process = MathProcess(seconds=2.0)
    assert process.verify("1", r"\sqrt{2}") is False

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            process.verify("9^{9^{9^{9^{9}}}}", "2")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert process._worker is None
    assert process.verify(r"2\sqrt{2}", r"\sqrt{8}") is True
    process.close()


def test_verdicts_are_kept(process: MathProcess) -> None:
    before = process.verify.cache_info().hits
    assert process.verify("7", "3+4") is process.verify("7", "3+4") is True
    assert process.verify.cache_info().hits >= before + 1


CASES = [(answer, gold) for answer, gold, _ in EQUAL]


def test_verdicts_in_threads_are_those_of_the_main_thread(process: MathProcess) -> None:
    fresh = MathProcess(seconds=2.0)
    found: dict[int, list[bool | None]] = {}

    def judge(number: int) -> None:
        found[number] = [equal(answer, gold, fresh) for answer, gold in CASES]

    threads = [threading.Thread(target=judge, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fresh.close()
    assert found[0] == found[1] == found[2] == [same for _, _, same in EQUAL]


def test_an_outer_alarm_is_left_alone(process: MathProcess) -> None:
    rang: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    signal.setitimer(signal.ITIMER_REAL, 50.0)
    try:
        assert equal(r"\sqrt{72}", r"6\sqrt{2}", process) is True
        assert 40 < signal.getitimer(signal.ITIMER_REAL)[0] < 50
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rang == []


def _judge(gold: str, pipe) -> None:
    pipe.send((equal(r"2\sqrt{2}", gold), shared_process()._worker.pid))


def test_forked_processes_grade_at_once_each_with_its_own_worker() -> None:
    assert equal(r"3\sqrt{2}", r"\sqrt{18}") is True  # the parent has a worker, whose pipe the children inherit
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(2)]
    children = [context.Process(target=_judge, args=(r"\sqrt{8}", pipe[1])) for pipe in pipes]
    for child in children:
        child.start()
    verdicts = [pipe[0].recv() for pipe in pipes]
    for child in children:
        child.join()
    parents = shared_process()._worker
    assert parents is not None
    workers = [pid for _, pid in verdicts]
    assert [verdict for verdict, _ in verdicts] == [True, True]
    assert len({*workers, parents.pid}) == 3
    assert equal(r"5\sqrt{2}", r"\sqrt{50}") is True, "the parent's worker is untouched"
    assert shared_process()._worker is parents
    assert _all_gone(workers)


def _all_gone(pids: list[int]) -> bool:
    """Whether the processes end by themselves within ten seconds."""
    for _ in range(200):
        if not any(_runs(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_worker_outlives_a_parent_that_was_killed() -> None:
    code = (
        "from evals.graders.math import shared_process\n"
        "process = shared_process()\n"
        r"process.verify('1', '\\sqrt{2}')" + "\n"
        "print(process._worker.pid, flush=True)\n"
        "process.verify('9^{9^{9^{9^{9}}}}', '2')\n"  # busy, so that it reads no end of its input
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert _all_gone([worker])


@pytest.mark.parametrize(
    ("text", "gold", "accuracy", "answered", "answer"),
    [
        (r"\boxed{0.5}", "1/2", 1, 1, "1/2"),
        (r"\boxed{\frac12}", "0.5", 1, 1, "1/2"),
        (r"\boxed{50\%}", "50", 1, 1, "50%"),
        (r"\boxed{1,080}", "1080", 1, 1, "1080"),
        (r"\boxed{3} or \boxed{4}", "4", 0, 1, "3,4"),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", 1, 1, r"2\sqrt{2}"),
        ("so it must be 4", "4", 0, 0, None),
        (r"<think>\boxed{4}", "4", 0, 0, None),
        ("It takes 4. Then 5.", "5", 0, 0, None),  # the last number is never taken
        (r"\boxed{1e3}", "1000", 1, 1, "1000"),
        ("", "4", 0, 0, None),
    ],
)
def test_grade_math(text: str, gold: str, accuracy: float, answered: float, answer: str | None) -> None:
    grade = grade_math(text, gold)
    assert grade.scores == {"accuracy": accuracy, "answered": answered}
    assert grade.scores.keys() == MATH_METRICS.keys()
    assert grade.answer == answer


def test_equal_values_vote_together() -> None:
    assert {canonical(a) for a in ("0.5", "1/2", r"\frac{1}{2}", r"\dfrac12", "x = .50")} == {"1/2"}
    assert canonical(r"\left( 1, 2 \right)") == canonical("(1,2)") == "(1,2)"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "5"),
        ("2+2. #### 4", "4"),
        (r"long \boxed{5}", "5"),
        (r"long \boxed{5", None),
        ("Tuesday", "Tuesday"),
        (r"(1,2)", "(1,2)"),
        ("", None),
        ("two\nlines", None),
    ],
)
def test_gold_answer(gold: str, answer: str | None) -> None:
    assert gold_answer(gold) == answer


def test_check_gold() -> None:
    assert check_gold("5") == "5"
    assert check_gold(r"\sqrt{2}") == r"\sqrt{2}"
    for bad in ("", " ", "}{", "x" * 301):
        with pytest.raises(ValueError, match="cannot be read as mathematics"):
            check_gold(bad)
