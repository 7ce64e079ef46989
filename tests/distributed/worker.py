"""Trains the cases of test_two_processes.py and saves the weights: started by torchrun, or called in one process.

Completions are drawn from the global row number, so that one process and two see the same rollouts.
"""

from __future__ import annotations

import dataclasses

import torch
from accelerate import PartialState
from datasets import Dataset, load_from_disk

import trl_ext
from tests.distributed.launch import save_all
from tests.tiny import dpo_args, grpo_args, pairs, prompts, tiny_path
from trl_ext.dpo import DPOConfig, DPOTrainer

TRACE = {"action": "both", "annotator": "tests.tiny.annotate_first", "clip": None, "coverage": 0.5}
SAFE = {"kl_base": 0.0, "tau_low": 0.0, "tau_high": 0.0, "kl_short_ema": 0.0, "penalty_strength": 5.0}
CASES: dict = {
    "none": {"methods": None},
    "trace": {"methods": {"trace": TRACE}, "loss_type": "grpo"},
    "trace_dapo": {"methods": {"trace": TRACE | {"sync_every": 2}}},
    "high_entropy": {"methods": {"high_entropy": {}}},
    "dgpo": {"methods": {"dgpo": {"tau": 0.05}}, "loss_type": "grpo"},
    "dcpo": {"methods": {"dcpo": {"threshold": 0.5}}, "num_iterations": 2},
    "high_entropy_generation": {"methods": {"high_entropy": {"scope": "generation_batch"}}, "loss_type": "grpo"},
    "pgpo": {"methods": {"pgpo": {"pattern": "[0-9]+ .+ [0-9]+"}}, "num_iterations": 2},
    "capo": {"methods": {"capo": {"optim_model": "sgd", "tau_fisher": 0.05, "tau_hessian": 0}}, "loss_type": "grpo"},
    "velocity_rank": {"methods": {"velocity_rank": {"stride": 1}}, "loss_type": "grpo"},
    # 3 of 8 rollouts: one process keeps more, so the other one has fillers
    "d3s": {
        "methods": {"d3s": {"sample_start": 0.375, "sample_end": 0.375}},
        "loss_type": "grpo",
        "num_iterations": 2,
    },
    "d3s_kl": {"methods": {"d3s": {"scope": "generation_batch"}}, "beta": 0.1, "num_iterations": 2},
    "epo": {"methods": {"epo": {"coefficient": 0.1, "lower": 0.9, "upper": 1.1, "history": "turn"}}},
    "epo_step": {"methods": {"epo": {"coefficient": 0.1, "lower": 0.9, "upper": 1.1}}, "num_iterations": 2},
    "fg_expo": {"methods": {"fg_expo": {"sigma": 0.15, "factor": 0.5}}, "beta": 0.1, "loss_type": "grpo"},
    "real": {"methods": {"real": {}}, "num_iterations": 2},  # old log-probs, then torn groups forwarded again
    "real_bce": {"methods": {"real": {"form": "bce"}}, "num_iterations": 2, "loss_type": "grpo"},
    "group_dpo": {"methods": {"group_dpo": {}}, "num_iterations": 2},
    "group_dpo_step": {"methods": {"group_dpo": {"weight_at": "step"}}, "num_iterations": 2},
    "group_dpo_late": {"methods": {"group_dpo": {}}},  # no old log-probs, so one forward before the loss
    "mdpo": {"methods": {"mdpo": {"t": 0.3, "kl": "exact"}}, "num_iterations": 2},
    "mdpo_sequence": {
        "methods": {"mdpo": {"form": "sequence", "pmd": "partition", "tau": 0.2}},
        "loss_type": "grpo",
        "scale_rewards": "none",
        "num_iterations": 2,
    },
    "target_surrogate": {
        "methods": {"target_surrogate": {"eta": 0.6, "schedule": "adagrad", "divergence": "kl"}},
        "num_iterations": 2,
    },
    # Two groups of 4, one on each process: every bundle takes a response from both
    "riskpo": {
        "methods": {"riskpo": {"bundle_size": 2, "credit": "sum-mean"}},
        "num_generations": 4,
        "num_iterations": 2,
        "scale_rewards": "none",
    },
    # Its learning rate depends on the number of micro-batches over all processes, as the estimate does
    "oblr_po": {"methods": {"oblr_po": {"adapt_lr": False}}, "loss_type": "grpo", "scale_rewards": "none"},
    # At 0.8 the last kept entropy is unique here: the first tokens of one prompt tie, and row order would break the tie
    "both": {"methods": {"trace": TRACE, "high_entropy": {"quantile": 0.8}}},
    # The penalty acts as soon as the sampled KL is above 0
    "safe": {"methods": {"safe": SAFE}},
    "safe_critic": {
        "methods": {
            "safe": SAFE | {"kl_from": "rollout", "critic": True, "critic_gradient": "policy", "critic_lr": 0.05}
        },
        "loss_type": "grpo",
        "scale_rewards": "none",
    },
    "paced": {"methods": {"trace": TRACE, "paced": {"normalize": "none"}}, "loss_type": "grpo"},
    # One group of the first rollout fails and is rescued, one of the second is not: one trial each, on two processes
    "scaf_grpo": {
        "methods": {"scaf_grpo": {"columns": {"answer": "Hint"}, "warmup": 0.0, "threshold": 0.9}},
        "num_generations": 4,
        "num_iterations": 2,
        "max_steps": 4,
    },
    "dynamic_sampling": {
        "methods": {"dynamic_sampling": {"low": 0.45, "high": 0.6, "rounds": 2, "oversample": 1.5}},
        "num_generations": 4,
        "loss_type": "grpo",
    },
    "otc": {"methods": {"otc": {"threshold": 0.3}}, "num_iterations": 2},
    "hdpo": {"methods": {"hdpo": {"threshold": 0.3, "w_tool": 1.0}}, "num_iterations": 2},
    "fgrpo": {
        "methods": {
            "fgrpo": {"constraints": {"reward": 0.9}, "accuracy": "reward", "minimum": 1, "eta": 1.0, "whiten": False}
        },
        "loss_type": "grpo",
    },
    "paced_sampler": {"methods": {"paced": {"use": "sampler", "smoothing": 0.5}}, "loss_type": "grpo"},
    "rods": {  # 16 rollouts are an epoch: rows that the first process made are drawn by both after it
        "methods": {
            "rods": {
                "synthesizer": "tests.methods.test_rods.sums",
                "evaluation": [],
                "low": 0.0,
                "high": 1.0,
                "retire": 1.0,
                "similar": 1.0,
            }
        },
        "loss_type": "grpo",
        "max_steps": 24,
        "learning_rate": 0.01,
    },
}


