"""PACED's distillation: two processes equal one in weights and in what they log."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.distill_worker import CASES, train
from tests.tiny import weights


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, *command, "-m", "tests.distributed.distill_worker", str(out)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(two_processes, tmp_path, case):
    saved = torch.load(two_processes / f"{case}.pt", weights_only=True)
    single = train(case, str(tmp_path), processes=1)
    for name, value in weights(single).items():
        torch.testing.assert_close(saved["weights"][name], value, rtol=2e-3, atol=5e-5)
    compared = 0
    for two, one in zip(saved["log"], single.state.log_history, strict=True):
        for key in (key for key in two if key.startswith("paced/")):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key
            compared += 1
    assert compared > 30
