"""DSTC's claim without a model: with wrong self-made tests, whose pairs are right, by hidden tests? Five seeds.

    python -m tests.bench.dstc_synthetic [--instructions 1000] [--out tests/bench/results/dstc_synthetic.json]

The world. An instruction has 30 inputs; an answer is 0 (right), 1 (a common misconception) or a number of its own (a slip).
Of 10 codes each is right with the instruction's own chance, uniform in [0, 1]; a wrong one answers a share of the inputs
wrong, uniform in [0.1, 1], half of them by the misconception. Each of 10 tests compares 3 inputs with expected answers.
A hidden test compares all 30 with the right ones. A noise level is the share of tests that are corrupted, each by one of:

    random        one expected answer is a number that no code gives: nobody passes
    misconception the expected answers on its inputs are the misconception's: right codes fail, wrong ones may pass
    lenient       it compares nothing: everybody passes
    mixed         each of the three equally often

What is counted of the pairs of each selection: chosen code right, rejected code wrong, both; chosen and rejected test as
written by who knows the answers (not corrupted); and how many instructions give a pair.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.common import machine, write_json
from trl_ext.loops import dstc

SEEDS, CODES, TESTS, INPUTS, SHOWN = range(5), 10, 10, 30, 3
KINDS = ("random", "misconception", "lenient")
NOISES = {"none": (0.0,)} | dict.fromkeys((*KINDS, "mixed"), (1 / 3, 2 / 3))
OUT = Path(__file__).with_name("results") / "dstc_synthetic.json"
COUNTED = ("chosen_right", "rejected_wrong", "both", "chosen_test_sound", "rejected_test_sound")


def code(rng: random.Random, right: float) -> list[int]:
    """Answers (INPUTS) of one code."""
    if rng.random() < right:
        return [0] * INPUTS
    wrong = rng.uniform(0.1, 1.0)
    answers = [
        (1 if rng.random() < 0.5 else rng.randrange(2, 10**6)) if rng.random() < wrong else 0 for _ in range(INPUTS)
    ]
    answers[rng.randrange(INPUTS)] = 1  # a wrong code is wrong somewhere
    return answers


def self_test(rng: random.Random, kind: str | None) -> dict[int, int]:
    """Expected answers by input; `kind` of corruption, or None."""
    asked = rng.sample(range(INPUTS), SHOWN)
    if kind == "lenient":
        return {}
    expected = dict.fromkeys(asked, 1 if kind == "misconception" else 0)
    return expected | ({asked[0]: -1} if kind == "random" else {})


def instruction(rng: random.Random, kind: str, noise: float) -> tuple[list[list[int]], list[bool], list[bool]]:
    """R (J, K), which codes are right (J), which tests are sound (K)."""
    right = rng.random()
    codes = [code(rng, right) for _ in range(CODES)]
    kinds = [(rng.choice(KINDS) if kind == "mixed" else kind) if rng.random() < noise else None for _ in range(TESTS)]
    tests = [self_test(rng, one) for one in kinds]
    results = [[int(all(answers[i] == want for i, want in t.items())) for t in tests] for answers in codes]
    return results, [not any(answers) for answers in codes], [one is None for one in kinds]


def counted(found: dstc.Selection, right: Sequence[bool], sound: Sequence[bool]) -> tuple[bool, ...]:
    """What `COUNTED` names, of one pair."""
    good, bad = right[found.chosen_code], not right[found.rejected_code]
    return good, bad, good and bad, sound[found.chosen_test], sound[found.rejected_test]


def run(kind: str, noise: float, seed: int, instructions: int) -> list[dict[str, tuple[bool, ...]]]:
    """For each instruction, what is counted by selection; a selection that skips it is missing."""
    rng, rows = random.Random(f"dstc/{kind}/{noise}/{seed}"), []
    for number in range(instructions):
        results, right, sound = instruction(rng, kind, noise)
        row = {}
        for how in dstc.SELECTIONS:
            with contextlib.suppress(dstc.Skipped):
                row[how] = counted(dstc.select(results, how, seed=f"{seed}/{number}"), right, sound)
        rows.append(row)
    return rows


def share(values: Sequence[float]) -> dict[str, float]:
    """Mean with the half width of its 95 % interval (normal, over instructions)."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    return {"mean": mean, "half_width": 1.96 * math.sqrt(variance / len(values)), "n": len(values)}


def summary(by_seed: Sequence[Sequence[dict[str, tuple[bool, ...]]]]) -> dict[str, Any]:
    """Shares by selection over all seeds, their range over seeds, and differences from minimax on common instructions."""
    rows = [row for rows in by_seed for row in rows]
    found: dict[str, Any] = {}
    for how in dstc.SELECTIONS:
        own = [row[how] for row in rows if how in row]
        shares: dict[str, Any] = {name: share([float(v[i]) for v in own]) for i, name in enumerate(COUNTED)}
        both = [[row[how][2] for row in one if how in row] for one in by_seed]
        common = [row for row in rows if how in row and "minimax" in row]
        found[how] = shares | {
            "pairs": share([float(how in row) for row in rows]),
            "both_by_seed": [sum(values) / len(values) for values in both],
            "minimax_minus_this": {
                name: share([float(row["minimax"][i]) - float(row[how][i]) for row in common])
                for i, name in enumerate(COUNTED)
            },
        }
    return found


def main() -> None:
    """Runs every noise, prints a table and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instructions", type=int, default=1000, help="of each seed")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    print(f"{'corrupted':24}{'selection':12}{'pairs':>8}" + "".join(f"{name:>22}" for name in COUNTED))
    for kind, noises in NOISES.items():
        for noise in noises:
            key = f"{kind} {noise:.2f}"
            found[key] = summary([run(kind, noise, seed, args.instructions) for seed in SEEDS])
            for how, numbers in found[key].items():
                cells = "".join(f"{numbers[n]['mean']:15.3f} ±{numbers[n]['half_width']:.3f}" for n in COUNTED)
                print(f"{key:24}{how:12}{numbers['pairs']['mean']:8.3f}{cells}")
    settings = {
        "seeds": list(SEEDS),
        "instructions": args.instructions,
        "codes": CODES,
        "tests": TESTS,
        "inputs": INPUTS,
    }
    write_json(args.out, {"machine": machine(), "settings": settings | {"shown": SHOWN}, "results": found})


if __name__ == "__main__":
    main()
