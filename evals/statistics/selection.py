"""A judge picks one of k replies: accuracy against k and T, the best of both, and what is wrong with the judge.

Source: arXiv 2512.19905. Reply i of k is chosen with probability w_i = softmax(r_i / T), r the judge's scores; T = 0 is
best-of-k, T -> infinity a random reply. A good judge makes accuracy rise with k; a biased one makes it rise and then fall.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

SUBSETS = 200
"""Random subsets for each prompt and k (recommended by the method's card)."""
ALL_UP_TO = 2_000
"""Up to this many subsets of size k, all are taken."""


def selection_weights(scores: ArrayLike, temperature: float) -> Array:
    """(..., k) judge scores -> (..., k) probabilities of being chosen, exp((r - max r) / T) normalised.

    T = 0: equal shares for all that tie for the maximum (the limit); T = infinity: 1 / k. Raises ValueError for T < 0 and
    for scores that are not finite.
    """
    r = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(r).all() or r.ndim == 0 or r.shape[-1] == 0:
        raise ValueError("judge scores: expected finite numbers, at least one")
    if not temperature >= 0:
        raise ValueError(f"selection temperature {temperature} must not be negative")
    below = r - r.max(-1, keepdims=True)
    w = (below == 0).astype(np.float64) if temperature == 0 else np.exp(below / temperature)
    return np.asarray(w / w.sum(-1, keepdims=True))


def selected_accuracy(scores: ArrayLike, correct: ArrayLike, temperature: float) -> float:
    """a = sum_i w_i c_i: expected correctness (c in [0, 1]) of the chosen reply; no choice is drawn."""
    r, c = _pool(scores, correct)
    return float(selection_weights(r, temperature) @ c)


def subset_accuracy(scores: ArrayLike, correct: ArrayLike, k: int, temperature: float, seed: int = 0) -> float:
    """acc(k, T) of one prompt: the mean of `selected_accuracy` over subsets of k of its N replies.

    Exact for k = 1, k = N, T = 0 (`best_of`) and where C(N, k) <= `ALL_UP_TO`; else over `SUBSETS` seeded subsets.
    """
    r, c = _pool(scores, correct)
    n = len(r)
    if not 1 <= k <= n:
        raise ValueError(f"k = {k}: need 1 <= k <= {n}, the replies there are")
    if k == 1 or math.isinf(temperature):
        return float(c.mean())
    if temperature == 0:
        return best_of(r, c, k)
    index = _subsets(n, k, seed)
    return float((selection_weights(r[index], temperature) * c[index]).sum(1).mean())


def best_of(scores: ArrayLike, correct: ArrayLike, k: int) -> float:
    """Unbiased best-of-k, T = 0: sum_{i=k..N} C(i-1, k-1) / C(N, k) c_(i), c sorted by ascending score.

    Replies of equal score share their weights: every one of them is as likely to be the chosen one.
    """
    r, c = _pool(scores, correct)
    n = len(r)
    if not 1 <= k <= n:
        raise ValueError(f"k = {k}: need 1 <= k <= {n}, the replies there are")
    _, level = np.unique(r, return_inverse=True)
    shared = (np.bincount(level, weights=c) / np.bincount(level))[level]
    weights = [math.comb(i, k - 1) / math.comb(n, k) for i in range(n)]  # C(i-1, k-1) for i counted from 1
    return float(np.array(weights) @ shared[np.argsort(level, kind="stable")])


def judge_auc(scores: Sequence[ArrayLike], correct: Sequence[ArrayLike]) -> tuple[float | None, float | None]:
    """P(score of a right reply > of a wrong one) + P(equal) / 2: over all pairs, and over pairs of one prompt only.

    The second is what selection uses: a judge that only knows which prompts are easy has the first. Right means
    c > 1/2. None where no such pair exists.
    """
    whole = _wins(
        np.concatenate([np.asarray(r, float) for r in scores]), np.concatenate([np.asarray(c, float) for c in correct])
    )
    inside = np.sum(
        [_wins(np.asarray(r, float), np.asarray(c, float)) for r, c in zip(scores, correct, strict=True)], axis=0
    )
    pooled, within = (float(won / pairs) if pairs else None for won, pairs in (whole, inside))
    return pooled, within


def _wins(r: Array, c: Array) -> tuple[float, int]:
    """(pairs won, ties counting half; pairs) of right against wrong replies, by ranks."""
    right, wrong = r[c > 0.5], np.sort(r[c <= 0.5])
    below, upto = np.searchsorted(wrong, right, "left"), np.searchsorted(wrong, right, "right")
    return float((below + upto).sum() / 2), len(right) * len(wrong)


def _pool(scores: ArrayLike, correct: ArrayLike) -> tuple[Array, Array]:
    r, c = np.asarray(scores, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if r.ndim != 1 or r.shape != c.shape or not len(r):
        raise ValueError(f"judge: expected a score and a verdict for each reply, got shapes {r.shape} and {c.shape}")
    if not ((c >= 0) & (c <= 1)).all():
        raise ValueError("judge: correctness must lie in [0, 1]")
    return r, c


def _subsets(n: int, k: int, seed: int) -> NDArray[np.int64]:
    if math.comb(n, k) <= ALL_UP_TO:
        return np.array(list(itertools.combinations(range(n), k)))
    return np.random.default_rng(seed).random((SUBSETS, n)).argpartition(k - 1, axis=1)[:, :k]
