"""A look into the loss: every micro-batch's `LossInput`, its log-probs and hidden states keeping their gradient."""

from __future__ import annotations

import pytest

import trl_ext
from trl_ext.method import LossInput


def spied(monkeypatch: pytest.MonkeyPatch) -> list[LossInput]:
    """The list into which our GRPOTrainer will put the loss input of each micro-batch."""
    seen: list[LossInput] = []
    original = trl_ext.GRPOTrainer._loss_input

    def spy(self, inputs, forward, features):
        forward[0].retain_grad()
        if features is not None and features.hidden.requires_grad:
            features.hidden.retain_grad()
        seen.append(original(self, inputs, forward, features))
        return seen[-1]

    monkeypatch.setattr(trl_ext.GRPOTrainer, "_loss_input", spy)
    return seen
