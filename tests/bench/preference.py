"""Learning benches of methods for preference data, of loops and of pipelines:

    python -m tests.bench.preference NAME --seeds 5 --out DIR

Each bench trains every arm of one comparison for one seed and returns its numbers by arm. One JSON file for each holds
all seeds, the interval of each number and of its paired difference to the first arm, and what became of the cards' claims.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.common import Interval, machine, quiet, say, t_interval, write_json

quiet()

from transformers import PrinterCallback  # noqa: E402 - after the environment is set

from tests.bench import preference_rounds as rounds  # noqa: E402
from tests.bench.claims import outcome  # noqa: E402
from tests.bench.dstc_model import dstc_arms  # noqa: E402
from tests.bench.dual_play import pasodoble  # noqa: E402
from tests.bench.stages import stages  # noqa: E402
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


def bco_udm(seed: int, steps: int | None, eval_rows: int) -> Arms:
    """BCO on labels whose thumbs-down prompts are mostly longer problems, with and without re-weighting them.

    Held out: problems as those that got thumbs up, which is where UDM matches the bad answers to.
    """
    thumbs_up = {1: 0.5, 2: 0.5}  # `difficulty` of recipes/sandbox_bco.yaml
    arms = {"bco": {}, "bco, UDM": {"udm": True, "prompt_sample_size": 512}}
    return {
        arm: trained("sandbox_bco", seed, ["--methods", json.dumps({"bco": settings})], steps, eval_rows, thumbs_up)
        for arm, settings in arms.items()
    }


@dataclass(frozen=True)
class Claim:
    """A card's words about a number of one arm: compared with the first arm, by seed, or with a number.

    `method`: in whose entry of the paper index it stands; None: in none.
    """

    method: str | None
    text: str
    arm: str
    number: str
    expected: str = "above"
    against: float | None = None


@dataclass(frozen=True)
class Bench:
    """`play(seed, steps, eval_rows)`, and what the cards claim."""

    play: Callable[[int, int | None, int], Arms]
    claims: tuple[Claim, ...]


ITERATES = tuple(
    Claim("dno", f"iterate {n} beats iterate {n - 1} by the judge", "alpha 0", f"win_rate/{n}", "above", 0.5)
    for n in (1, 2, 3)
)
BENCHES: Mapping[str, Bench] = {
    "bco_udm": Bench(
        bco_udm,
        (
            Claim("bco", "distribution matching helps where good and bad prompts differ", "bco, UDM", "accuracy"),
            Claim("bco", "the same for valid JSON", "bco, UDM", "valid"),
        ),
    ),
    "nesterov": Bench(
        rounds.nesterov,
        (
            *ITERATES,
            Claim("nesterov", "a higher reward after two rounds", "alpha 0.3", "held_out_score/2"),
            Claim(
                "nesterov",
                "two rounds reach what plain rounds reach in three",
                "alpha 0.3",
                "two_to_three",
                "not below",
                0.0,
            ),
        ),
    ),
    "dno": Bench(
        rounds.dno,
        (Claim("dno", "large-margin pairs beat all pairs at equal steps", "soft, large margin", "held_out_score/3"),),
    ),
    "kto_iterative": Bench(
        rounds.kto,
        (
            Claim(
                None,
                "the policy of the third round beats the first model",
                "kto",
                "win_rate_over_start/3",
                "above",
                0.5,
            ),
            Claim(None, "the third round still helps", "kto", "win_rate/3", "above", 0.5),
        ),
    ),
    "dstc": Bench(
        dstc_arms,
        (
            Claim(None, "minimax: more right code than before", "minimax", "pass_at_1_gain", "above", 0.0),
            Claim(
                None,
                "the same for instructions it did not learn from",
                "minimax",
                "pass_at_1_others_gain",
                "above",
                0.0,
            ),
            Claim(None, "more right code with minimax than with random pairs", "minimax", "pass_at_1"),
            Claim(None, "minimax chooses right code more often than random", "minimax", "chosen_right"),
        ),
    ),
    "pasodoble": Bench(
        pasodoble,
        (
            Claim(None, "the Solver improves without labels", "online", "accuracy_gain", "above", 0.0),
            Claim(None, "the pass rate moves towards the middle", "online", "from_middle", "below", 0.0),
            Claim(None, "not more rounds are skipped late than early", "online", "skipped_drop", "not below", 0.0),
            Claim(None, "diversity stays high", "online", "diversity_late", "above", 0.3),
        ),
    ),
    "stages": Bench(
        stages,
        (
            Claim(None, "the pipeline beats its last stage alone", "sft+kto+grpo", "accuracy"),
            Claim(
                None,
                "fewer GRPO steps to half right than without SFT and KTO",
                "sft+kto+grpo",
                "steps_to_half",
                "below",
            ),
        ),
    ),
}


def summary(by_seed: Sequence[Arms]) -> dict[str, Any]:
    """arm -> number -> its interval over the seeds that have it, and that of the paired difference to the first arm."""
    first = next(iter(by_seed[0]))
    found: dict[str, Any] = {}
    for arm in by_seed[0]:
        found[arm] = {}
        for key in dict.fromkeys(key for seed in by_seed for key in seed[arm]):
            having = [seed for seed in by_seed if key in seed[arm]]
            found[arm][key] = {"mean": vars(t_interval([seed[arm][key] for seed in having]))}
            pairs = [seed[arm][key] - seed[first][key] for seed in having if key in seed[first]]
            if arm != first and pairs:
                found[arm][key]["difference"] = vars(t_interval(pairs))
    return found


def judged(claim: Claim, found: Mapping[str, Any], first: str) -> dict[str, Any]:
    """What became of a claim, as the learning bench writes it."""
    said: dict[str, Any] = {
        "method": claim.method,
        "text": claim.text,
        "metric": claim.number,
        "expected": claim.expected,
    }
    said["against"] = first if claim.against is None else claim.against
    values = found.get(claim.arm, {}).get(claim.number, {}).get("difference" if claim.against is None else "mean")
    if values is None:
        return said | {"outcome": "not measured"}
    interval = Interval(**values)
    level = 0.0 if claim.against is None else claim.against
    said["found"] = f"{interval.text(1, 3, claim.against is None)}, {interval.n} seeds"
    return said | {"outcome": outcome(claim.expected, interval.low, interval.high, level)}


def result(name: str, by_seed: Sequence[Arms], about: Mapping[str, Any], tag: str = "") -> dict[str, Any]:
    """All that is stored of a bench; `tag` tells it from the same bench with other settings."""
    found, first = summary(by_seed), next(iter(by_seed[0]))
    claims = [judged(claim, found, first) for claim in BENCHES[name].claims]
    about = {**about, "machine": machine()}
    return {
        "bench": f"{name}{tag and ', '}{tag}",
        "about": about,
        "seeds": list(by_seed),
        "summary": found,
        "claims": claims,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="optimizer steps (of a round); without it those of the recipe")
    parser.add_argument("--eval-rows", type=int, default=200, help="held-out problems, where no recipe says")
    parser.add_argument("--tag", default="", help="end of the result's name, to keep it beside another setting's")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    by_seed: list[Arms] = []
    for seed in range(args.seeds):
        by_seed.append(BENCHES[args.bench].play(seed, args.steps, args.eval_rows))
        say(f"{args.bench}, seed {seed}: {json.dumps(by_seed[-1])}")
        about = {"steps": args.steps, "eval_rows": args.eval_rows}
        stored = args.out / f"preference_{args.bench}{args.tag and '_'}{args.tag}.json"
        write_json(stored, result(args.bench, by_seed, about, args.tag))


if __name__ == "__main__":
    main()
