"""What normalising scores takes from all processes: their scores, and whole groups where one goes on in the next."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trl_ext.rewards.ensemble import group_z
from trl_ext.together import distributed, gathered

Run = tuple[Any, int]
"""A prompt, and how many completions of it follow one another."""


def of_all_processes(scores: Tensor) -> Tensor:
    """(k, B) of this process -> (k, all B) of all processes."""
    if not distributed():
        return scores
    return torch.cat(gathered([scores]), 1)


def whole_group_z(scores: Tensor, prompts: Sequence[Any], smallest: int, one_size: bool) -> Tensor:
    """(k, B) of this process -> (k, B): `group_z` in the groups of all processes, in whose order a group may go on."""
    if not distributed():
        return group_z(scores, _groups(_runs(prompts), smallest, one_size))
    parts = gathered([(scores.cpu(), _runs(prompts))])
    everyone = torch.cat([part for part, _ in parts], 1)
    found = group_z(everyone, _groups([run for _, runs in parts for run in runs], smallest, one_size))
    start = sum(part.size(1) for part, _ in parts[: torch.distributed.get_rank()])
    return found[:, start : start + scores.size(1)].to(scores.device)


def _runs(prompts: Sequence[Any]) -> list[Run]:
    return [(prompt, len(list(same))) for prompt, same in itertools.groupby(prompts)]


def _groups(runs: Sequence[Run], smallest: int, one_size: bool) -> Tensor:
    """(B,) number of the group of each completion: a run of equal prompts, or where all groups have `one_size`, the
    shortest run's, as many of them as a run holds.

    ValueError for groups below `smallest`, and for runs that are no whole groups.
    """
    joined = [sum(n for _, n in same) for _, same in itertools.groupby(runs, lambda run: run[0])]
    least = min(joined)
    if least < smallest:
        raise ValueError(
            f"normalize: group_z with this objective needs groups of at least {smallest} completions, here is one of "
            f"{least}; raise num_generations (in evaluations num_generations_eval), or use running_z, or none"
        )
    if one_size and any(n % least for n in joined):
        raise ValueError(
            f"normalize: group_z needs whole groups, here are {', '.join(map(str, joined))} completions of one prompt each; "
            "use running_z or none"
        )
    sizes = [least] * (sum(joined) // least) if one_size else joined
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
