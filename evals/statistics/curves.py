"""What more replies to a question would give: unbiased pass@k, G-Pass@k and majority vote from K stored replies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from evals.result import Curve
from evals.stats import Scores, cluster_means, mean_interval, question_scores

SUBSETS = 200
"""Seeded subsets for a majority of k < K replies where more than two answers compete."""


def k_grid(replies: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to K, and K itself."""
    return tuple(sorted({2**i for i in range(replies.bit_length())} | {replies}))


def _check(right: int, replies: int, k: int) -> None:
    if not (0 <= right <= replies and 1 <= k <= replies):
        raise ValueError(
            f"{right} right of {replies} replies, k = {k}: need 0 <= right <= replies and 1 <= k <= replies"
        )


def pass_at_k(right: int, replies: int, k: int) -> float:
    """Chance that k of K replies, drawn without replacement, hold a right one: 1 - C(K - c, k) / C(K, k), computed as
    1 - prod_{i = K-c+1..K} (1 - k / i); unbiased for k fresh replies (arXiv 2107.03374).
    """
    _check(right, replies, k)
    if replies - right < k:
        return 1.0
    return 1.0 - math.prod(1 - k / i for i in range(replies - right + 1, replies + 1))


def g_pass_at_k(right: int, replies: int, k: int, threshold: float) -> float:
    """Chance that at least a share `threshold` in (0, 1] of k drawn replies is right (arXiv 2412.13147):
    P(X >= ceil(threshold k)) for the hypergeometric X; exact integers. Towards 0 it is pass@k.
    """
    _check(right, replies, k)
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold} must lie in (0, 1]")
    least = max(1, math.ceil(threshold * k - 1e-9))
    ways = sum(math.comb(right, x) * math.comb(replies - right, k - x) for x in range(least, min(right, k) + 1))
    return ways / math.comb(replies, k)


def pass_curve(scores: Scores, groups: Sequence[str] | None = None) -> Curve:
    """pass@k for k in `k_grid(K)`, averaged over questions (or clusters), with intervals as in `stats.estimate`.

    `scores` (N, K), each 0 or 1, else ValueError. k = K is the maximum over all replies: a count, not an expectation.
    """
    values = question_scores(scores)
    if not np.isin(values, (0, 1)).all():
        raise ValueError("pass@k: every score must be 0 or 1")
    replies = values.shape[1]
    right = values.sum(1).astype(int)
    grid = k_grid(replies)
    tables = [np.array([pass_at_k(c, replies, k) for c in right.tolist()]) for k in grid]
    mean, low, high = zip(*(mean_interval(cluster_means(table, groups), values.size) for table in tables), strict=True)
    return Curve(grid, mean, low, high)


def majority(answers: Sequence[str | None], scores: Sequence[float], k: int | None = None, seed: int = 0) -> float:
    """Score of the most frequent answer among k of the K replies (None: all), `answers` normalised, in their order.

    None casts no vote and cannot win; without votes 0. Ties: the answer that appears first. An answer's score is the mean
    over its replies. k < K: the mean over all subsets if at most two answers compete (multivariate hypergeometric; a tie
    counts half, since replies come in random order), else over `SUBSETS` seeded subsets.
    """
    _check(0, len(answers), k or len(answers))
    if len(scores) != len(answers):
        raise ValueError(f"majority: {len(answers)} answers and {len(scores)} scores")
    total: Counter[str] = Counter()
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            total[answer] += score  # type: ignore[assignment]  # a sum of scores
    counts = Counter(answer for answer in answers if answer is not None)
    value = {answer: total[answer] / counts[answer] for answer in counts}
    if k is None or k == len(answers):
        return _winner_score(answers, value)
    if len(counts) <= 2:
        return _two_classes(list(counts.items()), value, len(answers), k)
    rng = np.random.default_rng(seed)
    subsets = (np.sort(rng.choice(len(answers), size=k, replace=False)) for _ in range(SUBSETS))
    return float(np.mean([_winner_score([answers[i] for i in subset], value) for subset in subsets]))


def _winner_score(answers: Sequence[str | None], value: dict[str, float]) -> float:
    votes = Counter(answer for answer in answers if answer is not None)
    return value[max(votes, key=votes.__getitem__)] if votes else 0.0  # a Counter keeps the order of appearance


def _two_classes(counts: list[tuple[str, int]], value: dict[str, float], replies: int, k: int) -> float:
    """Mean winner's score over all subsets, for at most two answers and replies without one."""
    (one, m), (two, n) = (counts + [("", 0), ("", 0)])[:2]
    silent, total = replies - m - n, 0.0
    for x in range(min(m, k) + 1):
        for y in range(min(n, k - x) + 1):
            ways = math.comb(m, x) * math.comb(n, y) * math.comb(silent, k - x - y)
            share = 0.5 if x == y else float(x > y)
            won = share * value.get(one, 0.0) + (1 - share) * value.get(two, 0.0)
            total += ways * won if x + y else 0.0
    return total / math.comb(replies, k)
