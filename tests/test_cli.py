"""The command line from end to end: train, resume, dry run, plan, methods, and what a person sees of an error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.tiny import letters_reward, tiny_path
from trl_ext import cli
from trl_ext.cli import main
from trl_ext.run_folder import STATUS

SHIPPED = [  # pipelines are planned in tests/loops/test_stages.py
    path
    for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    if "\nstages:" not in path.read_text()
]
FAIL_AT: dict[str, Any] = {"call": 0, "with": RuntimeError}
CALLS = {"count": 0}


def shaky(completions: list, **kwargs: object) -> list[float]:
    """`letters_reward` that raises at call number FAIL_AT["call"]."""
    CALLS["count"] += 1
    if CALLS["count"] == FAIL_AT["call"]:
        raise FAIL_AT["with"]("the disk of the judge is full")
    return letters_reward(completions)


@pytest.fixture(autouse=True)
def _calls() -> None:
    CALLS["count"], FAIL_AT["call"], FAIL_AT["with"] = 0, 0, RuntimeError


def recipe(folder: Path, **keys: object) -> str:
    """A LoRA run of the tiny model on eight local rows, three steps of two groups of four."""
    rows = [{"problem": f"{i} + 1 =", "expected": str(i + 1)} for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model_name_or_path": tiny_path(),
        "dataset_name": str(folder / "rows.jsonl"),
        "columns": {"prompt": "problem", "answer": "expected"},
        "rewards": ["tests.test_cli.shaky"],
        "output_dir": str(folder / "run"),
        "use_peft": True,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        "save_steps": 1,
        "logging_steps": 1,
        "learning_rate": "1e-2",
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings | keys))
    return str(path)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_train_then_a_second_run_then_a_failed_one_that_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path)
    assert main(["train", path]) == 0
    shown = capsys.readouterr().out
    schedule = "2 prompts x 4 completions = 8 completions per rollout; one optimizer step per rollout"
    assert schedule in " ".join(shown.split())
    assert "Warning: step 2: 100% of the completions are cut off at max_completion_length 6" in shown
    first = tmp_path / "run"
    assert json.loads((first / STATUS).read_text()) == {"status": "finished"}
    log = [json.loads(line) for line in (first / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "reward" in entry] == [1, 2, 3]

    FAIL_AT["call"] = 3 + 3  # the third step of the next run
    assert main(["train", path]) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert "reward 'shaky' raised RuntimeError: the disk of the judge is full" in error and "Traceback" not in error
    second = tmp_path / "run-2"
    assert f"Continue from {second}/checkpoint-2 with: trl-ext train {path} --resume" in error

    assert main(["train", path, "--resume"]) == 0
    assert json.loads((second / STATUS).read_text()) == {"status": "finished"}
    assert not (tmp_path / "run-3").exists()
    uninterrupted, resumed = adapter(first), adapter(second)
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)
    assert any(value.abs().max() > 0 for name, value in resumed.items() if "lora_B" in name), "it learned"

    assert main(["train", path, "--resume"]) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert "nothing to resume" in error and f"{second} is finished" in error


def test_what_fails_between_two_checkpoints_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, save_steps=100)
    assert main(["train", path]) == 0
    CALLS["count"], FAIL_AT["call"] = 0, 3
    assert main(["train", path]) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert "the disk of the judge is full" in error and "Traceback" not in error
    assert f"Continue from {tmp_path}/run-2/checkpoint-2 with: trl-ext train {path} --resume" in error
    assert main(["train", path, "--resume"]) == 0
    uninterrupted, resumed = adapter(tmp_path / "run"), adapter(tmp_path / "run-2")
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_a_reward_that_hangs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FAIL_AT.update({"call": 2, "with": hang})
    assert main(["train", recipe(tmp_path, save_steps=100), "--reward_seconds", "0.5"]) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert "reward 'shaky' did not return within 0.5 seconds (reward_seconds)" in error and "Traceback" not in error
    assert f"Continue from {tmp_path}/run/checkpoint-1" in error
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["reward_seconds"] == 0.5


def hang(said: str) -> Exception:
    time.sleep(60)
    return RuntimeError(said)


def test_an_endpoint_that_is_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RODS asks it for rows at the end of an epoch of its pool, which is four rollouts of two."""
    endpoint = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "retries": 0, "judge": False}
    rods = {"synthesizer": endpoint, "evaluation": [], "low": 0.0, "high": 1.0, "retire": 1.0, "budget": 2}
    path = recipe(tmp_path, save_steps=100, max_steps=8, methods={"rods": rods})
    assert main(["train", path]) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert "rods: no new rows can be made" in error and "Traceback" not in error
    assert f"Continue from {tmp_path}/run/checkpoint-4" in error


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FAIL_AT.update({"call": 1, "with": KeyboardInterrupt})
    assert main(["train", recipe(tmp_path)]) == cli.INTERRUPTED
    assert "No checkpoint was written yet (every 1 steps: save_steps)" in capsys.readouterr().err


def test_the_sandbox_run_shows_numbers_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dataset_name", "sandbox/math", "--dataset_options", '{"n": 8}', "--rewards", "json_valid"]
    words += ["--max_steps", "1", "--eval_rows", "2", "--methods.high_entropy.quantile", "0.5"]
    path = recipe(tmp_path, columns=None)
    assert main(["train", path, *words]) == 0
    shown = capsys.readouterr().out
    assert "2 held-out problems" in shown and "high_entropy" in shown
    assert "most frequent kept tokens" in shown, "the method's own summary"
    resolved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert resolved["methods"]["high_entropy"]["quantile"] == 0.5
    assert resolved["dataset_options"] == {"n": 8}


