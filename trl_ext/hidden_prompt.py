"""A forward in which part of the prompt cannot be seen: its tokens stay, with their positions, but none attends to them.

The attention mask is changed where attention uses it and nowhere else. Models with multi-axis rotary positions (the
Qwen-VL family) derive positions from the mask in their outer module: that one keeps the whole mask, so the positions,
the place of each image and the image itself are those of the plain forward; the text decoder inside gets the changed
mask. Other models count positions from 0 whatever the mask says, and get it directly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trl_ext.forward import base_model

_FROM_MASK = "its positions are counted in the attention mask, so hiding a token would shift all that follow"
_CROSS = "its images enter through cross-attention, past the prompt tokens"
CANNOT_HIDE = {
    "biogpt": _FROM_MASK,
    "bloom": _FROM_MASK,
    "falcon": _FROM_MASK,
    "idefics": _CROSS,
    "mllama": _CROSS,
    "opt": _FROM_MASK,
}
"""Model type -> why a masked prompt token is not simply a hidden one there (read in transformers 5.23.0)."""


def cannot_hide(config: Any) -> str | None:
    """Why part of the prompt cannot be hidden from a model with this config, or None."""
    return CANNOT_HIDE.get(config.model_type)


def image_tokens(ids: Tensor, config: Any) -> Tensor:
    """(rows, L) ids -> (rows, L): 1 where an image's token stands, 2 for a video's, 0 for text."""
    found = ids.new_zeros(ids.shape)
    for kind, name in enumerate(("image_token_id", "video_token_id"), 1):
        if getattr(config, name, None) is not None:
            found = found.masked_fill(ids == getattr(config, name), kind)
    return found


def without(mask: Tensor, hide: Tensor) -> Tensor:
    """Attention mask (rows, L + T) -> the same, 0 at the prompt tokens that `hide` (rows, L) marks."""
    width = hide.size(1)
    return torch.cat([mask[:, :width].masked_fill(hide, 0), mask[:, width:]], dim=1)


@contextlib.contextmanager
def attending(model: nn.Module, masks: Iterable[Tensor] | None) -> Iterator[None]:
    """The n-th forward of `model` inside the block attends by the n-th of `masks`, (rows, S) each; None changes nothing.

    Raises TypeError for a model whose text decoder gets its mask in another form.
    """
    if masks is None:
        yield
        return
    backbone: Any = base_model(model).base_model
    decoder = backbone.language_model if hasattr(backbone, "get_rope_index") else backbone
    coming = iter(masks)

    def swap(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given, mask = kwargs.get("attention_mask"), next(coming)
        if not isinstance(given, Tensor) or given.shape != mask.shape:
            raise TypeError(
                f"{type(module).__name__} takes no attention mask of shape {tuple(mask.shape)}, so part of the prompt "
                "cannot be hidden from it; please report the model"
            )
        return args, kwargs | {"attention_mask": mask}

    handle = decoder.register_forward_pre_hook(swap, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
