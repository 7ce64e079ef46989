"""Weighted draws without replacement from many rows, in O(log n) for each row that is drawn or changed."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


class SumTree:
    """n non-negative weights with their sums in a binary tree: node i holds the sum of nodes 2i and 2i + 1.

    Every node is the sum of its children and never an increment of itself, so the tree depends on the weights alone,
    not on the order of the updates: one that is rebuilt from the same weights draws the same rows, bit for bit.

    >>> tree = SumTree([1.0, 0.0, 3.0])
    >>> tree.total
    4.0
    >>> sorted(tree.draw(np.random.default_rng(0), 2).tolist())
    [0, 2]
    """

    def __init__(self, weights: ArrayLike) -> None:
        """`weights` (n,), n > 0. ValueError for a negative weight or one that is not finite."""
        leaves = _checked(weights)
        self._size = 1 << (len(leaves) - 1).bit_length()
        self._n = len(leaves)
        self._nodes = np.zeros(2 * self._size)  # node 0 is not used, node 1 is the root, leaves begin at `_size`
        self._nodes[self._size : self._size + self._n] = leaves
        first = self._size
        while first > 1:
            below = self._nodes[first : 2 * first]
            first //= 2
            self._nodes[first : 2 * first] = below[::2] + below[1::2]

    def __len__(self) -> int:
        return self._n

    @property
    def total(self) -> float:
        """The sum of all weights."""
        return float(self._nodes[1])

    @property
    def weights(self) -> Floats:
        """(n,) copy of the weights."""
        return self._nodes[self._size : self._size + self._n].copy()

    def set(self, indices: Indices, weights: ArrayLike) -> None:
        """Gives the different rows `indices` (k,) new weights (k,). ValueError as in the constructor."""
        self._put(np.asarray(indices), _checked(weights))

    def draw(self, rng: np.random.Generator, count: int) -> Indices:
        """(count,) different rows: each next one in proportion to the weights of those that are left.

        Rows are drawn with replacement and repeats are passed over, which is the same distribution; what was drawn is
        set aside before the next round and put back at the end. ValueError if fewer rows have a positive weight.
        """
        found = np.empty(0, dtype=np.int64)
        aside = np.empty(0)
        while len(found) < count and self.total > 0:
            drawn = _first_of_each(self._descend(rng.random(count - len(found)) * self.total))
            found = np.concatenate([found, drawn])
            aside = np.concatenate([aside, self._nodes[self._size + drawn]])
            self._put(drawn, np.zeros(len(drawn)))
        self._put(found, aside)
        if len(found) < count:
            raise ValueError(f"{count} different rows are asked for, but only {len(found)} have a positive weight")
        return found

    def _descend(self, points: Floats) -> Indices:
        """(k,) points in [0, total) -> (k,) rows whose share of [0, total) they fall into; never one of weight 0."""
        node = np.ones(len(points), dtype=np.int64)
        for _ in range(self._size.bit_length() - 1):
            left, right = self._nodes[2 * node], self._nodes[2 * node + 1]
            # Subtraction rounds: a point at the very end must not pass into a branch without weight
            go_right = (points >= left) & (right > 0)
            points = np.where(go_right, points - left, points)
            node = 2 * node + go_right
        return node - self._size

    def _put(self, indices: Indices, weights: Floats) -> None:
        node = indices + self._size
        self._nodes[node] = weights
        for _ in range(self._size.bit_length() - 1):
            node = np.unique(node // 2)
            self._nodes[node] = self._nodes[2 * node] + self._nodes[2 * node + 1]


def _first_of_each(rows: Indices) -> Indices:
    """Without repeats, in the order of first occurrence."""
    return rows[np.sort(np.unique(rows, return_index=True)[1])]


def _checked(weights: ArrayLike) -> Floats:
    values = np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"weights must be a list of at least one number, got shape {values.shape}")
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(f"weight {at} is {values[at]}: weights must be finite and not negative")
    return values
