"""Every command and every piece of code in the README runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import trl_ext
from tests.tiny import grpo_args, letters_reward, prompts, tiny_path
from trl_ext import run_folder
from trl_ext.methods import METHODS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
SMALL = "--max_steps 2 --eval_rows 16 --per_device_train_batch_size 32 --gradient_accumulation_steps 1"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line]
ELSEWHERE = {
    "make test": "is what runs this test",
    "make bench-gpu": "tests/test_bench.py, and a GPU where there is one",
}
LONG = {
    "make bench-overhead": "--quick",
    "make bench-learning METHODS=trace": "--quick",
    "make bench-evals": "--quick",
    'make bench-preference ARGS="bco_udm --seeds 5 --out bench_out"': "bco_udm --seeds 1 --steps 2 --eval-rows 8",
}
FEW = "--limit 6 --samples 2"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A short run and two reports on it, in the places of those that the README names."""
    folder = tmp_path_factory.mktemp("evaluated")
    run_there(f"trl-ext train sandbox_trace {SMALL} --output_dir {folder}/runs/sandbox_trace")
    for name in ("sandbox_trace", "sandbox_trace-2"):
        words = f"--tasks sandbox_json {FEW} --store {folder}/replies --out {folder}/evals_out/{name}"
        run_there(f"trl-ext eval {folder}/runs/sandbox_trace {words}")
    return folder


def run_there(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trl_ext", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    """The command as it stands, made short: fewer steps for training, --quick for benches. Output goes to `folder`."""
    words = shlex.split(command)
    small = f"{SMALL} --output_dir {folder}/run"
    few = f"{FEW} --store {folder}/replies --out {folder}/report"
    if words[:2] == ["make", "train"]:
        words.append(f"ARGS={small}")
    elif command in LONG:
        words.append(f"ARGS={LONG[command]} --out {folder}/bench")
    elif words[:2] == ["trl-ext", "train"]:
        words += small.split()
    elif words[:2] == ["make", "eval"]:
        words = [*(w for w in words if not w.startswith("ARGS=")), f"ARGS={few} {command.partition('ARGS=')[2]}"]
    elif words[:2] == ["trl-ext", "eval"]:
        words += few.split()
    elif words[:2] == ["trl-ext", "publish"]:
        words += ["--out", f"{folder}/published"]
    if words[0] == "trl-ext":
        words = [sys.executable, "-m", "trl_ext", *words[1:]]
    return subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ELSEWHERE and "--resume" not in c])
def test_command(command, tmp_path, evaluated):
    for name in ("runs/", "evals_out/"):
        command = command.replace(name, f"{evaluated}/{name}")
    if command.startswith("make") and not (ROOT / ".venv/.dev").exists():
        pytest.skip("make would build .venv inside a test; `make test` has built it already")
    done = run(command, tmp_path)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert len(done.stdout) > 100


@pytest.mark.slow
def test_resume_command(tmp_path):
    """After a kill between steps 1 and 2, --resume goes on from step 1 and finishes the run."""
    (command,) = [c for c in COMMANDS if "--resume" in c]
    before = command.replace(" --resume", "") + " --save_strategy steps --save_steps 1 --save_total_limit 5"
    assert run(before, tmp_path).returncode == 0
    shutil.rmtree(tmp_path / "run/checkpoint-2")
    run_folder.mark(str(tmp_path / "run"), "running")
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert steps[:2] == [1, 2] and (tmp_path / "run/report.md").exists()
    assert run(command, tmp_path).returncode == 2, "a finished run has nothing to resume"


def test_all_commands_are_known():
    assert set(ELSEWHERE) <= set(COMMANDS) and set(LONG) <= set(COMMANDS)
    assert all(shlex.split(c)[0] in ("make", "trl-ext") for c in COMMANDS)


@pytest.mark.slow
def test_the_script_runs(tmp_path, monkeypatch):
    script = next(block for block in blocks("python") if "GRPOTrainer" in block)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(script, "README.md", "exec"), scope)
    assert scope["trainer"].state.global_step == 2
    logged = {key.split("/")[0] for entry in scope["trainer"].state.log_history for key in entry}
    assert {"trace", "high_entropy"} <= logged


def test_the_example_paper_trains(tmp_path, monkeypatch):
    code = next(block for block in blocks("python") if "class Raft" in block)
    module = type(sys)("raft_example")
    monkeypatch.setitem(sys.modules, "raft_example", module)
    module.__dict__["__name__"] = "raft_example"
    exec(compile(code, "README.md", "exec"), module.__dict__)
    monkeypatch.setitem(METHODS, "raft", module.Raft)
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), max_steps=1), methods={"raft": {"floor": "0.1"}})
    trainer = trl_ext.GRPOTrainer(tiny_path(), letters_reward, args, prompts())
    trainer.train()
    assert min(trainer._logs["advantages"]) == pytest.approx(0.1)
    assert 0 < trainer.state.log_history[0]["raft/cut"] < 1


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"`((?:trl_ext|tests|recipes)/[\w/.]+\.\w+)`", TEXT):
        if "raft" not in name:
            assert (ROOT / name).exists(), name
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT):
        assert (ROOT / name).exists(), name


def test_makefile_verbs_exist():
    verbs = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {shlex.split(c)[1] for c in COMMANDS if c.startswith("make")} <= verbs


def test_recipes_are_yaml():
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path.name
