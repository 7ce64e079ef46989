"""What a checkpoint of ours holds beside TRL's files, and which checkpoint is whole.

`methods.pt`: {"names", "states", "snapshots"}; `rollout_RANK.pt`: the micro-batch counter, the state of reward functions
(`trl_ext.rewards.stateful`) and, inside a generation window, the buffered micro-batches. Both are written before TRL
writes, so that they are part of a hub push, and read with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

METHODS_FILE = "methods.pt"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or does not belong to this run; the message says what to do."""


def rollout_file(rank: int) -> str:
    """Name of the file that holds one process's place in the generation window."""
    return f"rollout_{rank}.pt"


def step_of(folder: Path) -> int:
    """The optimizer step in a checkpoint folder's name, -1 if it has none."""
    tail = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(tail) if tail.isdigit() else -1


def is_whole(folder: str | Path) -> bool:
    """Whether everything was written. The trainer's state goes last, so a readable one means that the rest is there."""
    try:
        return "global_step" in json.loads((Path(folder) / "trainer_state.json").read_text())
    except (OSError, json.JSONDecodeError):
        return False


def last_whole(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint in `output_dir`, or None. One that was cut off by a kill is passed over."""
    folders = [f for f in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if f.is_dir() and is_whole(f)]
    newest = max(folders, key=step_of, default=None)
    return None if newest is None else str(newest)


def save(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Writes `content` so that a reader finds the old file or the whole new one."""
    temporary = f"{path}.part"
    torch.save(content, temporary)
    os.replace(temporary, path)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads tensors, numbers, text and containers of them; nothing in the file is executed."""
    return torch.load(path, map_location="cpu", weights_only=True)


def discard(folder: str | Path, output_dir: str | Path, cause: Exception) -> CheckpointError:
    """Removes a checkpoint that could not be finished; returns the error to raise."""
    shutil.rmtree(folder, ignore_errors=True)
    kept = last_whole(output_dir)
    free = shutil.disk_usage(output_dir).free / 2**20
    next_step = f"resume from {kept}" if kept else "no earlier checkpoint exists"
    return CheckpointError(
        f"could not write {folder} ({type(cause).__name__}: {cause}). It was removed; {next_step}. "
        f"Free space there: {free:.0f} MiB. Make room, or write less with `save_total_limit` or `save_only_model`."
    )
