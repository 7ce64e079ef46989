"""The DSTC loop of a recipe: the executor, the sampling model, the data, then the recipe's own trainer on it."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from trl import get_quantization_config

from trl_ext.build import build_trainer, model_init_kwargs
from trl_ext.data import Data
from trl_ext.executor import NoIsolation, make_executor
from trl_ext.loops import dstc_data
from trl_ext.loops.dstc_rows import Room, training_rows
from trl_ext.loops.dstc_settings import Dstc
from trl_ext.loops.sampling import Sampler, TransformersSampler, VllmSampler, vllm_client
from trl_ext.quantized import keep_trainable
from trl_ext.recipe import Recipe, RecipeError


def dstc_trainer(recipe: Recipe, model: str, tokenizer: Any, data: Data) -> Any:
    """The recipe's DPO or KTO trainer on pairs that `model` made of `data`; its reference is that model.

    RecipeError when no executor works here, DataError and CheckpointError as `dstc_data.build`.
    """
    loop, args = recipe.loop, recipe.training_args
    assert isinstance(loop, Dstc)
    try:
        executor = make_executor(loop.executor)
    except NoIsolation as error:
        raise RecipeError(str(recipe.path), [f"loop: dstc: executor: {error}"]) from error
    # Not loaded yet: a build that is whole on disk needs no second model.
    sampler = _Late(recipe, model, tokenizer, loop)
    room = Room(tokenizer, args.max_length)
    lines = dstc_data.build(data.train, loop, sampler, executor, args.output_dir, args.seed, model, room)
    sampler.drop()
    rows = training_rows(lines, recipe.trainer == "kto", args.seed)
    plain = dataclasses.replace(recipe, loop=None)
    return build_trainer(plain, model, tokenizer, Data(rows, None, None, len(rows), 0))


@dataclasses.dataclass
class _Late:
    """A sampler whose model is loaded when it is first asked, and dropped afterwards."""

    recipe: Recipe
    model: str
    tokenizer: Any
    loop: Dstc
    made: Sampler | None = None

    def sample(self, *args: Any) -> Any:
        """As `Sampler`."""
        self.made = self.made or self._make()
        return self.made.sample(*args)

    def _make(self) -> Sampler:
        device = self.recipe.training_args.device
        model = self._loaded(device).eval()
        if self.loop.vllm_server_base_url is None:  # `Dstc.backend`
            return TransformersSampler(model, self.tokenizer)
        return VllmSampler(model, self.tokenizer, vllm_client(self.loop.vllm_server_base_url, device))

    def _loaded(self, device: Any) -> Any:
        """The model that training starts with, packed if it is packed there."""
        init = model_init_kwargs(self.recipe)
        quantization = get_quantization_config(self.recipe.model_args)
        if quantization is None:
            return AutoModelForCausalLM.from_pretrained(self.model, **init).to(device)
        init |= {"quantization_config": quantization, "device_map": {"": device}}
        return keep_trainable(AutoModelForCausalLM.from_pretrained(self.model, **init))

    def drop(self) -> None:
        """Room for the trainer's model."""
        self.made = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
