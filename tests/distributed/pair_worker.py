"""Trains DPO and KTO cases of test_two_processes.py and saves the weights: started by torchrun, or called in one process."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

import trl_ext
from tests.distributed.launch import save_all
from tests.tiny import dpo_args, labelled, pairs, tiny_path, tiny_tokenizer

UDM = {"udm": True, "prompt_sample_size": 7}  # an odd number of prompts: the processes embed different numbers
CASES: dict[str, dict[str, Any]] = {
    "bco_pairs": {"trainer": "DPO", "methods": {"bco": {}}, "loss_type": ["bco", "sigmoid"]},
    "bco_pairs_mean": {"trainer": "DPO", "methods": {"bco": {"shift": "running_mean"}}, "loss_type": "bco"},
    "bco_labels": {"trainer": "KTO", "methods": {"bco": {}}, "loss_type": "bco"},
    "dno_soft": {
        "trainer": "DPO",
        "methods": {"dno": {"variant": "soft", "reward_scale": 3}},
        "loss_type": ["dno", "sigmoid"],
    },
    "bco_udm": {"trainer": "KTO", "methods": {"bco": UDM}, "loss_type": "bco", "max_length": 64},
}


def data(trainer: str) -> Dataset:
    """24 rows: one process sees the first eight, or two the first four and the next four."""
    if trainer == "KTO":
        return labelled(24)
    return pairs(24).add_column("win_margin", [(i * 5 % 11 - 5) / 5 for i in range(24)])


def train(case: str, folder: str, processes: int) -> Any:
    """Three steps of eight rows in all, by plain SGD."""
    settings = dict(CASES[case])
    trainer = settings.pop("trainer")
    own = {"per_device_train_batch_size": 8 // processes, "optim": "sgd", "learning_rate": 0.01}
    own |= {"ddp_backend": "gloo"} if processes > 1 else {}
    args = getattr(trl_ext, f"{trainer}Config")(**dpo_args(folder, **own | settings))
    made = getattr(trl_ext, f"{trainer}Trainer")(
        tiny_path(), args=args, train_dataset=data(trainer), processing_class=tiny_tokenizer()
    )
    made.train()
    return made


if __name__ == "__main__":
    save_all(CASES, train)
