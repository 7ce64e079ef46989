"""Learning benches of loops in rounds: `python -m tests.bench.preference_rounds NAME --seeds 5 --out DIR`.

`dno`: the win rate of each iterate over the one before, and DNO's large-margin pairs against all pairs at equal steps.
`nesterov`: the held-out reward after rounds 1..3 with alpha 0 and 0.3 (arXiv 2410.06293). `kto`: success by round.

One JSON file for each bench holds all seeds, and for each number the mean over seeds with its 95 % interval; for the
second and later arms also the paired difference to the first.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.bench.common import quiet, say, t_interval, write_json

quiet()

from trl_ext.build import build_trainer, few_threads, load_tokenizer, model_path  # noqa: E402 - after quiet
from trl_ext.data import load_data  # noqa: E402
from trl_ext.recipe import load_recipe  # noqa: E402

Arms = dict[str, dict[str, float]]
SHOWN = (
    *("win_rate", "win_rate_over_start", "held_out_score", "length", "margin", "pairs", "prompts_without_pair"),
    *("labels", "desirable"),
)


def played(name: str, seed: int, *overrides: str) -> dict[str, float]:
    """Plays a sandbox recipe with data, samples and order drawn from `seed`: NUMBER/ROUND -> value."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--output_dir", folder, "--seed", str(seed), "--dataset_options.seed", str(seed)]
        recipe = load_recipe(name, [*words, "--save_strategy", "no", "--disable_tqdm", "true", *overrides])
        model = model_path(recipe)
        tokenizer = load_tokenizer(recipe, model)
        with few_threads(recipe):
            trainer = build_trainer(recipe, model, tokenizer, load_data(recipe))
            trainer.train()
        found = {}
        for entry in trainer.state.log_history:
            if "iterative/round" in entry:
                number = entry["iterative/round"]
                found |= {f"{k}/{number}": entry[f"iterative/{k}"] for k in SHOWN if f"iterative/{k}" in entry}
        return found


def dno(seed: int) -> Arms:
    """Soft labels on large-margin pairs, hard ones on the same pairs, and soft ones on all pairs, at equal steps."""
    hard = ("--methods.dno.variant", "prct", "--methods.dno.reward_scale", "1")
    return {
        "soft, rubric": played("sandbox_dno", seed),
        "hard, rubric": played("sandbox_dno", seed, *hard),
        "soft, all pairs": played("sandbox_dno", seed, "--loop.iterative.pairs", "all", *_without_rubric()),
    }


def _without_rubric() -> tuple[str, ...]:
    """The rubric's settings at their defaults, since `pairs: all` reads none of them."""
    return ("--loop.iterative.min_positive_score", "5", "--loop.iterative.student_margin", "1")


def nesterov(seed: int) -> Arms:
    """Plain iteration against anchors; equal data budgets, prompts and steps."""
    return {
        f"alpha {alpha:g}": played("sandbox_dno", seed, "--loop.iterative.nesterov", f'{{"alpha": {alpha:g}}}')
        for alpha in (0.0, 0.3)
    }


def kto(seed: int) -> Arms:
    """Iterative KTO by round."""
    return {"kto": played("sandbox_kto_iterative", seed)}


BENCHES: dict[str, Callable[[int], Arms]] = {"dno": dno, "nesterov": nesterov, "kto": kto}


def summary(by_seed: Sequence[Arms]) -> dict[str, Any]:
    """Arm -> number -> mean and 95 % interval over the seeds that have it, and its paired difference to the first arm."""
    found: dict[str, Any] = {}
    first = next(iter(by_seed[0]))
    for arm in by_seed[0]:
        found[arm] = {}
        for name in by_seed[0][arm]:
            values = [arms[arm][name] for arms in by_seed if name in arms[arm]]
            found[arm][name] = {"values": values} | _estimate(values)
            if arm != first and all(name in arms[arm] and name in arms[first] for arms in by_seed):
                found[arm][name]["difference"] = _estimate([a[arm][name] - a[first][name] for a in by_seed])
    return found


def _estimate(values: Sequence[float]) -> dict[str, Any]:
    """Mean, low, high, n; one seed has no interval."""
    return dataclasses.asdict(t_interval(values))


def main() -> None:
    """Runs one bench and writes DIR/NAME_rounds.json after every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    by_seed: list[Arms] = []
    for seed in range(args.seeds):
        by_seed.append(BENCHES[args.name](seed))
        say(f"{args.name}, seed {seed}: {by_seed[-1]}")
        content = {"bench": args.name, "seeds": list(range(seed + 1)), "by_seed": by_seed, "summary": summary(by_seed)}
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / f"{args.name}_rounds.json", content)


if __name__ == "__main__":
    main()
