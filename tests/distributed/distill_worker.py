"""Trains PACED's distillation for test_distillation.py: started by torchrun, or called in one process."""

from __future__ import annotations

from tests.distributed.launch import save_all
from tests.test_distillation import data, settings, teacher
from tests.tiny import tiny_path
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


if __name__ == "__main__":
    teacher()  # built before the processes join
    save_all(CASES, train)
