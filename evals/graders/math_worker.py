"""The program that `math_process` starts: reads `[gold, answer]` as JSON lines, writes right, wrong or no gold."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import signal
import sys

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_TARGETS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def verdict(gold: str, answer: str) -> str:
    """Both are put into a box, without which math-verify reads half of all LaTeX as nothing. No time limit here.

    The gold comes first: swapped, relations and sets get another verdict.
    """
    wanted = parse(f"\\boxed{{{gold}}}", _TARGETS, parsing_timeout=None)
    if not any(not isinstance(w, str) for w in wanted):
        return "no gold"
    found = parse(f"\\boxed{{{answer}}}", _TARGETS, parsing_timeout=None) if answer else []
    return "right" if verify(wanted, found, timeout_seconds=None) else "wrong"


def main(seconds: float, memory: int) -> None:
    """Answers until the input ends; the kernel ends this process when one answer takes `seconds` of CPU time."""
    logging.disable(logging.CRITICAL)  # math-verify reports each text that it cannot read
    with contextlib.suppress(ValueError, OSError):  # macOS refuses this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then closes the pipe
    verdict(r"\frac{1}{2}", r"\sqrt{2}")  # builds parser tables, so that no reply pays for them
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            answer = verdict(*json.loads(line))
        except MemoryError:
            raise SystemExit(1) from None  # the next question gets a fresh interpreter
        except Exception:  # sympy raises anything on odd text; the parent counts it as wrong
            answer = "wrong"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
