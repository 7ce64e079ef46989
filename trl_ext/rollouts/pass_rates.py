"""A live table of pass rates for the rows of a training set, and draws of prompts by a weight of the pass rate.

For row q with pass rate p_q, visited with the mean outcome r_q of its completions, w any function of the rate:

    p_q <- a p_q + (1 - a) r_q       for the visited rows only
    P(q) = w(p_q) / sum w(p)         for each draw, without replacement inside one rollout

Work per rollout is O(P log n) for P prompts, not O(n).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_ext.rollouts.draws import Floats, SumTree

BINS = 5
"""Equal bins of [0, 1] in which the rates are counted."""


class PassRates:
    """Pass rates of n rows, all `initial` at first, with `weight` (k,) rates -> (k,) weights not below 0.

    `rates` (n,) float64 and `visits` (n,) int64 are updated in place; they are all that a checkpoint must hold.

    >>> table = PassRates(4, factor=0.9, weight=lambda p: p * (1 - p))
    >>> table.update(torch.tensor([0, 2]), torch.tensor([1.0, 0.0]))
    >>> table.rates.tolist()
    [0.55, 0.5, 0.45, 0.5]
    """

    def __init__(
        self, n: int, factor: float = 0.9, initial: float = 0.5, weight: Callable[[Floats], Floats] = np.ones_like
    ) -> None:
        self.factor, self.weight = factor, weight
        start = weight(np.array([initial]))
        self._fill(torch.full((n,), initial, dtype=torch.float64), torch.zeros(n, dtype=torch.int64), start.repeat(n))

    def _fill(self, rates: Tensor, visits: Tensor, weights: Floats) -> None:
        self.rates, self.visits = rates, visits
        self._tree, self._squares = SumTree(weights), SumTree(weights**2)
        self._counts = np.bincount(_bins(rates.numpy()), minlength=BINS)
        self.visited = int((visits > 0).sum())
        """How many rows were visited at least once."""
        self.positive = int((weights > 0).sum())
        """How many rows can be drawn: those whose weight is not 0."""

    def __len__(self) -> int:
        return len(self._tree)

    def update(self, rows: Tensor, rates: Tensor) -> None:
        """Moves the rates of `rows` (P,) towards `rates` (P,), once, to the mean if a row occurs twice; others keep theirs."""
        index, place, times = np.unique(rows.cpu().numpy(), return_inverse=True, return_counts=True)
        found = np.bincount(place, rates.double().cpu().numpy()) / times
        table, visits = self.rates.numpy(), self.visits.numpy()  # views: the tensors change with them
        np.subtract.at(self._counts, _bins(table[index]), 1)
        self.positive -= int((self.weight(table[index]) > 0).sum())
        table[index] = self.factor * table[index] + (1 - self.factor) * found
        np.add.at(self._counts, _bins(table[index]), 1)
        self.visited += int((visits[index] == 0).sum())
        visits[index] += times
        weights = self.weight(table[index])
        self.positive += int((weights > 0).sum())
        self._tree.set(index, weights)
        self._squares.set(index, weights**2)

    def draw(self, count: int, seed: int, number: int) -> Tensor:
        """(count,) int64, different rows: draw `number` (0, 1, ...) of the run `seed`, the same on every process.

        Depends on the table, `seed` and `number` alone. ValueError if fewer than `count` rows have a positive weight.
        """
        return torch.from_numpy(self._tree.draw(np.random.default_rng([seed, number]), count))

    @property
    def weights(self) -> Tensor:
        """(n,) float64: w of every row. Copies the table: for tests and reports."""
        return torch.from_numpy(self._tree.weights)

    @property
    def probabilities(self) -> Tensor:
        """(n,) float64: P of every row, for the first of a draw. Copies the table."""
        return self.weights / self._tree.total

    @property
    def effective(self) -> float:
        """Effective number of prompts 1 / sum P^2, without a pass over the table; NaN if all weights are 0."""
        squares = self._squares.total
        return self._tree.total**2 / squares if squares > 0 else float("nan")

    @property
    def histogram(self) -> list[float]:
        """Share of the rows in each of `BINS` equal bins of [0, 1], without a pass over the table."""
        return (self._counts / len(self)).tolist()

    def state_dict(self) -> dict[str, Tensor]:
        """`rates` and `visits`: the table's own tensors, which later updates change."""
        return {"rates": self.rates, "visits": self.visits}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over the tensors of a `state_dict`. ValueError if they are those of another number of rows."""
        if len(state["rates"]) != len(self):
            raise ValueError(
                f"the saved table of pass rates has {len(state['rates'])} rows, the training set has {len(self)}: resume "
                "with the same training set, or start a new run from the checkpoint's weights (model_name_or_path)"
            )
        self._fill(state["rates"], state["visits"], self.weight(state["rates"].numpy()))


def table_in(
    state: MutableMapping[str, Any], made: MutableMapping[str, PassRates], make: Callable[[], PassRates]
) -> PassRates:
    """The table whose tensors a method keeps in its `state`, where they are saved and restored.

    `made` holds the object between calls. It is made on first use, and again when a resume has put other tensors into
    `state`: sums and weights follow from the rates, so they are not saved.
    """
    if "table" not in made or made["table"].rates is not state.get("rates"):
        made["table"] = make()
        if "rates" in state:
            made["table"].load(state)
        state.update(made["table"].state_dict())
    return made["table"]


def _bins(rates: Floats) -> Any:
    return np.clip((rates * BINS).astype(np.int64), 0, BINS - 1)
