"""The model, the tokenizer and the trainer of a recipe, put together as TRL's own scripts do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoProcessor
from trl import get_peft_config, get_quantization_config

import trl_ext
from trl_ext.data import Data
from trl_ext.loops import PasoDoble
from trl_ext.recipe import Recipe, RecipeError
from trl_ext.sandbox.cache import model_folder


@contextlib.contextmanager
def few_threads(recipe: Recipe) -> Iterator[None]:
    """One CPU thread for the sandbox's model, which is too small to share.

    Measured on two busy cores: about 1 s a step with one thread, 3 to 30 s with two, which wait for each other.
    """
    before = torch.get_num_threads()
    if recipe.model_args.model_name_or_path == "sandbox":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def model_path(recipe: Recipe) -> str:
    """The model's name; `sandbox` is built on first use."""
    return model_folder(str(recipe.model_args.model_name_or_path))


def load_tokenizer(recipe: Recipe, model: str) -> Any:
    """The model's tokenizer (or processor), as TRL loads it. RecipeError when there is none under that name."""
    try:
        return AutoProcessor.from_pretrained(
            model,
            revision=recipe.model_args.model_revision,
            trust_remote_code=recipe.training_args.trust_remote_code,
            padding_side="left",
            truncation_side="left",
        )
    except OSError as error:
        raise RecipeError(str(recipe.path), [f"model_name_or_path: cannot load '{model}': {error}"]) from error


def model_init_kwargs(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`, as TRL's scripts form them."""
    args = recipe.model_args
    init = {"revision": args.model_revision, "attn_implementation": args.attn_implementation, "dtype": args.dtype}
    init["trust_remote_code"] = recipe.training_args.trust_remote_code
    return init | (recipe.training_args.model_init_kwargs or {})


def build_trainer(recipe: Recipe, model: str, tokenizer: Any, data: Data) -> Any:
    """Our trainer for a recipe, its model loaded; or the loop that makes its data and calls it in rounds."""
    if recipe.loop is not None and recipe.loop.makes_data:
        from trl_ext.loops.dstc_run import dstc_trainer
        from trl_ext.loops.iterative import IterativeTrainer

        make = dstc_trainer if recipe.loop.name == "dstc" else IterativeTrainer
        return make(recipe, model, tokenizer, data)
    recipe.training_args.model_init_kwargs = model_init_kwargs(recipe)
    common: dict[str, Any] = {
        "args": recipe.training_args,
        "train_dataset": data.train,
        "eval_dataset": data.eval,
        "processing_class": tokenizer,
        "quantization_config": get_quantization_config(recipe.model_args),
        "peft_config": get_peft_config(recipe.model_args),
    }
    if recipe.trainer != "grpo":
        trainer: Any = getattr(trl_ext, f"{recipe.trainer.upper()}Trainer")(model, **common)
    else:
        from trl_ext.grpo import GRPOTrainer

        common["tools"] = list(recipe.tools) or None
        if isinstance(recipe.loop, PasoDoble):
            from trl_ext.loops.trainer import PasoDobleTrainer

            trainer = PasoDobleTrainer(model, list(recipe.rewards), loop=recipe.loop, **common)
        else:
            trainer = GRPOTrainer(model, reward_funcs=list(recipe.rewards), **common)
    if recipe.script_args.ignore_bias_buffers:
        named = trainer.model.named_buffers()
        trainer.model._ddp_params_and_buffers_to_ignore = [n for n, b in named if b.dtype == torch.bool]
    return trainer
