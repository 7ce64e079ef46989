"""Best of n: the expected score of the completion that a (combined) reward would choose among n (arXiv 2310.02743).

Choosing and training use the same aggregation: score n replies or more with the reward function that training uses, and
with the gold reward, which knows better. For a recipe's `rewards: {reward_ensemble: {rewards: [json_valid, steps_true],
objective: wco}}`, with four replies to one prompt:

>>> from trl_ext.rewards import make_reward
>>> settings = {"rewards": ["json_valid", "steps_true"], "objective": "wco"}
>>> ensemble, gold = make_reward("reward_ensemble", settings), make_reward("answer_correct")
>>> replies = ['{"steps": ["1+2=3"], "answer": 3}', '{"steps": ["1+2=4"], "answer": 4}']
>>> replies += ['{"steps": ["1+2=3"], "answer": 4}', "It is 3."]
>>> proxy = torch.tensor(ensemble(prompts=["1+2"] * 4, completions=replies))  # 1, 0, 1, 0
>>> right = torch.tensor(gold(completions=replies, answer=["3"] * 4))  # 1, 0, 0, 0
>>> [round(best_of_n(proxy, right, n), 3) for n in (1, 2, 3, 4)]
[0.25, 0.417, 0.5, 0.5]
>>> [round(kl_best_of_n(n), 3) for n in (1, 2, 3, 4)]
[0.0, 0.193, 0.432, 0.636]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def best_of_n(proxy: Tensor, gold: Tensor, n: int) -> float:
    """E_n = mean over prompts of sum_{i=n..N} C(i-1, n-1) / C(N, n) g_(i), unbiased from N scored samples.

    `proxy`, `gold`: (N,) or (P, N); g_(i) is the gold score of the sample with the i-th lowest proxy score, so that E_n
    is the average over all C(N, n) subsets of the gold score of the subset's best. Samples with equal proxy scores share
    their mean gold score. ValueError unless 1 <= n <= N and all scores are finite.
    """
    proxy, gold = torch.atleast_2d(proxy).double(), torch.atleast_2d(gold).double()
    if proxy.shape != gold.shape:
        raise ValueError(f"proxy {tuple(proxy.shape)} and gold {tuple(gold.shape)} differ in shape")
    if not (proxy.isfinite().all() and gold.isfinite().all()):
        raise ValueError("best_of_n: a score is not finite; leave out samples that could not be scored")
    weights = coefficients(proxy.size(1), n)
    found = [weights @ _shared(p, g)[p.argsort(stable=True)] for p, g in zip(proxy, gold, strict=True)]
    return float(torch.stack(found).mean())


def coefficients(size: int, n: int) -> Tensor:
    """(N,): C(i-1, n-1) / C(N, n) for i = 1..N, which is 0 below n; the weights of samples sorted by the proxy."""
    if not 1 <= n <= size:
        raise ValueError(f"n is {n}: expected 1 to the number of samples, {size}")
    i = torch.arange(n, size + 1, dtype=torch.float64)
    logs = _log_choose(i - 1, n - 1) - _log_choose(torch.tensor(float(size), dtype=torch.float64), n)
    return torch.cat([torch.zeros(n - 1, dtype=torch.float64), logs.exp()])


def kl_best_of_n(n: int) -> float:
    """KL(best of n || base policy) = log n - (n - 1)/n, in nats."""
    if n < 1:
        raise ValueError(f"n is {n}: expected at least 1")
    return math.log(n) - (n - 1) / n


def _log_choose(top: Tensor, bottom: int) -> Tensor:
    return torch.lgamma(top + 1) - math.lgamma(bottom + 1) - torch.lgamma(top - bottom + 1)


def _shared(proxy: Tensor, gold: Tensor) -> Tensor:
    """(N,) gold scores, each the mean over the samples of the same proxy score."""
    _, which, count = proxy.unique(return_inverse=True, return_counts=True)
    return torch.zeros(len(count), dtype=gold.dtype).index_add(0, which, gold)[which] / count[which]
