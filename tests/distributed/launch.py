"""Starts a worker module in two processes, and what such a module does: train every case and save it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from tests.tiny import tiny_path, weights
from trl_ext.cli import main


def two_processes(module: str, out: Path) -> Path:
    """Runs `module` under torchrun; what it saves is in `out`."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", module, str(out)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def accelerate_launch(config: str, words: list[str]) -> None:
    """`trl-ext WORDS` as `accelerate launch` with recipes/accelerate/CONFIG.yaml starts it, on the CPU.

    Fails, too, if a process ends its group while a wrapped model still holds it (`watched_end`).
    """
    root = Path(__file__).parents[2]
    path = root / "recipes" / "accelerate" / f"{config}.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(path), "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", __name__, *words, "--use_cpu", "true", "--ddp_backend", "gloo"],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def save_all(cases: Iterable[str], train: Callable[..., Any]) -> None:
    """The worker's side: each case's weights and log go to the folder that the command line names."""
    torch.set_num_threads(1)
    out = sys.argv[1]
    tiny_path()  # before the processes join: from then on transformers saves on the first one only
    for case in cases:
        trainer = train(case, out, processes=2)
        if trainer.accelerator.is_main_process:
            log = [{k: v for k, v in e.items() if "/" in k} for e in trainer.state.log_history]
            torch.save({"weights": weights(trainer), "log": log}, Path(out) / f"{case}.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    sys.stdout.flush()
    os._exit(0)  # all is written; gloo's threads abort the interpreter's own exit now and then


def watched_end(trainer: Trainer) -> None:
    """`Trainer.end`, once no model is left that DDP wraps.

    The destructor of gloo's group joins its thread. If a reducer is the last to hold the group, it does so with the
    GIL, for which the thread may be waiting: in one launch of five a process never ended.
    """
    alive = [type(o).__name__ for o in gc.get_objects() if isinstance(o, DistributedDataParallel)]
    assert not alive, f"{alive} outlive the process group"
    trainer.accelerator.end_training()


if __name__ == "__main__":  # a process of `accelerate_launch`
    Trainer.end = watched_end
    sys.exit(main())