def test_all_weights_are_saved_and_checked_without_an_adapter(tmp_path: Path) -> None:
    assert main(["train", recipe(tmp_path), "--no_use_peft", "--max_steps", "1"]) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()


OTHERS = {
    "dpo": {"dataset_name": "sandbox/preferences", "loss_type": ["bco", "sigmoid"], "methods": {"bco": {}}},
    "kto": {"dataset_name": "sandbox/labels", "loss_type": "bco", "methods": {"bco": {"udm": True}}},
    "kto_of_trl": {"dataset_name": "sandbox/preferences"},
    "sft": {"dataset_name": "sandbox/demos"},
}


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("case", OTHERS)
def test_the_other_trainers(tmp_path: Path, case: str, lora: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Planned, dry-run, trained, reported, resumed, saved and checked."""
    keys = OTHERS[case] | {"trainer": case.split("_")[0], "rewards": None, "columns": None, "use_peft": lora}
    path = Path(recipe(tmp_path, **keys, dataset_options={"n": 16}, eval_rows=0))
    content = {k: v for k, v in yaml.safe_load(path.read_text()).items() if not k.startswith(("num_gen", "max_comp"))}
    path.write_text(yaml.safe_dump(content))
    assert main(["plan", str(path)]) == 0 and main(["train", str(path), "--dry-run"]) == 0
    assert "8 pairs" in (shown := capsys.readouterr().out) or "8 replies" in shown
    assert main(["train", str(path)]) == 0
    whole, name = tmp_path / "run", "adapter_model.safetensors" if lora else "model.safetensors"
    assert (whole / "report.md").exists() and f"`{content['trainer']}` on" in (whole / "report.md").read_text()
    (tmp_path / "again").mkdir()
    shutil.copytree(whole / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    assert main(["train", str(path), "--resume", "--output_dir", str(tmp_path / "again")]) == 0
    first, second = (load_file(folder / name) for folder in (whole, tmp_path / "again"))
    assert first and all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(tmp_path.rglob("*"))
    path = recipe(tmp_path, model_name_or_path="nobody/nothing", methods={"high_entropy": None})
    assert main(["train", path, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert ["token", "weights", "high_entropy"] in [line.split() for line in shown.splitlines()]
    assert "3 steps see 6 prompts (0.8 epochs of 8 rows)" in shown
    assert "nothing was trained" in shown
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "tiny.yaml", tmp_path / "rows.jsonl"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], "unknown key 'learning_rat', did you mean 'learning_rate'?"),
        (["--methods", "tracee"], "unknown method 'tracee', did you mean 'trace'?"),
        (["--num_generations", "3"], "not a multiple of num_generations 3"),
        (["--columns.prompt", "question"], "there is no column 'question'"),
        (
            ["--columns.answer", "problem", "--rewards", "math_correct", "--per_device_train_batch_size", "64"],
            "has 8 rows",
        ),
        (["--rewards", "tests.test_cli.too_short"], "returned 1 values for 8 completions"),
        (["--rewards", "tests.test_cli.not_a_number"], "gave nan for row 0. Its completion: "),
        (["--model_name_or_path", "nobody/nothing"], "model_name_or_path: cannot load 'nobody/nothing'"),
        (["3"], "'3' belongs to no key"),
    ],
)
def test_an_error_for_the_user_is_one_plain_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["train", recipe(tmp_path), *words]) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def too_short(completions: list, **kwargs: object) -> list[float]:
    return [1.0]


def not_a_number(completions: list, **kwargs: object) -> list[float]:
    return [float("nan")] * len(completions)


def test_an_unknown_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "sandbox_grp"]) == cli.USAGE_ERROR
    assert "unknown recipe, did you mean 'sandbox_grpo'?" in capsys.readouterr().err


def test_a_fault_of_ours_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_ext.run.load_data", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", recipe(tmp_path)])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_plan_of_every_shipped_recipe(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "Schedule: " in shown and "GiB" in shown
    assert "completions per rollout" in shown or "per optimizer step" in shown
    methods = yaml.safe_load(path.read_text()).get("methods") or {}
    assert all(name in shown for name in methods)
    assert ("No method is named" in shown) == (not methods)


def test_methods_lists_and_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert "trace" in shown and "2605.10194" in shown and "high_entropy" in shown
    assert main(["methods", "trace"]) == 0
    shown = capsys.readouterr().out
    assert "https://arxiv.org/abs/2605.10194" in shown
    assert "FKL_t = sum_v q_t (log q_t - log p_t)" in shown, "the equation"
    assert "action = 'fkl_key'   one of fkl_key, rkl_error, both, none" in shown
    assert "coverage = 0.25   > 0, <= 1" in shown
    assert "default from: card: paper" in shown
    assert "Needs with these defaults: hidden, teacher" in shown and "Owns: teacher" in shown
    assert main(["methods", "tracee"]) == cli.USAGE_ERROR
    assert "did you mean 'trace'?" in capsys.readouterr().err


def test_it_is_a_module_too() -> None:
    command = [sys.executable, "-m", "trl_ext", "methods", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == cli.USAGE_ERROR and "unknown method 'nothing'" in done.stderr


def test_a_conflict_is_shown_on_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    for name, other in (("capo", "dgpo"), ("dgpo", "capo")):
        assert main(["methods", name]) == 0
        assert f"  {other}: capo predicts each token's step" in capsys.readouterr().out
