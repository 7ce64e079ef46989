"""Replies of a policy to prompts, the same for the same seed: through transformers, or TRL's vLLM server."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from trl_ext.forward import generated, undisturbed

Row = Mapping[str, Any]
Sample = dict[str, Any]
"""{"text", "tokens", "cut"}: a reply without special tokens, its token ids, and whether it was cut off before its end."""


@dataclass(frozen=True)
class Drawing:
    """How replies are drawn: `batch` at once, at most `length` tokens each."""

    temperature: float
    top_p: float
    length: int
    batch: int


class Sampler(Protocol):
    """What samples."""

    def sample(self, rows: Sequence[Row], n: int, drawing: Drawing, seed: str) -> list[list[Sample]]:
        """n replies to each row's prompt; `seed` decides them together with the rows before in their batch."""


def number_of(seed: str) -> int:
    """A 32-bit seed from words such as "0/round 1/batch 3"."""
    return int(hashlib.sha256(seed.encode()).hexdigest()[:8], 16)


def prompt_ids(tokenizer: Any, row: Row) -> list[int]:
    """A prompt's tokens as the trainer sees them, with the start of the reply."""
    settings = row.get("chat_template_kwargs") or {}
    if isinstance(row["prompt"], str):
        return list(tokenizer(row["prompt"])["input_ids"])
    return list(
        tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False, **settings
        )
    )


def sample_of(tokenizer: Any, ids: Sequence[int], ends: set[int]) -> Sample:
    """A reply from generated ids, up to and including its end token; without one it was cut off."""
    tokens = list(ids)
    stop = next((i for i, token in enumerate(tokens) if token in ends), None)
    tokens = tokens if stop is None else tokens[: stop + 1]
    return {"text": tokenizer.decode(tokens, skip_special_tokens=True), "tokens": tokens, "cut": stop is None}


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a reply: the tokenizer's, and those of the model's generation settings."""
    own = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])}


@dataclass(frozen=True)
class TransformersSampler:
    """`model.generate` in evaluation mode. Mode and random state are left as they were."""

    model: Any
    tokenizer: Any

    def sample(self, rows: Sequence[Row], n: int, drawing: Drawing, seed: str) -> list[list[Sample]]:
        """Batches hold whole prompts, at least one."""
        at_once, found = max(1, drawing.batch // n), []
        for number, start in enumerate(range(0, len(rows), at_once)):
            part = [prompt_ids(self.tokenizer, row) for row in rows[start : start + at_once]]
            with undisturbed(self.model, number_of(f"{seed}/{number}")):
                replies = self._batch([ids for ids in part for _ in range(n)], drawing)
            found += [replies[i : i + n] for i in range(0, len(replies), n)]
        return found

    def _batch(self, prompts: Sequence[Sequence[int]], drawing: Drawing) -> list[Sample]:
        device, pad = self.model.device, self.tokenizer.pad_token_id
        longest, ends = max(map(len, prompts)), end_tokens(self.model, self.tokenizer)
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        output = generated(
            self.model,
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=drawing.temperature,
            top_p=drawing.top_p,
            top_k=0,
            max_new_tokens=drawing.length,
            pad_token_id=pad,
            eos_token_id=sorted(ends),
        )
        return [sample_of(self.tokenizer, row, ends) for row in output[:, longest:].tolist()]


@dataclass
class VllmSampler:
    """TRL's vLLM client. The weights of `model` are sent to the server before the first batch.

    vLLM draws the same replies for a seed on the same server and version; resumed rounds read their files anyway.
    """

    model: Any
    tokenizer: Any
    client: Any
    _sent: bool = False

    def sample(self, rows: Sequence[Row], n: int, drawing: Drawing, seed: str) -> list[list[Sample]]:
        """One request for each batch of prompts."""
        if not self._sent:
            self.client.update_model_params(self.model)
            self.client.reset_prefix_cache()
            self._sent = True
        at_once, found, ends = max(1, drawing.batch // n), [], end_tokens(self.model, self.tokenizer)
        for number, start in enumerate(range(0, len(rows), at_once)):
            answer = self.client.generate(
                prompts=[prompt_ids(self.tokenizer, row) for row in rows[start : start + at_once]],
                n=n,
                temperature=drawing.temperature,
                top_p=drawing.top_p,
                max_tokens=drawing.length,
                generation_kwargs={"seed": number_of(f"{seed}/{number}")},
            )
            replies = [sample_of(self.tokenizer, ids, ends) for ids in answer["completion_ids"]]
            found += [replies[i : i + n] for i in range(0, len(replies), n)]
        return found


def token_log_probs(model: Any, tokenizer: Any, row: Row, tokens: Sequence[int], temperature: float) -> list[float]:
    """log p of each token of a reply to the row's prompt, at a temperature: one forward without gradient."""
    prompt = prompt_ids(tokenizer, row)
    ids = torch.tensor([[*prompt, *tokens]], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1).double().tolist()


def kl_of_samples(other: Sequence[float], own: Sequence[float]) -> float:
    """KL(other || own) per token from log-probs of tokens that `own` sampled: mean of r log r - r + 1, r = other / own.

    Unbiased for tokens drawn from `own` itself, and never negative; tokens drawn with top_p < 1 leave its tail out.
    """
    gaps = torch.tensor(list(other), dtype=torch.float64) - torch.tensor(list(own), dtype=torch.float64)
    return float((gaps.exp() * gaps - gaps.exp() + 1).mean())


def vllm_client(base_url: str, device: Any) -> Any:
    """TRL's client of a running server, ready to send weights to it. ImportError without vLLM."""
    from trl.generation.vllm_client import VLLMClient

    client = VLLMClient(base_url=base_url, connection_timeout=240.0)
    client.init_communicator(device=device)
    return client
