"""Loops in rounds for `tests.bench.preference`: each function plays all arms of one comparison for one seed."""

from __future__ import annotations

import tempfile

from tests.bench.common import quiet

quiet()

from trl_ext.build import build_trainer, few_threads, load_tokenizer, model_path  # noqa: E402 - after quiet
from trl_ext.data import load_data  # noqa: E402
from trl_ext.recipe import load_recipe  # noqa: E402

Arms = dict[str, dict[str, float]]
SHOWN = (
    *("win_rate", "win_rate_over_start", "held_out_score", "length", "margin", "pairs", "prompts_without_pair"),
    *("labels", "desirable"),
)


def played(name: str, seed: int, steps: int | None, *overrides: str) -> dict[str, float]:
    """Plays a sandbox recipe with data, samples and order drawn from `seed`: NUMBER/ROUND -> value."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--output_dir", folder, "--seed", str(seed), "--dataset_options.seed", str(seed)]
        few = ["--max_steps", str(steps)] if steps else []
        recipe = load_recipe(name, [*words, "--save_strategy", "no", "--disable_tqdm", "true", *overrides, *few])
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


def dno(seed: int, steps: int | None, eval_rows: int) -> Arms:
    """Soft labels and hard ones on all pairs that differ, and soft ones on large-margin pairs alone, at equal steps.

    The recipe's rubric lets every pair through that differs (scores are 0, 1 or 2); a large margin is 2 against 0.
    """
    hard = ("--methods.dno.variant", "prct", "--methods.dno.reward_scale", "1")
    large = ("--loop.iterative.min_positive_score", "2", "--loop.iterative.student_margin", "2")
    return {
        "soft": played("sandbox_dno", seed, steps),
        "hard": played("sandbox_dno", seed, steps, *hard),
        "soft, large margin": played("sandbox_dno", seed, steps, *large),
    }


def nesterov(seed: int, steps: int | None, eval_rows: int) -> Arms:
    """Plain iteration against anchors (arXiv 2410.06293); equal data budgets, prompts and steps.

    two_to_three: the held-out score after two rounds minus that of plain iteration after three.
    """
    arms = {
        f"alpha {alpha:g}": played("sandbox_dno", seed, steps, "--loop.iterative.nesterov", f'{{"alpha": {alpha:g}}}')
        for alpha in (0.0, 0.3)
    }
    for arm in arms.values():
        arm["two_to_three"] = arm["held_out_score/2"] - arms["alpha 0"]["held_out_score/3"]
    return arms


def kto(seed: int, steps: int | None, eval_rows: int) -> Arms:
    """Iterative KTO by round."""
    return {"kto": played("sandbox_kto_iterative", seed, steps)}
