"""Labels for KTO from scores: one bit for each reply or turn, no pair needed (CONSCIENTIA, arXiv 2604.09746).

For a role with outcome o and threshold t: label = 1 if o >= t, else 0. The same episode is labelled once per role, so it
can be desirable for one and undesirable for the other. Ties and unclear outcomes are dropped. The balance that KTO wants
between n_D desirable and n_U undesirable examples (Eq. 8 of arXiv 2402.01306, the rule that TRL warns about):

    1 <= (lambda_D n_D) / (lambda_U n_U) <= 1.33

kept by changing one of the two weights, not by discarding examples.

The loop `iterative` labels the replies of one policy. Recipes have no source of episodes between two roles: a script
that plays them itself makes each role's data set here, and hands it to TRL's KTOTrainer or `trl_ext.KTOTrainer`.

    >>> from datasets import Dataset
    >>> from trl_ext.loops import Episode, balance, capped, role_rows
    >>> long = Episode("long", {"blue": 1.0, "red": 0.0}, {"blue": [("Left?", " No."), ("Sure?", " Yes.")]})
    >>> short = Episode("short", {"blue": 0.0, "red": 1.0}, {"blue": [("Left?", " Yes.")], "red": [("Ask.", " Left?")]})
    >>> rows = capped(role_rows([long, short], "blue"), 1, seed=0)  # one turn of each episode
    >>> [(row["episode"], row["prompt"], row["label"]) for row in rows]
    [('long', 'Sure?', True), ('short', 'Left?', False)]
    >>> role_rows([long, short], "red")  # the same episode, labelled by the other's outcome
    [{'prompt': 'Ask.', 'completion': ' Left?', 'label': True, 'episode': 'short'}]
    >>> balance([row["label"] for row in rows]).warning() is None
    True
    >>> Dataset.from_list(rows).column_names  # as `train_dataset` of a KTOTrainer
    ['prompt', 'completion', 'label', 'episode']
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LARGEST_RATIO = 1.33
"""Upper bound of the balance rule; the lower one is 1."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Episode:
    """What two or more roles did to each other, and how it ended for each.

    `outcomes`: role -> score. `turns`: role -> its (prompt, completion) pairs, each prompt with its full context.
    """

    name: str
    outcomes: Mapping[str, float | None]
    turns: Mapping[str, Sequence[tuple[Any, Any]]]


def labels_from_scores(
    scores: Sequence[float | None], threshold: float = 0.5, margin: float = 0.0
) -> list[bool | None]:
    """True for a score >= `threshold`, False below it, None (dropped) for no score, NaN, or one closer than `margin`.

    Raises ValueError for a negative margin.
    """
    if margin < 0:
        raise ValueError(f"margin {margin} must not be negative")
    return [_label(score, threshold, margin) for score in scores]


def _label(score: float | None, threshold: float, margin: float) -> bool | None:
    if score is None or math.isnan(score) or abs(score - threshold) < margin:
        return None
    return score >= threshold


def role_labels(
    outcomes: Mapping[str, float | None], threshold: float = 0.5, margin: float = 0.0
) -> dict[str, bool | None]:
    """One label for each role of an episode. All None if the episode ended in a tie: equal outcomes of two or more roles."""
    values = list(outcomes.values())
    if len(values) > 1 and all(value == values[0] for value in values):
        return dict.fromkeys(outcomes)
    return dict(zip(outcomes, labels_from_scores(values, threshold, margin), strict=True))


def role_rows(episodes: Sequence[Episode], role: str, threshold: float = 0.5, margin: float = 0.0) -> list[Row]:
    """`prompt`, `completion`, `label` and `episode` of every turn of `role`, each labelled with its episode's outcome.

    Raises ValueError when an episode has no outcome for the role.
    """
    rows: list[Row] = []
    for episode in episodes:
        if role not in episode.outcomes:
            raise ValueError(
                f"episode '{episode.name}' has no outcome for '{role}' (it has: {', '.join(episode.outcomes)})"
            )
        label = role_labels(episode.outcomes, threshold, margin)[role]
        if label is not None:
            turns = episode.turns.get(role, ())
            rows += [{"prompt": p, "completion": c, "label": label, "episode": episode.name} for p, c in turns]
    return rows


