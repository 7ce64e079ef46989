"""The micro-batch dict of TRL: what is read from it in several places, and attributes that change for one call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from trl_ext.compat import multimodal_names

_MULTIMODAL = multimodal_names()
_COUNTS = ("num_images", "num_tiles")


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


def model_images(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """What the model itself takes for the images of `rows` (R,) indices; empty for a batch of text.

    Pixels of all images lie behind one another in a batch: TRL's own functions cut them into rows and join them again.
    """
    found = {name: value for name, value in images_of(inputs).items() if value is not None}
    if not found:
        return {}
    chosen = rows.tolist()
    cut = split_pixel_values_by_grid(found)
    joined = unsplit_pixel_values_by_grid(
        {name: [v[i] for i in chosen] if isinstance(v, list) else v[rows] for name, v in cut.items()}
    )
    if "pixel_values" in joined and joined["pixel_values"].size(0) == 0:  # none of these rows has an image
        joined = {name: v for name, v in joined.items() if name.endswith("token_type_ids")}
    return {name: v for name, v in joined.items() if name not in _COUNTS}


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
