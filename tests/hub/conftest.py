"""One tiny LoRA run, made by the command line once, and a Hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.hub.standin import TOKEN, Repo, StandIn, standing
from tests.tiny import tiny_path
from trl_ext import hub_errors
from trl_ext.cli import main

BASE = "qwen/tiny"


def recipe(folder: Path, **keys: object) -> str:
    """A LoRA run of the tiny model on eight local rows, one step of two groups of four."""
    rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model_name_or_path": tiny_path(),
        "dataset_name": str(folder / "rows.jsonl"),
        "rewards": ["tests.tiny.letters_reward"],
        "methods": {"high_entropy": {"quantile": 0.5}},
        "output_dir": str(folder / "my-run"),
        "use_peft": True,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 1,
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


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", recipe(folder)]) == 0
    return folder / "my-run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(trained, tmp_path / "my-run"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """A Hub that holds the base, with this process logged in; large files go the plain way, which can be recorded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_errors, "WAITS", (0.0, 0.0))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    with standing() as standin:
        monkeypatch.setenv("HF_ENDPOINT", standin.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        standin.repos[BASE] = Repo(files={"README.md": b"---\nlicense: apache-2.0\n---\n# tiny\n"})
        yield standin
