"""Do SFT and KTO before GRPO pay? `python -m tests.bench.stages --seeds 5 --out DIR`.

Three chains of the recipe `sandbox_stages` with the same GRPO stage, for the same number of GRPO steps: GRPO alone, SFT then
GRPO, SFT then KTO then GRPO. Asked: accuracy and validity at the end on the same held-out problems, and the first GRPO step
whose accuracy (training rollouts, mean of `WINDOW` steps) reaches a level; the card expects fewer steps with KTO than
without. The stages before GRPO are extra training, so their steps and seconds are reported as well.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.common import quiet, say, t_interval, write_json

quiet()

import yaml  # noqa: E402 - after the environment is set

from trl_ext.loops.pipeline import run_pipeline, stage_run  # noqa: E402
from trl_ext.loops.stages import load_pipeline  # noqa: E402
from trl_ext.recipe import find_recipe  # noqa: E402
from trl_ext.report import files  # noqa: E402
from trl_ext.settings import read_yaml  # noqa: E402

RECIPE = "sandbox_stages"
ARMS = {"grpo": ("grpo",), "sft+grpo": ("sft", "grpo"), "sft+kto+grpo": ("sft", "kto", "grpo")}
EVAL = {"rows": 100, "seed": 1_000_003}
REWARD = "rewards/answer_correct/mean"
WINDOW = 3
"""Steps that are averaged: one rollout has 16 prompts, whose difficulty differs more than the policy of three steps."""
LEVELS = (0.4, 0.5, 0.6)


def reached(values: Sequence[float], level: float, window: int = WINDOW) -> int | None:
    """The first step (from 1) at which the mean of the last `window` values is at least `level`; None if never."""
    for end in range(window, len(values) + 1):
        if sum(values[end - window : end]) / window >= level:
            return end
    return None


def recipe_of(arm: str, seed: int, folder: Path) -> Path:
    """The shipped recipe with the stages of one arm, all its seeds moved by `seed`."""
    raw: dict[str, Any] = read_yaml(find_recipe(RECIPE).read_text())
    stages = {name: raw["stages"][name] for name in ARMS[arm]}
    for block in stages.values():
        block["dataset_options"]["seed"] += 10 * seed
    path = folder / f"{arm.replace('+', '_')}_{seed}.yaml"
    content = raw | {"stages": stages, "eval": EVAL, "seed": 42 + seed, "output_dir": str(folder / path.stem)}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run(arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """One chain: scores after each stage, the GRPO curve, steps and seconds of training per stage."""
    cpu = time.process_time()
    result = run_pipeline(load_pipeline(str(recipe_of(arm, seed, folder))))
    out = Path(result.output_dir)
    state = json.loads((out / "pipeline.json").read_text())
    number = len(ARMS[arm])
    done = stage_run(out, f"{number}_grpo")
    assert done is not None
    curve = files.series(files.read_log(done), REWARD)[1]
    scores = {s["stage"]: {m: v["mean"] for m, v in s["scores"].items()} for s in state["stages"]}
    return {
        "scores": scores,
        "final": scores[f"{number}_grpo"],
        "grpo_curve": curve,
        "reached": {str(level): reached(curve, level) for level in LEVELS},
        "steps": {s["stage"]: s["steps"] for s in state["stages"][1:]},
        "seconds": {s["stage"]: s["seconds"] for s in state["stages"][1:]},
        "cpu_seconds": time.process_time() - cpu,
    }


def differences(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Final scores of one arm minus those of another, paired by seed, with the 95 % t interval over seeds."""
    found: dict[str, Any] = {}
    for first, second in (("grpo", "sft+kto+grpo"), ("sft+grpo", "sft+kto+grpo"), ("grpo", "sft+grpo")):
        for measure in ("accuracy", "validity"):
            pairs = zip(runs[first], runs[second], strict=True)
            change = [b["final"][measure] - a["final"][measure] for a, b in pairs]
            found[f"{second} - {first}: {measure}"] = {"by_seed": change, **vars(t_interval(change))}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all arms of all seeds and writes stages.json after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--out", required=True, help="folder for stages.json")
    args = parser.parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            for arm in ARMS:
                runs[arm].append(run(arm, seed, Path(folder)))
                say(f"seed {seed} {arm}: {runs[arm][-1]['final']}")
        summary = {"recipe": RECIPE, "eval": EVAL, "seeds": seed + 1, "cpus": os.cpu_count(), "runs": runs}
        write_json(out / "stages.json", summary | {"differences": differences(runs)})


if __name__ == "__main__":
    main()
