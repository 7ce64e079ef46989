"""A run on two processes whose reward or annotator fails on one of them alone, and the run that goes on: by torchrun."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import trl_ext
from tests.distributed.worker import FixedRollouts
from tests.distributed.worker import reward as right
from tests.tiny import annotate_first, grpo_args, prompts, tiny_path, weights
from trl_ext import checkpoints
from trl_ext.annotate import AnnotatorError
from trl_ext.rewards import RewardError, checked, make_reward

SAMPLING = {"dynamic_sampling": {"low": 0.45, "high": 0.6, "rounds": 2, "oversample": 1.5}}
TRACE = {
    "trace": {
        "action": "both",
        "annotator": "tests.distributed.failing_worker.annotate",
        "verifier": "first",
        "clip": None,
    }
}
CASES: dict[str, dict[str, Any]] = {
    "raises": {},
    "hangs": {"reward_seconds": 0.5},
    "waits": {"reward_seconds": 0.5},
    "ensemble": {"reward_seconds": 0.5},
    "refilled": {"methods": SAMPLING, "num_generations": 4},
    "annotated": {"methods": TRACE},
}
FAILS_ON = 1
"""The process that fails; the main one does not."""
STATE: dict[str, Any] = {}
"""The trainer, which case fails, and after which step."""


def failing(*cases: str) -> bool:
    """Whether this process is to fail now."""
    now = STATE["case"] in cases and STATE["trainer"].state.global_step == STATE["step"]
    return now and PartialState().process_index == FAILS_ON


def first(completions: list, **kwargs: Any) -> list[float]:
    if failing("raises", "refilled"):
        raise OSError("the judge is down")
    if failing("hangs", "ensemble"):
        time.sleep(60)
    return right(completions)


async def second(completions: list, **kwargs: Any) -> list[float]:
    if failing("waits"):
        await asyncio.sleep(60)
    return right(completions)


def annotate(requests: list) -> list:
    if failing("annotated"):
        raise AnnotatorError("nobody answers")
    return annotate_first(requests)


def train(case: str, folder: str, stop: int | None = None) -> FixedRollouts:
    """Four steps, or until it fails after step `stop`; goes on from what is in the folder."""
    settings = dict(CASES[case])
    methods = settings.pop("methods", None)
    kwargs = {"num_generations": 8, "per_device_train_batch_size": 4, "max_steps": 4, "ddp_backend": "gloo"}
    args = trl_ext.GRPOConfig(**grpo_args(folder, **kwargs | settings), methods=methods)
    rewards = [checked(first), checked(second)]
    if case == "ensemble":  # its members' scores are gathered in the call
        rewards[0] = make_reward("reward_ensemble", {"rewards": [first, right], "normalize": "running_z"})
    trainer = FixedRollouts(tiny_path(), rewards, args, prompts())
    STATE.update(trainer=trainer, case=case if stop else "", step=stop)
    trainer.train(resume_from_checkpoint=checkpoints.last_whole(folder))
    return trainer


def outcome(case: str, out: str) -> dict[str, Any]:
    """What was raised here, what was saved, and whether the resumed run equals one that never failed (None: not asked)."""
    folder, said = f"{out}/{case}-cut", ""
    try:
        train(case, folder, stop=2)
    except (RewardError, AnnotatorError) as error:
        said = f"{type(error).__name__}: {error}"
    PartialState().wait_for_everyone()
    saved, same = checkpoints.last_whole(folder), None
    if "reward_seconds" not in CASES[case]:
        whole, resumed = weights(train(case, f"{out}/{case}-whole")), weights(train(case, folder))
        same = all(torch.equal(value, resumed[name]) for name, value in whole.items())
    return {"said": said, "saved": saved and Path(saved).name, "same": same}


def main() -> None:
    torch.set_num_threads(1)
    tiny_path()  # before the processes join: from then on transformers saves on the first one only
    found = {case: outcome(case, sys.argv[1]) for case in CASES}
    torch.save(found, f"{sys.argv[1]}/process-{PartialState().process_index}.pt")
    PartialState().wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # as in tests.distributed.launch


if __name__ == "__main__":
    from tests.distributed import failing_worker

    failing_worker.main()  # the annotator is imported by this name, and both have one STATE
