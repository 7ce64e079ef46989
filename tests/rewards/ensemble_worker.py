"""One of two processes that score with one ensemble: `python -m tests.rewards.ensemble_worker OUT` under torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from accelerate import PartialState

from trl_ext.rewards.reward_ensemble import make_reward_ensemble

BATCHES = [["a", "aaa", "aaaaa", "a"], ["aa", "aaaa", "a" * 9, "aaa"]]


def large(completions: list, **kwargs: object) -> list[float | None]:
    return [None if text == "aa" else 1000.0 * len(text) for text in completions]


def small(completions: list, **kwargs: object) -> list[float]:
    return [-0.001 * len(text) ** 2 for text in completions]


def score(rank: int, processes: int, normalize: str) -> list[list[float | None]]:
    """The rewards of this process's share of each batch, which is one prompt's."""
    reward = make_reward_ensemble([large, small], normalize=normalize)
    size = 4 // processes
    shares = [batch[rank * size : (rank + 1) * size] for batch in BATCHES]
    return [reward(prompts=["p"] * size, completions=share) for share in shares]


if __name__ == "__main__":
    state = PartialState(cpu=True)
    found = {name: score(state.process_index, 2, name) for name in ("running_z", "group_z")}
    Path(sys.argv[1], f"{state.process_index}.json").write_text(json.dumps(found))
    os._exit(0)  # all is written; gloo's threads abort the interpreter's own exit now and then
