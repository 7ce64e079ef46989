"""What methods with a policy term of their own share: log-ratios, and the place of an optimizer step in its rollout.

Rollouts are counted by optimizer steps: where several make one step they have one set of weights and count as one.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from trl_ext.method import LossInput, RunShape

_ALMOST = 1e-9  # steps per rollout may be a fraction such as 4/3


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


def log_ratio(x: LossInput) -> Tensor:
    """d (B, T) = log pi_theta - log pi_old with the gradient of log pi_theta; 0 where TRL keeps no old log-probs."""
    return x.logps - (x.logps.detach() if x.old_logps is None else x.old_logps)


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(B, T) -> (B,): mean over the row's loss tokens, 0 where there are none."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def two_pass(values: Tensor, slopes: Tensor, scores: Tensor) -> Tensor:
    """(B,) each -> scalar: the mean of `values`, with the gradient of the mean of `slopes` * `scores`."""
    return (values + slopes * (scores - scores.detach())).mean()


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
