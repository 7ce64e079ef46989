"""Do SFT and KTO before GRPO pay? For `tests.bench.preference`.

Three chains of the recipe `sandbox_stages` with the same GRPO stage, for the same number of GRPO steps: GRPO alone, SFT then
GRPO, SFT then KTO then GRPO. Asked: accuracy and validity at the end on the same held-out problems, and the first GRPO step
whose accuracy (training rollouts, mean of `WINDOW` steps) reaches a level; the card expects fewer steps with KTO than
without. The stages before GRPO are extra training.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.common import quiet

quiet()

import yaml  # noqa: E402 - after the environment is set

from trl_ext.loops.pipeline import run_pipeline  # noqa: E402
from trl_ext.loops.stage_checks import stage_run  # noqa: E402
from trl_ext.loops.stages import load_pipeline  # noqa: E402
from trl_ext.recipe import find_recipe  # noqa: E402
from trl_ext.report import files  # noqa: E402
from trl_ext.settings import read_yaml  # noqa: E402

RECIPE = "sandbox_stages"
ARMS = {"grpo": ("grpo",), "sft+grpo": ("sft", "grpo"), "sft+kto+grpo": ("sft", "kto", "grpo")}
EVAL_SEED = 1_000_003
REWARD = "rewards/answer_correct/mean"
WINDOW = 3
"""Steps that are averaged: one rollout has 16 prompts, whose difficulty differs more than the policy of three steps."""
LEVELS = {"steps_to_0.4": 0.4, "steps_to_half": 0.5, "steps_to_0.6": 0.6}


def reached(values: Sequence[float], level: float, window: int = WINDOW) -> int | None:
    """The first step (from 1) at which the mean of the last `window` values is at least `level`; None if never."""
    for end in range(window, len(values) + 1):
        if sum(values[end - window : end]) / window >= level:
            return end
    return None


def recipe_of(arm: str, seed: int, folder: Path, steps: int | None = None, eval_rows: int = 100) -> Path:
    """The shipped recipe with the stages of one arm, all its seeds moved by `seed`; `steps` of GRPO unless None."""
    raw: dict[str, Any] = read_yaml(find_recipe(RECIPE).read_text())
    stages = {name: raw["stages"][name] for name in ARMS[arm]}
    for block in stages.values():
        block["dataset_options"]["seed"] += 10 * seed
    stages["grpo"] |= {"max_steps": steps} if steps else {}
    path = folder / f"{arm.replace('+', '_')}_{seed}.yaml"
    content = raw | {
        "stages": stages,
        "eval": {"rows": eval_rows, "seed": EVAL_SEED},
        "seed": 42 + seed,
        "output_dir": str(folder / path.stem),
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run(arm: str, seed: int, folder: Path, steps: int | None, eval_rows: int) -> dict[str, float]:
    """One chain: accuracy and validity at the end, and the GRPO steps to each level of `LEVELS` that was reached."""
    result = run_pipeline(load_pipeline(str(recipe_of(arm, seed, folder, steps, eval_rows))))
    out = Path(result.output_dir)
    state = json.loads((out / "pipeline.json").read_text())
    done = stage_run(out, f"{len(ARMS[arm])}_grpo")
    assert done is not None
    curve = files.series(files.read_log(done), REWARD)[1]
    scores = {measure: value["mean"] for measure, value in state["stages"][-1]["scores"].items()}
    found = {"accuracy": scores["accuracy"], "valid": scores["validity"]}
    at = {name: reached(curve, level) for name, level in LEVELS.items()}
    return found | {name: float(step) for name, step in at.items() if step is not None}


def stages(seed: int, steps: int | None, eval_rows: int) -> dict[str, dict[str, float]]:
    """The arms of one seed. `steps` are GRPO's, without it the recipe's."""
    with tempfile.TemporaryDirectory() as folder:
        return {arm: run(arm, seed, Path(folder), steps, eval_rows) for arm in ARMS}
