"""From scored samples of one prompt to preference pairs (DNO, arXiv 2404.03715, algorithm 2). Pure functions.

n replies to one prompt: samples of the round's policy pi_t, and a teacher's reply if there is one. P (n, n) holds win
probabilities, P[i, j] of reply i over reply j, P[i, j] + P[j, i] = 1. The reward of a reply is its win rate,
r_t(i) = 1/(n-1) sum_{j != i} P[i, j], in [0, 1].
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
TYPES = ("teacher>student", "student>teacher", "student>student")
NGRAM = 4
"""Length of the n-grams that count as repetition (card: decision)."""


@dataclass(frozen=True)
class Pair:
    """Numbers of two replies to one prompt, the better one first, with r_t(chosen) - r_t(rejected), and of which type."""

    chosen: int
    rejected: int
    win_margin: float
    type: str


@dataclass(frozen=True)
class Rubric:
    """Which scored replies make a pair: a positive has at least `min_positive`, its negative at least `margin` less, or
    `student_margin` if the positive is the policy's own sample."""

    min_positive: float = 5.0
    margin: float = 2.0
    student_margin: float = 1.0


def wins_of_scores(scores: Sequence[float | None]) -> Tensor:
    """n scores -> P (n, n): 1 where i has the higher score, 0 where j, 0.5 where they are equal or one is None."""
    values = torch.tensor([math.nan if score is None else float(score) for score in scores], dtype=torch.float64)
    gaps = values[:, None] - values[None, :]
    return (gaps.nan_to_num(0.0).sign() + 1) / 2


def wins_of_members(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """(k, n) scores of an ensemble -> P (n, n): mean over members of sigmoid((s_i - s_j) / temperature).

    A member that abstains (NaN) on a reply is left out of that reply's pairs; 0.5 where all abstain.
    """
    gaps = (scores[:, :, None] - scores[:, None, :]).double() / temperature
    return torch.sigmoid(gaps).nanmean(0).nan_to_num(0.5)


def self_play_rewards(wins: Tensor) -> Tensor:
    """P (n, n) -> r_t (n,): the mean of each row without the diagonal. ValueError for fewer than two replies."""
    n = len(wins)
    if wins.shape != (n, n) or n < 2:
        raise ValueError(f"win rates take a square matrix of at least 2 replies, got {tuple(wins.shape)}")
    return (wins.double().sum(1) - wins.double().diagonal()) / (n - 1)


def losing(wins: Tensor, negatives: Sequence[bool]) -> Tensor:
    """P with automatic negatives: each loses to all other replies; between two of them it is 0.5."""
    bad = torch.tensor(list(negatives), dtype=torch.bool)
    forced = (1 - bad.double()[:, None] + bad.double()[None, :]) / 2
    return torch.where(bad[:, None] | bad[None, :], forced, wins.double())


def repeats(tokens: Sequence[T], share: float, n: int = NGRAM) -> bool:
    """Whether the most frequent n-gram, if it occurs more than once, covers more than `share` of all n-grams."""
    grams = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    most = max(grams.values(), default=0)
    return most > 1 and most > share * grams.total()


def pair_type(chosen: int, rejected: int, teacher: int | None) -> str:
    """ "teacher>student", "student>teacher" or "student>student"; `teacher`: the number of its reply, if any."""
    return TYPES[0 if chosen == teacher else 1 if rejected == teacher else 2]


def all_pairs(rewards: Sequence[float]) -> list[tuple[int, int]]:
    """Every two replies with different win rates, the better one first."""
    n = len(rewards)
    return [(i, j) for i in range(n) for j in range(n) if rewards[i] > rewards[j]]


def best_worst(rewards: Sequence[float]) -> list[tuple[int, int]]:
    """The best and the worst reply by win rate, the first of equals; nothing when all are equal."""
    best, worst = max(range(len(rewards)), key=rewards.__getitem__), min(range(len(rewards)), key=rewards.__getitem__)
    return [(best, worst)] if rewards[best] > rewards[worst] else []


def rubric_pairs(scores: Sequence[float | None], teacher: int | None, rubric: Rubric) -> list[tuple[int, int]]:
    """DNO-Prct's large-margin pairs by `Rubric`; a reply without a score is in none."""
    known = {i: score for i, score in enumerate(scores) if score is not None}
    return [
        (i, j)
        for i, high in known.items()
        for j, low in known.items()
        if high >= rubric.min_positive
        and high > low
        and high - low >= (rubric.margin if i == teacher else rubric.student_margin)
    ]


def chosen_pairs(
    how: str, scores: Sequence[float | None] | None, wins: Tensor, teacher: int | None, rubric: Rubric
) -> list[Pair]:
    """The pairs of one prompt, `how`: "rubric" (by scores), "all" or "best_worst" (by win rates).

    Only those whose chosen reply has the higher win rate: an ensemble's mean score can say otherwise (`contradicted`).
    """
    return [pair for pair in _candidates(how, scores, wins, teacher, rubric) if pair.win_margin > 0]


def contradicted(
    how: str, scores: Sequence[float | None] | None, wins: Tensor, teacher: int | None, rubric: Rubric
) -> int:
    """How many pairs of one prompt `chosen_pairs` leaves out since their win rates do not say what their scores say."""
    return sum(pair.win_margin <= 0 for pair in _candidates(how, scores, wins, teacher, rubric))


def _candidates(
    how: str, scores: Sequence[float | None] | None, wins: Tensor, teacher: int | None, rubric: Rubric
) -> list[Pair]:
    rewards = self_play_rewards(wins).tolist()
    by_rate: dict[str, Callable[[Sequence[float]], list[tuple[int, int]]]] = {
        "all": all_pairs,
        "best_worst": best_worst,
    }
    if how in by_rate:
        found = by_rate[how](rewards)
    elif scores is None:
        raise ValueError(
            "pairs: rubric needs a score for each reply, and this scorer only compares; use all or best_worst"
        )
    else:
        found = rubric_pairs(scores, teacher, rubric)
    return [Pair(i, j, rewards[i] - rewards[j], pair_type(i, j, teacher)) for i, j in found]


def replay_counts(new: int, share: float, rounds_before: int) -> list[int]:
    """How many pairs of round t-1, t-2, ... join `new` ones: at most `share`, share/2, ... of them, rounded down."""
    return [math.floor(new * share / 2**lag) for lag in range(rounds_before)]


def replayed(earlier: Sequence[Sequence[T]], new: int, share: float, rng: random.Random) -> list[T]:
    """Pairs of earlier rounds, newest round first, drawn without replacement; those that there are, if too few."""
    counts = replay_counts(new, share, len(earlier))
    return [
        pair for pairs, n in zip(earlier, counts, strict=True) for pair in rng.sample(list(pairs), min(n, len(pairs)))
    ]


def type_counts(pairs: Sequence[Pair]) -> dict[str, int]:
    """How many pairs there are of each of `TYPES`."""
    found = Counter(pair.type for pair in pairs)
    return {name: found[name] for name in TYPES}
