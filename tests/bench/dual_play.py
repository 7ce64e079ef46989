"""Does the Solver learn from the Proposer's questions, without labels? PasoDoble on the sandbox for `tests.bench.preference`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from tests.bench.common import quiet

quiet()

from trl_ext.recipe import load_recipe  # noqa: E402 - after the environment is set
from trl_ext.run import train  # noqa: E402

RECIPE = "sandbox_pasodoble"
PART = 5
"""First and last fifth of the rounds are compared."""


def pasodoble(seed: int, steps: int | None, eval_rows: int) -> dict[str, dict[str, float]]:
    """The online schedule for one seed: the Solver on `eval_rows` held-out problems after minus before, and the Proposer's
    pass rate, skipped rounds and diversity early and late. The held-out problems are the same for all seeds."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--output_dir", folder, "--seed", str(seed), "--dataset_options.seed", str(seed)]
        words += ["--eval_rows", str(eval_rows), "--save_strategy", "no", "--disable_tqdm", "true"]
        result = train(load_recipe(RECIPE, [*words, *(["--max_steps", str(steps)] if steps else [])]))
    found = {}
    for measure in ("accuracy", "validity"):
        before, after = (float(part.scores(measure).mean()) for part in (result.before, result.after))
        found |= {f"{measure}_before": before, measure: after, f"{measure}_gain": after - before}
    rounds = [entry for entry in result.log_history if "pasodoble/pass_rate" in entry]
    for name in ("pass_rate", "skipped", "diversity"):
        found |= _early_and_late(name, rounds)
    found["skipped_drop"] = found["skipped_early"] - found["skipped_late"]
    found["from_middle"] = abs(found["pass_rate_late"] - 0.5) - abs(found["pass_rate_early"] - 0.5)
    return {"online": found}


def _early_and_late(name: str, rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    values, part = [float(entry[f"pasodoble/{name}"]) for entry in rounds], max(1, len(rounds) // PART)
    early, late = fmean(values[:part]), fmean(values[-part:])
    return {f"{name}_early": early, f"{name}_late": late}
