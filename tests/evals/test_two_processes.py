"""Two processes, each with its own copy of the model, draw the replies that one draws."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evals.report.files import load
from tests.evals.test_models import adapter
from tests.tiny import tiny_path
from trl_ext.cli import main

ROOT = Path(__file__).parents[2]
TASKS = ["--tasks", "aime_synth,mcq_synth", "--limit", "5", "--samples", "2", "--max-new-tokens", "8"]


def replies(folder: Path) -> list[dict]:
    lines = [line for path in folder.glob("evals_out/replies/*.jsonl") for line in path.read_text().splitlines()]
    return sorted((json.loads(line) for line in lines), key=lambda r: (r["prompt_hash"], r["sample"], r["text"]))


def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = adapter(tmp_path / "mine")
    words = ["eval", "--model", tiny_path(), "--adapter", str(one.folder), "--preset", "offline", *TASKS]
    (tmp_path / "two").mkdir()
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "trl_ext", *words]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path / "two",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "two").glob("evals_out/replies/*.1.jsonl"))) == 4, "the second process wrote its share"
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    assert main(words) == 0
    assert replies(tmp_path / "two") == replies(tmp_path / "one")
    both = [load(tmp_path / name / "evals_out" / "mine") for name in ("two", "one")]
    assert both[0].tasks == both[1].tasks and both[0].verdict == both[1].verdict
