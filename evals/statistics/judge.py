"""The report on a judge: acc(k, T) with intervals over prompts, k*, T*, AUC, and whether selection over-optimises it.

Source: arXiv 2512.19905; estimators of one prompt in `evals.statistics.selection`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evals.statistics.curves import k_grid, majority, pass_at_k
from evals.statistics.selection import judge_auc, subset_accuracy

Array = NDArray[np.float64]

T_VALUES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Selection temperatures for judge scores from 0 to 10 (card: T from 0 to 10)."""
RESAMPLES = 1_000
"""Bootstrap resamples of prompts (card)."""


@dataclass(frozen=True)
class JudgeCurves:
    """What a judge is worth on P prompts with N replies each.

    `accuracy`, `low`, `high`: [T][k], means and 95 % percentile bootstrap over prompts. `best_k`[T]: smallest k within one
    standard error of the best; `best_t`[k] likewise the smallest T. `over_optimised`[T]: accuracy at the largest k lies
    below that at `best_k` by more than the interval of their difference. `relative`: T is in units of each prompt's SD of
    scores. `pass_at`, `vote`: by k, what a perfect judge and a majority would reach (None: scores are no 0 or 1, or no
    answers given). `auc`, `auc_within`: over all pairs of right and wrong replies, and over pairs of one prompt.
    """

    k: tuple[int, ...]
    temperatures: tuple[float, ...]
    relative: bool
    accuracy: tuple[tuple[float, ...], ...]
    low: tuple[tuple[float, ...], ...]
    high: tuple[tuple[float, ...], ...]
    best_k: tuple[int, ...]
    best_t: tuple[float, ...]
    over_optimised: tuple[bool, ...]
    pass_at: tuple[float, ...] | None
    vote: tuple[float, ...] | None
    auc: float | None
    auc_within: float | None

    @property
    def words(self) -> str:
        """The diagnosis in a sentence, for the sharpest selection that was asked for."""
        first, last = self.accuracy[0][0], self.accuracy[0][-1]
        at = self.k.index(self.best_k[0])
        auc = "unknown" if self.auc_within is None else f"{self.auc_within:.2f}"
        found = (
            f"judge's AUC within a prompt {auc}; accuracy {100 * first:.1f} % for one reply, "
            f"{100 * self.accuracy[0][at]:.1f} % at the best k = {self.best_k[0]}, {100 * last:.1f} % at k = {self.k[-1]} "
            f"(T = {self.temperatures[0]:g})"
        )
        return found + (": the judge is over-optimised, choose among fewer" if self.over_optimised[0] else "")


def judge_curves(
    scores: ArrayLike,
    correct: ArrayLike,
    k_values: Sequence[int] | None = None,
    temperatures: Sequence[float] = T_VALUES,
    relative: bool = False,
    answers: Sequence[Sequence[str | None]] | None = None,
    seed: int = 0,
) -> JudgeCurves:
    """Curves of a judge's (P, N) `scores` for replies that are `correct` (P, N) in [0, 1].

    `k_values` defaults to 1, 2, 4, ..., N. `relative`: multiply T by the SD of the prompt's scores (all equal: any T is the
    same), so that judges on different scales compare. `answers` (P, N) add the majority vote. The scores must not be the
    training reward that also decides `correct`: then the curve shows nothing. Raises ValueError for bad shapes.
    """
    r, c = np.asarray(scores, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if r.ndim != 2 or r.shape != c.shape or len(r) < 2:
        raise ValueError(
            f"judge: expected two (prompts, replies) tables, 2 prompts or more, got {r.shape} and {c.shape}"
        )
    ks, ts = tuple(k_values or k_grid(r.shape[1])), tuple(temperatures)
    if list(ks) != sorted(set(ks)) or list(ts) != sorted(set(ts)) or not ts:
        raise ValueError("judge: k_values and temperatures must increase")
    table = np.array([[[_one(r[p], c[p], k, t, relative, seed) for p in range(len(r))] for k in ks] for t in ts])
    drawn = np.random.default_rng(seed).integers(0, len(r), size=(RESAMPLES, len(r)))
    boot = table[:, :, drawn].mean(-1)  # (T, k, resamples)
    low, high = np.quantile(boot, [0.025, 0.975], axis=-1)
    means, errors = table.mean(-1), boot.std(-1)
    best_k = [_first_within(means[i], errors[i]) for i in range(len(ts))]
    best_t = [_first_within(means[:, j], errors[:, j]) for j in range(len(ks))]
    auc, within = judge_auc(list(r), list(c))
    return JudgeCurves(
        k=ks,
        temperatures=ts,
        relative=relative,
        accuracy=_rows(means),
        low=_rows(low),
        high=_rows(high),
        best_k=tuple(ks[j] for j in best_k),
        best_t=tuple(ts[i] for i in best_t),
        over_optimised=tuple(bool(np.quantile(boot[i, -1] - boot[i, j], 0.975) < 0) for i, j in enumerate(best_k)),
        pass_at=_oracle(c, ks),
        vote=_vote(answers, c, ks, seed),
        auc=auc,
        auc_within=within,
    )


def _one(r: Array, c: Array, k: int, temperature: float, relative: bool, seed: int) -> float:
    return subset_accuracy(r, c, k, temperature * float(r.std()) if relative else temperature, seed)


def _first_within(means: Array, errors: Array) -> int:
    """Index of the first value within one standard error (that of the maximum) of the maximum."""
    top = int(means.argmax())
    return int(np.argmax(means >= means[top] - errors[top] - 1e-12))


def _rows(values: Array) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in values.tolist())


def _oracle(c: Array, ks: Sequence[int]) -> tuple[float, ...] | None:
    if not np.isin(c, (0, 1)).all():
        return None
    right, n = c.sum(1).astype(int).tolist(), c.shape[1]
    return tuple(float(np.mean([pass_at_k(count, n, k) for count in right])) for k in ks)


def _vote(
    answers: Sequence[Sequence[str | None]] | None, c: Array, ks: Sequence[int], seed: int
) -> tuple[float, ...] | None:
    if answers is None:
        return None
    pairs = list(zip(answers, c.tolist(), strict=True))
    return tuple(float(np.mean([majority(given, row, k, seed) for given, row in pairs])) for k in ks)
