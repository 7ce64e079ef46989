"""The program that `math_process` starts: reads `[gold, answer]` as JSON lines, writes right, wrong or no gold."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_TARGETS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def verdict(gold: str, answer: str) -> str:
    """Both are put into a box, without which math-verify reads half of all LaTeX as nothing. No time limit here."""
    wanted = parse(f"\\boxed{{{gold}}}", _TARGETS, parsing_timeout=None)
    if not wanted:
        return "no gold"
    found = parse(f"\\boxed{{{answer}}}", _TARGETS, parsing_timeout=None) if answer else []
    return "right" if verify(wanted, found, timeout_seconds=None) else "wrong"


def allow(seconds: float) -> None:
    """Lets the kernel end this process after about `seconds` more of CPU time, also if nobody waits for it."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 2, hard))


def main(seconds: float, memory: int) -> None:
    """Answers until the input ends."""
    logging.disable(logging.CRITICAL)  # math-verify reports each text that it cannot read
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print("ready", flush=True)
    for line in sys.stdin:
        allow(seconds)
        try:
            answer = verdict(*json.loads(line))
        except Exception:  # sympy raises anything on odd text; the parent counts it as wrong
            answer = "wrong"
        print(answer, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