def capped(rows: Sequence[Row], most: int | None, seed: int, key: str = "episode") -> list[Row]:
    """At most `most` rows of each episode, drawn from `seed`, in their order, so that long episodes do not dominate.

    `most` None keeps all. Raises ValueError below 1.
    """
    if most is None:
        return list(rows)
    if most < 1:
        raise ValueError(f"at most {most} examples per episode: must be at least 1")
    places: dict[Any, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        places[row[key]].append(i)
    rng = random.Random(f"cap/{seed}")
    kept = {i for own in places.values() for i in (own if len(own) <= most else rng.sample(own, most))}
    return [row for i, row in enumerate(rows) if i in kept]


def with_replay(new: Sequence[Row], earlier: Sequence[Sequence[Row]], fraction: float = 0.0) -> list[Row]:
    """`new`, then older rows until they are `fraction` of the result, or until there are none. Newest iteration first.

    `earlier`: rows of the iterations before, oldest first. n_old = round(fraction / (1 - fraction) * n_new).
    Raises ValueError for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"replay_fraction {fraction} must be at least 0 and below 1")
    wanted = round(fraction / (1 - fraction) * len(new))
    older = [row for rows in reversed(earlier) for row in rows]
    return [*new, *older[:wanted]]


@dataclass(frozen=True)
class Balance:
    """Counts and weights of desirable and undesirable examples, and what the balance rule says of them."""

    desirable: int
    undesirable: int
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def ratio(self) -> float:
        """(lambda_D n_D) / (lambda_U n_U); infinite without undesirable examples."""
        below = self.undesirable_weight * self.undesirable
        return self.desirable_weight * self.desirable / below if below else math.inf

    @property
    def balanced(self) -> bool:
        """Whether 1 <= ratio <= 1.33."""
        return 1 <= self.ratio <= LARGEST_RATIO

    @property
    def undesirable_weights(self) -> tuple[float, float]:
        """The lambda_U that keep the rule with this lambda_D."""
        most = self.ratio * self.undesirable_weight
        return most / LARGEST_RATIO, most

    @property
    def desirable_weights(self) -> tuple[float, float]:
        """The lambda_D that keep the rule with this lambda_U."""
        least = self.desirable_weight / self.ratio if self.ratio else math.inf
        return least, LARGEST_RATIO * least

    def warning(self) -> str | None:
        """What is out of balance and which one weight to change; None if nothing is."""
        if not self.desirable or not self.undesirable:
            kind = "desirable" if not self.desirable else "undesirable"
            return f"labels: no {kind} example among {self.desirable + self.undesirable}; no weight can balance that"
        if self.balanced:
            return None
        d, u = self.desirable_weights, self.undesirable_weights
        return (
            f"labels: {self.desirable} desirable and {self.undesirable} undesirable examples give the ratio {self.ratio:.3f}, "
            f"outside [1, {LARGEST_RATIO}]: set desirable_weight to {d[0]:.3f}..{d[1]:.3f} or undesirable_weight to "
            f"{u[0]:.3f}..{u[1]:.3f}, not both"
        )


def balance(labels: Sequence[bool | None], desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Balance:
    """The balance of some labels; None labels do not count. Raises ValueError for a weight that is not above 0."""
    if desirable_weight <= 0 or undesirable_weight <= 0:
        raise ValueError(f"weights {desirable_weight} and {undesirable_weight}: both must be above 0")
    kept = [label for label in labels if label is not None]
    return Balance(sum(kept), len(kept) - sum(kept), desirable_weight, undesirable_weight)


def balance_warning(recipe: Any, data: Any) -> str | None:
    """What the labels of a KTO recipe's training data need; None for other trainers and losses, streams and pairs.

    Pairs are as many desirable as undesirable examples.
    """
    args, train = recipe.training_args, data.train
    if recipe.trainer != "kto" or args.loss_type not in ("kto", "bco") or "label" not in (train.column_names or ()):
        return None
    if data.rows is None:
        return None
    return balance(train["label"][:], args.desirable_weight, args.undesirable_weight).warning()
