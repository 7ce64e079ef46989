"""Every shipped recipe: the real ones are dry-run on a file with their data set's columns, the sandbox's train a little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_ext.executor import NoIsolation, make_executor
from trl_ext.loops.pipeline import run_pipeline
from trl_ext.loops.stages import is_pipeline, load_pipeline
from trl_ext.recipe import load_recipe
from trl_ext.run import train

FOLDER = Path(__file__).parents[1] / "recipes"
PATHS = [path for path in sorted(FOLDER.glob("*.yaml")) if not is_pipeline(str(path))]  # tests/loops/test_stages.py
REAL = [path for path in PATHS if not path.stem.startswith("sandbox")]
ROUNDS = {
    path for path in PATHS if "loop" in yaml.safe_load(path.read_text())
}  # tests/loops, tests/test_round_recipes.py
SANDBOX = [path for path in PATHS if path.stem.startswith("sandbox") and path not in ROUNDS]

TURNS = [{"role": "user", "content": "What is 1 + 1?"}]
REPLY = [{"role": "assistant", "content": "2"}]
MATHS = {"problem": "What is 1 + 1?", "solution": "It is $\\boxed{2}$."}
# The public columns of each data set, with our own text in them
COLUMNS: dict[str, dict[str, Any]] = {
    "DigitalLearningGmbH/MATH-lighteval": {**MATHS, "level": "Level 1", "type": "Algebra"},
    "open-r1/OpenThoughts-114k-math": {**MATHS, "source": "ours", "system": ""},
    "open-r1/DAPO-Math-17k-Processed": {"prompt": "What is 1 + 1?", "solution": "2", "ability": "MATH"},
    "openai/gsm8k": {"question": "What is 1 + 1?", "answer": "One and one.\n#### 2"},
    "OctoThinker/MegaMath-Web-Pro-Max": {"text": "One and one are two."},
    "data/deepscaler_hints.jsonl": {
        "question": "What is 1 + 1?",
        "answer": "2",
        **{f"{tier}_hints": ["count"] for tier in ("knowledge", "planning", "solution")},
    },
    "trl-lib/hh-rlhf-helpful-base": {"prompt": TURNS, "chosen": REPLY, "rejected": REPLY},
    "iamtarun/python_code_instructions_18k_alpaca": {
        "instruction": "Write a function that doubles.",
        "input": "4",
        "output": "def f(x): return 2 * x",
        "prompt": "Below is an instruction.",
    },
    "trl-lib/kto-mix-14k": {"prompt": TURNS, "completion": REPLY, "label": True},
    "HuggingFaceH4/ultrafeedback_binarized": {
        "prompt": "What is 1 + 1?",
        "chosen": TURNS + REPLY,
        "rejected": TURNS + REPLY,
        "messages": TURNS + REPLY,
        "score_chosen": 9.0,
        "score_rejected": 1.0,
    },
    "virl39k/with_images.parquet": {"question": "What is 1 + 1?", "answer": "2", "images": []},
}
ROWS = 1024
"""More prompts than any rollout takes."""


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_recipe_dry_run(path: Path, tmp_path: Path) -> None:
    """Columns, rewards, plan and schedule fit the data set as published; nothing is loaded or written."""
    name = load_recipe(str(path), ["--use_cpu", "true"]).script_args.dataset_name
    file = tmp_path / "rows.jsonl"
    rows = (COLUMNS[name] | {"number": number} for number in range(ROWS))
    file.write_text("\n".join(map(json.dumps, rows)))
    here = ["--dataset_name", str(file), "--dataset_config", "null", "--output_dir", str(tmp_path / "run")]
    recipe = load_recipe(str(path), ["--use_cpu", "true", *here])
    result = train(recipe, dry_run=True)
    assert result.plan is recipe.plan and "steps" in result.schedule
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["rows.jsonl"]


SMALL = {"max_steps": 2, "save_steps": 2, "eval_rows": 0, "dataset_options.n": 64}
SAMPLES = {"per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 24}


@pytest.mark.parametrize("path", SANDBOX, ids=lambda path: path.stem)
def test_sandbox_recipe_trains(path: Path, tmp_path: Path) -> None:
    """Two optimizer steps of the real recipe with a small batch: both are logged, weights are saved and load again."""
    raw = load_recipe(str(path))
    keys = SMALL | (SAMPLES if raw.trainer == "grpo" else {"per_device_train_batch_size": 8})
    keys |= {"output_dir": tmp_path / "run"}
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    result = train(load_recipe(str(path), words))
    losses = [entry["loss"] for entry in result.log_history if "loss" in entry]
    assert len(losses) == 2 and all(loss == loss for loss in losses)
    assert json.loads((tmp_path / "run" / "status.json").read_text()) == {"status": "finished"}
    assert (tmp_path / "run" / "adapter_model.safetensors").exists() or (
        tmp_path / "run" / "model.safetensors"
    ).exists()


A_ROUND = {"rounds": 1, "prompts_per_round": 12, "eval_prompts": 4, "eval_samples": 2, "num_samples": 4}
ROUND = {f"loop.iterative.{key}": value for key, value in A_ROUND.items()}
ROUND |= {"max_steps": 1, "per_device_train_batch_size": 4, "eval_rows": 0}
LOOPS: dict[str, dict[str, Any]] = {
    "sandbox_dno": ROUND,
    "sandbox_nesterov": ROUND,
    "sandbox_kto_iterative": ROUND,
    "sandbox_pasodoble": {"max_steps": 1, "per_device_train_batch_size": 16, "num_generations": 4, "eval_rows": 0},
}


def test_all_loops_are_here() -> None:
    assert set(LOOPS) == {path.stem for path in ROUNDS if path.stem.startswith("sandbox")}


@pytest.mark.parametrize("name", LOOPS)
def test_sandbox_loop_plays(name: str, tmp_path: Path) -> None:
    """One small round, and a model at its end."""
    keys = LOOPS[name] | {"output_dir": tmp_path / "run"}
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    train(load_recipe(name, words))
    assert json.loads((tmp_path / "run" / "status.json").read_text()) == {"status": "finished"}
    assert list((tmp_path / "run").glob("*.safetensors"))


def test_sandbox_stages_run(tmp_path: Path) -> None:
    """A step of each stage, and the report of all."""
    few = {"sft": 8, "kto": 8, "grpo": 16}
    words = [w for name, rows in few.items() for w in (f"--stages.{name}.per_device_train_batch_size", str(rows))]
    words += [w for name in few for w in (f"--stages.{name}.max_steps", "1")]
    words += ["--stages.grpo.num_generations", "4", "--eval.rows", "4", "--output_dir", str(tmp_path / "run")]
    result = run_pipeline(load_pipeline("sandbox_stages", words))
    stages = json.loads((Path(result.output_dir) / "pipeline.json").read_text())["stages"]
    assert [stage["steps"] for stage in stages[1:]] == [1, 1, 1]


def test_sandbox_dstc_runs(tmp_path: Path) -> None:
    """Enough demonstrations to write programs at all, then one step on the pairs of some instructions."""
    try:
        make_executor("auto")
    except NoIsolation as error:
        pytest.skip(f"nothing here can run a model's code safely: {error}")
    changed = {"sft.max_steps": 150, "sft.dataset_options.n": 4800, "dstc.dataset_options.n": 12, "dstc.max_steps": 1}
    changed |= {"dstc.loop.dstc.num_codes": 5, "dstc.loop.dstc.num_tests": 5, "dstc.per_device_train_batch_size": 2}
    words = [word for key, value in changed.items() for word in (f"--stages.{key}", str(value))]
    result = run_pipeline(load_pipeline("sandbox_dstc", [*words, "--output_dir", str(tmp_path / "run")]))
    stages = json.loads((Path(result.output_dir) / "pipeline.json").read_text())["stages"]
    assert [stage["steps"] for stage in stages[1:]] == [150, 1]
    pairs = list(Path(result.output_dir).glob("2_dstc/rounds/dstc/part-*/*pairs*"))
    assert pairs and any(path.read_text() for path in pairs)
