"""Learning benches of the methods for preference data: `python -m tests.bench.preference NAME --seeds 5 --out DIR`.

Each function of `BENCHES` trains every arm of one comparison for one seed and returns the numbers by arm. One JSON file
for each bench holds all seeds, the interval of each number, and that of its paired difference to the first arm.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.common import quiet, say, t_interval, write_json

quiet()

from transformers import PrinterCallback  # noqa: E402 - after the environment is set

from trl_ext.build import build_trainer, few_threads, load_tokenizer, model_path  # noqa: E402
from trl_ext.data import load_data  # noqa: E402
from trl_ext.recipe import load_recipe  # noqa: E402
from trl_ext.sandbox import evaluate  # noqa: E402
from trl_ext.sandbox.tasks import rows as task_rows  # noqa: E402

EVAL_SEED = 1_000_003
Arms = dict[str, dict[str, float]]


def trained(
    name: str, seed: int, overrides: Sequence[str], steps: int | None, eval_rows: int, difficulty: Mapping[int, float]
) -> dict[str, float]:
    """Trains a sandbox recipe with data and order drawn from `seed`: held-out numbers, and the last of each log entry.

    The held-out problems have levels of `difficulty`; they are the same for all seeds and arms.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = ["--output_dir", folder, "--seed", str(seed), "--dataset_options.seed", str(seed)]
        words += ["--save_strategy", "no", "--disable_tqdm", "true", "--logging_steps", "1", *overrides]
        recipe = load_recipe(name, [*words, *(["--max_steps", str(steps)] if steps else [])])
        model = model_path(recipe)
        tokenizer = load_tokenizer(recipe, model)
        with few_threads(recipe):
            trainer = build_trainer(recipe, model, tokenizer, load_data(recipe))
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            rows = task_rows(n=eval_rows, seed=EVAL_SEED, split="test", difficulty=difficulty)
            records = evaluate(trainer.accelerator.unwrap_model(trainer.model), tokenizer, rows, seed=EVAL_SEED)
        last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    n = len(records)
    held = {"accuracy": sum(r.correct for r in records) / n, "valid": sum(r.valid for r in records) / n}
    return {**held, **{key: value for key, value in last.items() if key.startswith(("rewards/", "bco/"))}}


def bco_udm(seed: int, steps: int | None = None, eval_rows: int = 200) -> Arms:
    """BCO on labels whose thumbs-down prompts are mostly longer problems, with and without re-weighting them.

    Held out: problems as those that got thumbs up, which is where UDM matches the bad answers to.
    """
    thumbs_up = {1: 0.5, 2: 0.5}  # `difficulty` of recipes/sandbox_bco.yaml
    arms = {"bco": {}, "bco, UDM": {"udm": True, "prompt_sample_size": 512}}
    return {
        arm: trained("sandbox_bco", seed, ["--methods", json.dumps({"bco": settings})], steps, eval_rows, thumbs_up)
        for arm, settings in arms.items()
    }


BENCHES: dict[str, Callable[..., Arms]] = {"bco_udm": bco_udm}


def summary(by_seed: Sequence[Arms]) -> dict[str, Any]:
    """arm -> number -> its interval over the seeds, and that of the paired difference to the first arm."""
    first = next(iter(by_seed[0]))
    found: dict[str, Any] = {}
    for arm in by_seed[0]:
        found[arm] = {}
        for key in [k for k in by_seed[0][arm] if all(k in seed[arm] for seed in by_seed)]:
            found[arm][key] = {"mean": vars(t_interval([seed[arm][key] for seed in by_seed]))}
            if arm != first and all(key in seed[first] for seed in by_seed):
                differences = [seed[arm][key] - seed[first][key] for seed in by_seed]
                found[arm][key]["difference"] = vars(t_interval(differences))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="optimizer steps; without it those of the recipe")
    parser.add_argument("--eval-rows", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    by_seed = []
    for seed in range(args.seeds):
        by_seed.append(BENCHES[args.bench](seed, args.steps, args.eval_rows))
        say(f"{args.bench}, seed {seed}: {json.dumps(by_seed[-1])}")
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"bench": args.bench, "steps": args.steps, "eval_rows": args.eval_rows, "seeds": by_seed}
    write_json(args.out / f"preference_{args.bench}.json", content | {"summary": summary(by_seed)})


if __name__ == "__main__":
    main()
