"""From a training run's folder to what is evaluated, and the overlap of its training data with the questions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from evals import runs, training_data
from evals.models import BaseSpec, ModelError
from evals.task import Item
from tests.evals.test_models import adapter
from tests.tiny import tiny_path
from trl_ext import run_folder


def trained(folder: Path, seed: int = 0, **recipe: object) -> Path:
    """A finished run as `trl-ext train` leaves it: an adapter, its checkpoints, the resolved recipe."""
    adapter(folder, seed=seed)
    for step in (20, 100):
        adapter(folder / f"checkpoint-{step}", seed=step)
    content = {"model_name_or_path": tiny_path(), "seed": seed, "dtype": "float32", "model_revision": "main", **recipe}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    run_folder.mark(folder, "finished")
    return folder


def test_a_run_is_its_base_and_its_adapter(tmp_path: Path) -> None:
    plan = runs.plan_runs([trained(tmp_path / "a", chat_template_kwargs={"enable_thinking": False})], False, {})
    assert plan.base == BaseSpec(tiny_path(), dtype="float32")
    assert [(a.name, a.step) for a in plan.adapters] == [("a", None)]
    assert plan.template_settings == {"enable_thinking": False} and not plan.sandbox
    changed = runs.plan_runs([tmp_path / "a"], False, {"dtype": "bfloat16", "quantization": {"load_in_8bit": True}})
    assert (changed.base.dtype, changed.base.quantization) == ("bfloat16", {"load_in_8bit": True})


def test_the_base_is_quantised_as_in_training(tmp_path: Path) -> None:
    run = trained(tmp_path / "a", load_in_4bit=True, bnb_4bit_quant_type="nf4", use_bnb_nested_quant=True)
    found = runs.plan_runs([run], False, {}).base.quantization
    wanted = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert found is not None and wanted.items() <= found.items()
    json.dumps(found)  # it stands in the store's key


def test_checkpoints_become_a_curve_in_the_order_of_steps(tmp_path: Path) -> None:
    plan = runs.plan_runs([trained(tmp_path / "a")], True, {})
    assert [(a.name, a.step) for a in plan.adapters] == [("a-step20", 20), ("a-step100", 100)]


def test_runs_of_one_recipe_are_told_from_runs_of_two(tmp_path: Path) -> None:
    first, second = trained(tmp_path / "a"), trained(tmp_path / "b", seed=1)
    assert runs.plan_runs([first, second], False, {}).repeats
    other = trained(tmp_path / "c", seed=1, learning_rate=0.1)
    assert not runs.plan_runs([first, other], False, {}).repeats
    with pytest.raises(ModelError, match="compare runs of one base"):
        runs.plan_runs([first, trained(tmp_path / "d", dtype="bfloat16")], False, {})


def test_the_newest_finished_run_is_found(tmp_path: Path) -> None:
    assert runs.newest_run(tmp_path) is None
    for number, name in enumerate(("old", "new", "running")):
        run_folder.mark(tmp_path / name, "running" if name == "running" else "finished")
        os.utime(tmp_path / name / "status.json", (number, number))
    assert runs.newest_run(tmp_path) == tmp_path / "new"


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    run = trained(tmp_path / "a")
    for path in run.rglob("adapter_*"):
        path.unlink()
    with pytest.raises(ModelError, match="holds no trained weights"):
        runs.plan_runs([run], True, {})
    with pytest.raises(ModelError, match=r"--adapter .*checkpoint-20"):
        runs.plan_runs([run / "checkpoint-20"], False, {})


def test_an_adapter_alone_names_its_base(tmp_path: Path) -> None:
    folder = trained(tmp_path / "a")
    plan = runs.plan_parts(None, [str(folder), str(folder)], [], {})
    assert plan.base.model == tiny_path() and plan.names == ["a", "a-2"] and plan.runs == (folder, folder)


def test_an_adapter_that_is_a_run_is_loaded_as_it_was_trained(tmp_path: Path) -> None:
    folder = trained(tmp_path / "a", load_in_4bit=True, chat_template_kwargs={"x": 1})
    plan = runs.plan_parts(None, [str(folder)], [], {})
    assert plan.base.quantization and plan.base.dtype == "float32" and plan.template_settings == {"x": 1}
    other = trained(tmp_path / "b", load_in_4bit=True, learning_rate=0.5)
    assert not runs.plan_parts(None, [str(folder), str(other)], [], {}).repeats


def test_names_are_told_apart() -> None:
    assert runs.distinct(["a", "a", "a-2", "base"]) == ["a", "a-2", "a-2-2", "base-2"]


def test_training_texts_are_compared_with_the_questions(tmp_path: Path) -> None:
    question = "a farmer has three red barns and nine blue tractors in the northern field how many things"
    rows = [
        {"prompt": [{"role": "user", "content": question + "?"}], "answer": "12"},
        {"prompt": "else", "answer": "1"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    recipe = {
        "trainer": "grpo",
        "model_name_or_path": tiny_path(),
        "dataset_name": str(tmp_path / "train.jsonl"),
        "rewards": ["math_correct"],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    items = [
        Item("seen", "seen", [{"role": "user", "content": question}], "12"),
        Item("new", "new", [{"role": "user", "content": "what is the derivative of a constant"}], "0"),
    ]
    (words,) = training_data.overlaps([tmp_path], {"t": items})["t"]
    assert "1 of 2 prompts (50%)" in words and "seen (100%)" in words and "with the 1 training texts" in words
    (tmp_path / "train.jsonl").unlink()
    (words,) = training_data.overlaps([tmp_path], {"t": items})["t"]
    assert words.startswith(f"Not checked against {tmp_path.name}'s training data, which cannot be read")
