"""Frozen models beside the reference, whose log-probs a method asks for by the folder or name they come from.

They are loaded as TRL loads its reference: in the precision, with the attention and in the quantization of the policy.
An adapter goes onto its own base, in a second copy of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, hash_module

from trl_ext.plan import PlanError
from trl_ext.quantized import keep_trainable
from trl_ext.sandbox.cache import model_folder
from trl_ext.saved import with_adapter


def init_like(model: nn.Module, args: Any) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for a model beside `model`, the unwrapped policy, as TRL's reference gets
    them."""
    policy: Any = model
    init = {
        "dtype": policy.dtype,
        "attn_implementation": policy.config._attn_implementation,
        "trust_remote_code": getattr(args, "trust_remote_code", False),
        **(args.model_init_kwargs or {}),
    }
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        init["device_map"] = None
    if (quantization := getattr(policy.config, "quantization_config", None)) is not None:
        init["quantization_config"] = quantization
    return init


class FrozenModels:
    """Loads what `load` names and answers log-probs of it. `policy`: the unwrapped policy, whose vocabulary they share."""

    def __init__(
        self,
        policy: nn.Module,
        args: Any,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._init, self._device, self._autocast = init_like(policy, args), device, autocast
        self._vocabulary, self._policy = _vocabulary(policy), str(policy.config._name_or_path)  # type: ignore[union-attr]
        self._models: dict[str, Any] = {}

    def load(self, paths: Iterable[str]) -> None:
        """Loads those that are not there yet. PlanError when one cannot be loaded or speaks another vocabulary."""
        for path in paths:
            if path not in self._models:
                self._models[path] = self._loaded(path)

    @torch.no_grad()
    def log_probs(self, path: str, inputs: Mapping[str, Any]) -> Tensor:
        """`inputs` as TRL hands them to its reference -> (rows, S) float32: log-probs of the labels, 0 elsewhere."""
        with self._autocast():
            output = self._models[path](**inputs)
        return output.log_probs[:, -(inputs["labels"].size(1) - 1) :].float()

    def key(self, paths: Iterable[str]) -> str:
        """What tells the weights of these models from all others."""
        return hashlib.sha256("".join(hash_module(self._models[path]) for path in paths).encode()).hexdigest()

    def _loaded(self, path: str) -> Any:
        is_adapter = (Path(path) / "adapter_config.json").exists()
        config = PeftConfig.from_pretrained(path) if is_adapter else None
        base = model_folder(path) if config is None else str(config.base_model_name_or_path)
        init = dict(self._init)
        if base != self._policy:  # a revision names a version of the policy's own repository
            init.pop("revision", None)
        if config is not None and config.revision is not None:
            init["revision"] = config.revision
        try:
            model: Any = create_model_from_path(base, **init)
        except (OSError, ValueError) as error:
            raise PlanError([f"cannot load the frozen model '{path}' ({base}): {error}"]) from error
        if _vocabulary(model) != self._vocabulary:
            raise PlanError(
                [f"'{path}' has a vocabulary of {_vocabulary(model)}, the policy of {self._vocabulary}: other tokens"]
            )
        add_fused_lm_head(model)  # before PEFT wraps it
        model = keep_trainable(model) if getattr(model, "is_quantized", False) else model.to(self._device)
        model = with_adapter(model, path) if is_adapter else model
        if is_adapter and isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise PlanError(
                [f"'{path}' adapts lm_head, which TRL's log-probs pass by; merge it first (`trl-ext merge`)"]
            )
        return model.requires_grad_(False).eval()


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)
