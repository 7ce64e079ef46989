"""Sequence-classification reward models as scorers: one model each, or LoRA adapters on one shared backbone.

Text goes in as TRL gives it to a reward model: prompt and completion through the chat template (plain texts joined), no
special tokens added, padded on the right; the score is the one logit. Models are loaded at the first call, so that a
recipe can be planned without them, and stay on their device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.data_utils import apply_chat_template

HEADS = ("score", "classifier")
"""Names of the head in transformers' models for sequence classification."""


@dataclass(frozen=True)
class Scoring:
    """How models score: rows at once, tokens at most (the end is cut), type of the weights, device (None: accelerator).

    `dtype` "auto" is the type in which the weights were saved.
    """

    batch_size: int = 16
    max_length: int = 4096
    dtype: str = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_length < 1:
            raise ValueError(f"batch_size {self.batch_size} and max_length {self.max_length} must be at least 1")
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype: {self.dtype!r} is neither auto nor a torch type such as bfloat16")

    @property
    def where(self) -> torch.device:
        """The device that is used."""
        if self.device is not None:
            return torch.device(self.device)
        return torch.accelerator.current_accelerator() or torch.device("cpu")


@dataclass(frozen=True)
class ModelScorer:
    """One saved model (folder or Hub name) with one output."""

    path: str
    scoring: Scoring

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
        """(1, B) scores in float32, on the CPU."""
        model, tokenizer = self.loaded
        return _scores(model, tokenizer, texts(prompts, completions, tokenizer), self.scoring)[None]

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Model and tokenizer. ValueError for a model whose head was never trained."""
        model, tokenizer, missing = _load(self.path, self.scoring)
        if missing:
            raise ValueError(_no_head(self.path, missing))
        return model, tokenizer


@dataclass(frozen=True)
class AdapterScorer:
    """k saved LoRA adapters on one backbone, which is in memory once. `backbone` None: the one the adapters name."""

    paths: tuple[str, ...]
    backbone: str | None
    scoring: Scoring

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
        """(k, B) scores in float32, on the CPU."""
        model, tokenizer = self.loaded
        read = texts(prompts, completions, tokenizer)
        found = []
        for position in range(len(self.paths)):
            model.set_adapter(_name(position), inference_mode=True)
            found.append(_scores(model, tokenizer, read, self.scoring))
        return torch.stack(found)

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Backbone with all adapters, and its tokenizer. ValueError for adapters that do not belong together."""
        from peft import PeftConfig, PeftModel

        configs = [PeftConfig.from_pretrained(path) for path in self.paths]
        _check_tasks(self.paths, configs)
        model, tokenizer, _ = _load(self.backbone or _one_backbone(self.paths, configs), self.scoring)
        _check_heads(self.paths, [f"{name}.weight" for name in HEADS if hasattr(model, name)])
        wrapped = PeftModel.from_pretrained(model, self.paths[0], adapter_name=_name(0))
        for position, path in enumerate(self.paths[1:], 1):
            wrapped.load_adapter(path, adapter_name=_name(position))
        return wrapped.eval().requires_grad_(False).to(self.scoring.where), tokenizer


def _name(position: int) -> str:
    return f"member_{position}"


def texts(prompts: Sequence[Any], completions: Sequence[Any], tokenizer: Any) -> list[str]:
    """What a reward model reads: prompt and completion as one text."""
    return [
        apply_chat_template({"messages": prompt + completion}, tokenizer)["text"]
        if isinstance(prompt, list)
        else prompt + completion
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


@torch.no_grad()
def _scores(model: Any, tokenizer: Any, read: Sequence[str], scoring: Scoring) -> Tensor:
    """(B,) logits of the active model."""
    found = []
    for start in range(0, len(read), scoring.batch_size):
        batch = tokenizer(
            text=list(read[start : start + scoring.batch_size]),
            return_tensors="pt",
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=scoring.max_length,
            add_special_tokens=False,
        ).to(scoring.where)
        found.append(model(**batch).logits[:, 0].float().cpu())
    return torch.cat(found)


def _load(path: str, scoring: Scoring) -> tuple[Any, Any, list[str]]:
    """Model in evaluation mode, tokenizer, and the weights that the files lack: those of a head that was never trained."""
    model, info = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=scoring.dtype, output_loading_info=True
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # by it the model finds a text's last token
    return model.eval().requires_grad_(False).to(scoring.where), tokenizer, sorted(info["missing_keys"])


def _check_tasks(paths: Sequence[str], configs: Sequence[Any]) -> None:
    for path, config in zip(paths, configs, strict=True):
        if config.task_type != "SEQ_CLS":
            raise ValueError(f"adapter {path}: its task is {config.task_type}, a reward model's is SEQ_CLS")


def _one_backbone(paths: Sequence[str], configs: Sequence[Any]) -> str:
    """The backbone that all adapters were trained on."""
    named = {str(config.base_model_name_or_path) for config in configs}
    if len(named) > 1:
        raise ValueError(
            f"the adapters {', '.join(paths)} name different backbones ({', '.join(sorted(named))}); members with "
            "different backbones are `models`, or name the one `backbone`"
        )
    return named.pop()


def _check_heads(paths: Sequence[str], heads: Sequence[str]) -> None:
    """ValueError for an adapter without a head of its own, which PEFT trains and saves with a SEQ_CLS adapter."""
    from peft.utils import load_peft_weights

    for path in paths:
        saved = load_peft_weights(path, device="cpu")
        if not any(name.endswith(f".{head}") for name in saved for head in heads):
            raise ValueError(_no_head(path, heads))


def _no_head(path: str, missing: Sequence[str]) -> str:
    return (
        f"reward model {path}: its files lack {', '.join(missing)}, so that its scores would be random. Train it as a "
        "reward model first (TRL's RewardTrainer; an adapter with task_type SEQ_CLS saves the head)"
    )
