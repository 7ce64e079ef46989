"""Trains PACED's distillation for test_distillation.py: started by torchrun, or called in one process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from tests.test_distillation import data, settings, teacher
from tests.tiny import tiny_path, weights
from trl_ext.distillation import PacedDistillationConfig, PacedDistillationTrainer

CASES: dict = {
    "sequence": {"switch_step": 1, "forward_responses": "student"},
    "token": {"loss_mean": "token", "paced_normalize": "max"},
}


def by_prompt(prompt_ids, *args, **kwargs):
    """Completions of different lengths that depend on the prompt alone."""
    return [[40 + sum(ids) % 30] * (2 + sum(ids) % 4) for ids in prompt_ids]


def train(case: str, folder: str, processes: int) -> PacedDistillationTrainer:
    """8 prompts a step, of all processes together; plain SGD, whose step is the gradient."""
    own = {"per_device_train_batch_size": 8 // processes, "optim": "sgd", "learning_rate": 0.1}
    own |= {"ddp_backend": "gloo"} if processes > 1 else {}
    args = PacedDistillationConfig(**settings(folder, **own, **CASES[case]))
    trainer = PacedDistillationTrainer(tiny_path(), teacher(), args, data())
    trainer._generate_single_turn = by_prompt
    trainer.train()
    return trainer


def main(out: str) -> None:
    tiny_path()  # before the processes join: from then on transformers saves on the first one only
    teacher()
    for case in CASES:
        trainer = train(case, out, processes=2)
        if trainer.accelerator.is_main_process:
            log = [{k: v for k, v in e.items() if "/" in k} for e in trainer.state.log_history]
            torch.save({"weights": weights(trainer), "log": log}, Path(out) / f"{case}.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # all is written; gloo's threads abort the interpreter's own exit now and then
