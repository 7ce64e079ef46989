"""Two processes equal one, with every group split between them. DESIGN.md, invariant 2."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import distill_worker
from tests.distributed.launch import two_processes
from tests.distributed.worker import CASES, train
from tests.tiny import weights
from trl_ext.methods import METHODS


@pytest.fixture(scope="session")
def saved_by_two(tmp_path_factory):
    return two_processes("tests.distributed.worker", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(saved_by_two, tmp_path, case):
    saved = torch.load(saved_by_two / f"{case}.pt", weights_only=True)
    single = train(case, str(tmp_path), processes=1)
    moved = 0.0
    for name, value in weights(single).items():
        torch.testing.assert_close(saved["weights"][name], value, rtol=2e-3, atol=5e-5)
        moved += float(value.abs().sum())
    assert moved > 0
    for two, one in zip(saved["log"], single.state.log_history, strict=True):
        for key, value in two.items():
            if key.split("/")[0] in METHODS and "seconds" not in key:
                assert value == pytest.approx(one[key], rel=1e-3, abs=1e-5), key


# In this file, so that no two launches run at a time


@pytest.fixture(scope="module")
def distilled_by_two(tmp_path_factory):
    return two_processes("tests.distributed.distill_worker", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", distill_worker.CASES)
def test_two_processes_distil_as_one(distilled_by_two, tmp_path, case):
    saved = torch.load(distilled_by_two / f"{case}.pt", weights_only=True)
    single = distill_worker.train(case, str(tmp_path), processes=1)
    for name, value in weights(single).items():
        torch.testing.assert_close(saved["weights"][name], value, rtol=2e-3, atol=5e-5)
    compared = 0
    for two, one in zip(saved["log"], single.state.log_history, strict=True):
        for key in (key for key in two if key.startswith("paced/")):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key
            compared += 1
    assert compared > 30
