"""What methods cost per training step, against stock TRL in the same run: `python -m tests.bench.overhead`.

Scoring, loss, backward, clipping and optimizer on one fixed rollout (see `steps`); generation is the same for all and
left out.
Variants take turns (A B C A B C ...), so that a drift of the machine meets all of them; a ratio is the median over
rounds of variant / stock TRL of the same round. Nothing is asserted on wall time. Beside each ratio: the arithmetic
floor (`flops.floor_ratio`), and a TRACE that builds (B, T, V) log-probs for its KL. EPO's floor is stock TRL with its own
entropy bonus (`entropy_coef`): the gradient of the entropies adds no product, but four passes over every (tokens, V) tile
of TRL's CPU head. On a GPU they are part of a kernel that runs anyway.

Memory: most bytes of live tensors during a step above those before it (`steps.peak_bytes`), and what a method keeps
between steps. TRL's own projection tile (min(tokens, 4096) x 32,768 floats) is part of every row.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from tests.bench.common import RESULTS, machine, machine_text, quiet, say, spread, table, write_json

quiet()

from tests.bench import steps  # noqa: E402 - after the environment is set
from tests.bench.flops import Passes, Shape  # noqa: E402
from tests.bench.steps import Bench, Variant  # noqa: E402

MIB = 2**20
BASE = Shape(8, 32, 128, hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, intermediate=768, vocab=8192)
WIDE = Shape(8, 16, 32, hidden=64, layers=4, heads=2, kv_heads=1, head_dim=32, intermediate=192, vocab=151_936)
SHAPES = {"V = 8k": BASE, "V = 151,936": WIDE}
GROWN = {
    "T x 2": dataclasses.replace(BASE, completion=2 * BASE.completion),
    "rows x 2": dataclasses.replace(BASE, rows=2 * BASE.rows),
    "V x 4": dataclasses.replace(BASE, vocab=4 * BASE.vocab),
}
GROWN_LABELS = ("trl", "no method", "trace, 25% of rows", "trace, 100% of rows", "trace, 25% of rows, naive")
TINY = Shape(8, 16, 32, hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, intermediate=32, vocab=600)

Build = Callable[[Variant], Bench]


def measure(variants: Sequence[Variant], build: Build, rounds: int, passes: Passes) -> list[dict[str, Any]]:
    """Builds all variants, lets them take turns, then measures the memory of one step of each.

    The first variant is the one that the others are compared with. The first round is a warm-up and not counted.
    """
    benches = [build(variant) for variant in variants]
    seconds: list[list[float]] = []
    for turn in range(rounds + 1):
        seconds.append([bench.timed() for bench in benches])
        say(f"round {turn} of {rounds}: {sum(seconds[-1]):.1f} s")
    peaks = [steps.peak_bytes(bench.step) for bench in benches]
    rows = []
    for i, (bench, peak) in enumerate(zip(benches, peaks, strict=True)):
        own = [turn[i] for turn in seconds[1:]]
        ratios = [turn[i] / turn[0] for turn in seconds[1:]]
        rows.append(
            {
                "label": bench.variant.label,
                "seconds": dataclasses.asdict(spread(own)),
                "ratio": dataclasses.asdict(spread(ratios)),
                "floor": bench.floor(passes),
                "span_tokens": bench.span_tokens(),
                "peak_mib": peak / MIB,
                "peak_ratio": peak / peaks[0],
                "held_mib": bench.held_bytes() / MIB,
            }
        )
    return rows


def run_shape(shape: Shape, variants: Sequence[Variant], rounds: int) -> list[dict[str, Any]]:
    """Full training of a random model of this shape on the CPU."""
    model = steps.build_model(shape)
    with tempfile.TemporaryDirectory() as folder, steps.known(steps.NaiveTrace, steps.NaiveDgpo):
        return measure(variants, lambda v: Bench(v, shape, copy.deepcopy(model), folder), rounds, Passes())


def run(shapes: dict[str, Shape], grown: dict[str, Shape], rounds: int, only: Collection[str] = ()) -> dict[str, Any]:
    """All variants on `shapes`, a few of them on `grown`; `only` these beside stock TRL, if any are named."""
    every = steps.variants()
    if unknown := set(only) - {v.label for v in every}:
        raise SystemExit(f"no variant is called {', '.join(sorted(unknown))}")
    every = [v for v in every if not only or v.label in {*only, "trl", "trl again"}]
    few = [v for v in every if v.label in GROWN_LABELS]
    found = []
    for name, shape in {**shapes, **grown}.items():
        say(f"{name}: {shape}")
        rows = run_shape(shape, every if name in shapes else few, rounds)
        found.append({"name": name, "shape": dataclasses.asdict(shape), "variants": rows})
    return {"bench": "overhead", "machine": machine(), "rounds": rounds, "shapes": found}


def merged(stored: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of two runs, the newer one's first of each label; each ratio is to stock TRL in its own run."""
    new = {row["label"]: row for row in measured}
    kept = [new.pop(row["label"], row) for row in stored]
    return [*kept, *new.values()]


