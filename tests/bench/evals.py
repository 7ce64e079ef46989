"""What evaluating costs beside generating: `python -m tests.bench.evals`. Grading speed and the harness's wall time."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tests.bench.common import RESULTS, quiet, write_json

quiet()

from tests.bench import evals_grading, evals_harness  # noqa: E402 - after the environment is set


def markdown(result: dict[str, Any]) -> str:
    """The tables of both halves."""
    return evals_harness.markdown(result["harness"]) + "\n\n" + evals_grading.report(result["grading"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few replies, one round: does it work at all?")
    parser.add_argument("--out", type=Path, help="folder (default tests/bench/results; none if quick)")
    args = parser.parse_args()
    result = {
        "grading": evals_grading.measure(0.02 if args.quick else 1.0),
        "harness": evals_harness.run(8, 2, 1, 16) if args.quick else evals_harness.run(100, 4, 7, 64),
    }
    folder = args.out or (None if args.quick else RESULTS)
    if folder:
        write_json(folder / "evals.json", result)
    sys.stdout.write(markdown(result) + "\n")


if __name__ == "__main__":
    main()
