"""One vector for each prompt: the mean of a frozen model's last hidden states over the prompt's tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from trl_ext.forward import evaluating
from trl_ext.plan import PlanError


def mean_hidden(hidden: Tensor, mask: Tensor) -> Tensor:
    """`hidden` (n, L, E), `mask` (n, L) -> (n, E) float32: the mean over the positions with mask 1, one or more per row."""
    weight = mask.to(torch.float32).unsqueeze(-1)
    return (hidden.float() * weight).sum(1) / weight.sum(1)


def packed_prompts(ids: Tensor, prompt: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Sequences that start with their prompt -> prompts alone: ids and mask (n, longest), right padded.

    `ids` (n, S); `prompt` (n, S) is 1 on prompt tokens.
    """
    longest = int(prompt.sum(1).max())
    mask = prompt[:, :longest]
    return ids[:, :longest].masked_fill(mask == 0, pad), mask


class SentenceEncoder:
    """An encoder in a folder or a repository, loaded once for `method`; texts -> (n, E), the mean over the tokens.

    Raises PlanError when it cannot be loaded, or makes no token of a text.
    """

    def __init__(self, path: str, device: torch.device, method: str) -> None:
        self.method = method
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
            self.model: Any = AutoModel.from_pretrained(path).to(device)
        except (OSError, ValueError) as error:
            problem = f"{method}: embedding: cannot load a sentence encoder from '{path}': {error}"
            raise PlanError([problem]) from error

    def __call__(self, texts: list[str]) -> Tensor:
        lengths = [len(ids) for ids in self.tokenizer(texts, truncation=True)["input_ids"]]
        if 0 in lengths:
            text = texts[lengths.index(0)]
            raise PlanError([f"{self.method}: embedding: the sentence encoder makes no token of the prompt {text!r}"])
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        with torch.no_grad(), evaluating(self.model):
            hidden = self.model(**inputs).last_hidden_state
        return mean_hidden(hidden, inputs["attention_mask"])