def shape_text(shape: dict[str, Any]) -> str:
    """'8 x (64 + 192) tokens, V 8,192, hidden 256, 4 layers'."""
    return (
        f"{shape['rows']} x ({shape['prompt']} + {shape['completion']}) tokens, V {shape['vocab']:,}, "
        f"hidden {shape['hidden']}, {shape['layers']} layers"
    )


def variant_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per variant."""
    header = ("variant", "step, s", "ratio", "quartiles", "floor", "peak, MiB", "peak ratio", "kept, MiB")
    return table(
        header,
        (
            (
                row["label"],
                f"{row['seconds']['median']:.3f}",
                f"{row['ratio']['median']:.3f}",
                f"{row['ratio']['low']:.3f} to {row['ratio']['high']:.3f}",
                f"{row['floor']:.3f}",
                f"{row['peak_mib']:.1f}",
                f"{row['peak_ratio']:.3f}",
                f"{row['held_mib']:.1f}",
            )
            for row in rows
        ),
    )


def markdown(result: dict[str, Any]) -> str:
    """The result as text for the README: a table for each shape, then the machine."""
    parts = [f"**{s['name']}** ({shape_text(s['shape'])})\n\n{variant_table(s['variants'])}" for s in result["shapes"]]
    foot = f"Median of {result['rounds']} rounds, variants taking turns. {machine_text(result['machine'])}."
    return "\n\n".join([*parts, foot])


def page(result: dict[str, Any]) -> str:
    """The whole result as a page of its own."""
    return f"# What a step costs\n\nWritten by `make docs` from overhead.json.\n\n{markdown(result)}\n"


def ratios(result: dict[str, Any]) -> str:
    """For the README: step time and peak memory of each variant over stock TRL's, in the shapes that have them all."""
    shapes = [shape for shape in result["shapes"] if shape["name"] in SHAPES or len(result["shapes"]) == 1]
    by_shape = [{v["label"]: v for v in shape["variants"]} for shape in shapes]
    head = ["variant", *(f"{what}, {s['name']}" for s in shapes for what in ("step", "peak memory"))]
    rows = []
    for label in by_shape[0]:
        found = [rows_of.get(label) for rows_of in by_shape]
        cells = [(f"{v['ratio']['median']:.3f}", f"{v['peak_ratio']:.3f}") if v else ("", "") for v in found]
        rows.append([label, *(cell for pair in cells for cell in pair)])
    foot = f"Median of {result['rounds']} rounds, variants taking turns. {machine_text(result['machine'])}."
    return f"{table(head, rows)}\n\n{foot}"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape and two rounds: does it work at all?")
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds per shape (default 9)")
    parser.add_argument(
        "--out", type=Path, help="JSON file (default tests/bench/results/overhead.json; none if quick)"
    )
    parser.add_argument("--shape", choices=SHAPES, help="measure this shape alone and put it into the stored result")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(";"),
        default=[],
        help="variants joined by semicolons, with --shape: their rows take the place of the stored ones",
    )
    args = parser.parse_args(words)
    if args.only and not args.shape:
        parser.error("--only replaces rows of one shape: name it with --shape")
    out = args.out or (None if args.quick else RESULTS / "overhead.json")
    if args.shape and out:
        result = json.loads(out.read_text())
        (measured,) = run({args.shape: SHAPES[args.shape]}, {}, result["rounds"], args.only)["shapes"]
        if args.only:
            (stored,) = (shape for shape in result["shapes"] if shape["name"] == args.shape)
            measured["variants"] = merged(stored["variants"], measured["variants"])
        result["shapes"] = [measured if shape["name"] == args.shape else shape for shape in result["shapes"]]
    else:
        result = run({"tiny": TINY}, {}, 2) if args.quick else run(SHAPES, GROWN, args.rounds)
    if out:
        write_json(out, result)
        say(f"written: {out}")
    sys.stdout.write(markdown(result) + "\n")


if __name__ == "__main__":
    main()
