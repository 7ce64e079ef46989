"""How far the micro-batch gradients of an optimizer step agree (`Method.observe_gradients`)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class GradientWatch:
    """Squared norms of micro-batch gradients, as differences of the accumulated gradient, before it is clipped.

    Memory: one copy of the gradient (with LoRA: of the adapter). The loss of each micro-batch is already divided by
    their number A, so g_k is A times the k-th difference.

    With several processes the last backward averages over them: the squares are then those of the first A - 1
    micro-batches of each process, which have the same expectation, and A must be at least 2.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._before: list[Tensor] | None = None
        self._squares: list[Tensor] = []

    @torch.no_grad()
    def after_backward(self, params: Iterable[nn.Parameter], scale: float = 1.0) -> None:
        """Takes the difference to the last call of this step. `scale`: what a gradient scaler multiplied in."""
        now = [p.grad.detach().float() / scale for p in params if p.grad is not None]
        before = self._before or [torch.zeros_like(g) for g in now]
        self._squares.append(sum_of_squares(a - b for a, b in zip(now, before, strict=True)))
        self._before = [g.clone() for g in now]

    def result(self) -> tuple[Tensor, Tensor, int] | None:
        """(sum of ||g_k||^2, how many of them, ||mean g||^2) stacked as they are on this process, and M; then forgets.

        None where one gradient is all there is.
        """
        squares, total, count = self._squares, self._before, len(self._squares)
        self._before, self._squares = None, []
        if total is None or count < 2:
            return None
        used = squares if self.processes == 1 else squares[:-1]
        own = torch.stack([torch.stack(used).sum() * count**2, torch.full_like(used[0], float(len(used)))])
        return own, sum_of_squares(total), count * self.processes


def sum_of_squares(tensors: Iterable[Tensor]) -> Tensor:
    """Sum over all entries of all tensors, 0-dim."""
    return torch.stack([t.square().sum() for t in tensors]).sum()
