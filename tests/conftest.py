"""Settings for the whole suite: offline, quiet, one thread (tiny models are faster so, and sums have one order)."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CI"] = "1"  # TRL sends no telemetry from CI

import datasets
import pytest
import torch
import transformers


def pytest_configure() -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
