"""What methods with a policy term of their own share: their flags, and the place of an optimizer step in its rollout.

A replaced policy term is zero advantages in TRL's own loss, so every flag that shapes TRL's term would do nothing. Such
a flag is refused rather than ignored. `rollouts` are counted by optimizer steps: where several rollouts make one step
they have one set of weights and count as one.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from trl_ext.method import LossInput, RunShape, Setup, overrides

UNUSED: dict[str, Any] = {
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "importance_sampling_level": "token",
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
}
"""Flags of TRL's policy term that have no effect on another one -> the defaults at which they must stay."""
SAME_MEAN = {"cispo": "dapo", "vespo": "dapo", "sapo": "grpo"}
"""Loss types that are a policy term of their own -> the one with the same denominators."""
_ALMOST = 1e-9  # steps per rollout may be a fraction such as 4/3


def unused_flags(args: Any) -> list[str]:
    """Messages for every flag of TRL's policy term that is not at its default, vLLM's correction among them."""
    problems = [
        f"{name}: {getattr(args, name)} shapes TRL's policy term, which is replaced; leave it at {default}"
        for name, default in UNUSED.items()
        if getattr(args, name, default) != default
    ]
    loss_type = getattr(args, "loss_type", None)
    if loss_type in SAME_MEAN:
        problems.append(
            f"loss_type {loss_type} is a policy term of its own, which is replaced; set loss_type: "
            f"{SAME_MEAN[loss_type]}, which has the same denominators"
        )
    if getattr(args, "use_vllm", False) and getattr(args, "vllm_importance_sampling_correction", False):
        problems.append(
            "TRL's vLLM correction does not reach a replaced policy term; set vllm_importance_sampling_correction: "
            "false (the old log-probs are then still the training model's)"
        )
    return problems


def inner_steps(args: Any) -> float | None:
    """m: optimizer steps on one rollout, as the config says; below 1 several rollouts make a step. None: not known."""
    if args is None:
        return None
    return args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps


def one_step_note(args: Any, what: str) -> str | None:
    """What to say where no rollout outlives its weights, so that `what` is always zero; None where one does."""
    m = inner_steps(args)
    if m is None or m > 1:
        return None
    return f"one optimizer step per rollout, so {what} is 0 and has no gradient; set num_iterations: 2 or more"


def others_that(setup: Setup, name: str, *hooks: str, before: bool = False) -> list[str]:
    """Other methods of the plan that change any of `hooks`; with `before` only those applied before `name`."""
    names = list(setup.methods)
    last = names.index(name) if before else len(names)
    return [m.name for m in setup.built[:last] if m.name != name and any(overrides(m, hook) for hook in hooks)]


def log_ratio(x: LossInput) -> Tensor:
    """d (B, T) = log pi_theta - log pi_old with the gradient of log pi_theta; 0 where TRL keeps no old log-probs."""
    return x.logps - (x.logps.detach() if x.old_logps is None else x.old_logps)


def rollout_index(step: int, run: RunShape) -> int:
    """k = 0, 1, ...: the rollout that optimizer step `step` (0, 1, ...) begins with."""
    return math.floor(step / max(1.0, run.steps_per_rollout) + _ALMOST)


def rollout_count(run: RunShape) -> int:
    """K: rollouts in the run, those that share their weights counted once."""
    return max(1, math.ceil(run.max_steps / max(1.0, run.steps_per_rollout) - _ALMOST))


def first_of_rollout(step: int, run: RunShape) -> bool:
    """Whether `step` is the first on its rollout, so that the weights are still those that sampled it."""
    return step == 0 or rollout_index(step, run) != rollout_index(step - 1, run)


def last_of_rollout(step: int, run: RunShape) -> bool:
    """Whether the next optimizer step begins another rollout."""
    return first_of_rollout(step + 1, run)
