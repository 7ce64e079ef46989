"""How far the micro-batch gradients of an optimizer step agree (`Method.observe_gradients`)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class GradientWatch:
    """Squared norms of micro-batch gradients, as differences of the accumulated gradient, before it is clipped.

    Memory: one copy of the gradient (with LoRA: of the adapter) in float32. The loss of each micro-batch is already
    divided by their number A, so g_k is A times the k-th difference. A parameter without a gradient counts as 0.

    With several processes the last backward averages over them: the squares are then those of the first A - 1
    micro-batches of each process, which have the same expectation, and A must be at least 2.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._before: dict[nn.Parameter, Tensor] = {}
        self._squares: list[Tensor] = []
        self._scale = 1.0

    @torch.no_grad()
    def after_backward(self, params: Iterable[nn.Parameter], scale: float = 1.0) -> None:
        """Takes the difference to the last call of this step. `scale`: what a gradient scaler multiplied in."""
        self._scale = scale
        squares = []
        for p in params:
            if p.grad is None:
                continue
            if p in self._before:
                squares.append((p.grad - self._before[p]).square().sum())
                self._before[p].copy_(p.grad)
            else:
                self._before[p] = p.grad.detach().float().clone()
                squares.append(self._before[p].square().sum())
        self._squares.append(_total(squares) / scale**2)

    def result(self) -> tuple[Tensor, Tensor, int] | None:
        """(sum of ||g_k||^2, how many of them) stacked as they are on this process, ||mean g||^2, and M; then forgets.

        None where one gradient is all there is.
        """
        squares, before, count = self._squares, self._before, len(self._squares)
        self._before, self._squares = {}, []
        if count < 2:
            return None
        used = squares if self.processes == 1 else squares[:-1]
        own = torch.stack([torch.stack(used).sum() * count**2, torch.full_like(used[0], float(len(used)))])
        return (
            own,
            _total([value.square().sum() for value in before.values()]) / self._scale**2,
            count * self.processes,
        )


def _total(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum() if values else torch.zeros(())
