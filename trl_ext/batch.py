"""The micro-batch dict of TRL: what is read from it in several places, and attributes that change for one call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trl_ext.compat import multimodal_names

_MULTIMODAL = multimodal_names()


def whole(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Prompt and completion joined: ids and attention mask (B, L + T)."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    return ids, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)


def loss_mask_of(inputs: dict[str, Any]) -> Tensor:
    """(B, T): the tokens that TRL trains on, without padding and tool output."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def images_of(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of TRL's forward that carry images, None where there are none."""
    return {name: inputs.get(name) for name in _MULTIMODAL}


@contextlib.contextmanager
def replaced(target: Any, **values: Any) -> Iterator[None]:
    """`target` has these attribute values inside the block and its own again afterwards, also after an error."""
    own = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(target, name, value)