PAIRS: dict = {
    "nesterov": {"methods": {"nesterov": {"alpha": 0.5}}},
    "nesterov_precomputed": {"methods": {"nesterov": {"alpha": 0.5}}, "precompute_ref_log_probs": True},
}
"""Cases of the DPO trainer."""


def other_model() -> str:
    """The tiny model with other weights; built before the processes join."""
    return tiny_path(initializer_range=0.4)


class FixedRollouts(trl_ext.GRPOTrainer):
    """Completions depend on the step and the global row only."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        first = self.accelerator.process_index * len(prompt_ids)
        rows = []
        for row in range(first, first + len(prompt_ids)):
            again = 500 * (num_generations == 1)  # a second attempt is another completion
            draw = torch.Generator().manual_seed(1000 * self.state.global_step + row + again)
            length = int(torch.randint(3, 7, (1,), generator=draw))
            rows.append(torch.randint(40, 90, (length,), generator=draw).tolist())
        return rows, None

    def _group(self, scored, advantages):
        """Tool calls are made up from the lengths: 0, 1 or 2."""
        group = super()._group(scored, advantages)
        calls = group.lengths.long() % 3
        return dataclasses.replace(group, tool_calls=calls, tool_turns=calls)


def reward(completions, **kwargs):
    """A smooth function of the text with verdicts on both sides of one half."""
    return [(sum(map(ord, c[0]["content"])) % 97) / 97 for c in completions]


def train_pairs(case: str, folder: str, processes: int) -> DPOTrainer:
    """8 pairs a step, of all processes together; plain SGD as in `train`."""
    settings = dict(PAIRS[case])
    methods = {name: dict(own) for name, own in settings.pop("methods").items()}
    if "nesterov" in methods:
        methods["nesterov"]["previous"] = other_model()
    kwargs = {"per_device_train_batch_size": 8 // processes, "optim": "sgd", "learning_rate": 0.1}
    kwargs |= {"ddp_backend": "gloo"} if processes > 1 else {}
    args = DPOConfig(**dpo_args(folder, **kwargs | settings), methods=methods)
    trainer = DPOTrainer(tiny_path(), args=args, train_dataset=pairs_on_disk(f"{folder}/pairs-{case}"))
    trainer.train()
    return trainer


def pairs_on_disk(folder: str) -> Dataset:
    """TRL's cache of precomputed log-probs lies beside the data, where all processes find it; not so in memory."""
    state = PartialState()
    if state.is_main_process:
        pairs(16).save_to_disk(folder)
    state.wait_for_everyone()
    return load_from_disk(folder)


def train(case: str, folder: str, processes: int) -> FixedRollouts | DPOTrainer:
    """One group of 8 per rollout unless the case says otherwise: with two processes it is split between them.

    Plain SGD: Adam's first steps follow the sign of a gradient, and so the last bit of one that is almost 0.
    """
    if case in PAIRS:
        return train_pairs(case, folder, processes)
    settings = dict(CASES[case])
    methods = settings.pop("methods")
    kwargs = {"num_generations": 8, "per_device_train_batch_size": 8 // processes, "optim": "sgd"}
    kwargs |= {"learning_rate": 0.1}
    kwargs |= {"ddp_backend": "gloo"} if processes > 1 else {}
    args = trl_ext.GRPOConfig(**grpo_args(folder, **kwargs | settings), methods=methods)
    trainer = FixedRollouts(tiny_path(), reward, args, prompts())
    trainer.train()
    return trainer


if __name__ == "__main__":
    other_model()
    save_all({**CASES, **PAIRS}, train)
