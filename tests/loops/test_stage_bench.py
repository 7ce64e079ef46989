"""The bench of staged pipelines: when a level is reached, and that its arms differ in their stages alone."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.bench.stages import ARMS, reached, recipe_of
from trl_ext.loops.stages import load_pipeline


def test_reached() -> None:
    """Means of two: 0.1, 0.5, 0.5, 0.2."""
    values = [0.0, 0.2, 0.8, 0.2, 0.2]
    assert [reached(values, level, 2) for level in (0.1, 0.3, 0.5, 0.6)] == [2, 3, 3, None]
    assert reached(values, 0.0, 6) is None, "there are fewer steps than the window"


def test_the_arms_share_their_grpo_stage(tmp_path: Path) -> None:
    raws = {arm: yaml.safe_load(recipe_of(arm, 3, tmp_path).read_text()) for arm in ARMS}
    assert [list(raw["stages"]) for raw in raws.values()] == [["grpo"], ["sft", "grpo"], ["sft", "kto", "grpo"]]
    assert len({str(raw["stages"]["grpo"]) for raw in raws.values()}) == 1
    assert {raw["seed"] for raw in raws.values()} == {45} and raws["grpo"]["stages"]["grpo"]["dataset_options"][
        "seed"
    ] == 30
    stages = load_pipeline(str(recipe_of("sft+kto+grpo", 0, tmp_path))).stages
    shipped = load_pipeline("sandbox_stages").stages
    assert [s.raw["dataset_options"] for s in stages] == [s.raw["dataset_options"] for s in shipped]


def test_steps_are_grpos_and_rows_the_evaluations(tmp_path):
    pipeline = load_pipeline(str(recipe_of("sft+grpo", 0, tmp_path, steps=8, eval_rows=30)))
    assert [stage.recipe.training_args.max_steps for stage in pipeline.stages] == [10, 8]
    assert pipeline.raw["eval"]["rows"] == 30
