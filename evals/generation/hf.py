"""Replies from a transformers model: every sampling field explicit, noise that belongs to the question, any batch size."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from evals.generation.noise import SharedNoise, row_seed
from evals.generation.store import Reply, text_hash
from evals.task import Sampling

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One reply to draw: the text that the model is given, and what it answers."""

    task: str
    item: str
    sample: int
    prompt: str


class Generator(Protocol):
    """A model that answers; `generate` gives replies in batches, as they are done."""

    def generate(self, jobs: Sequence[Job], sampling: Sampling) -> Iterator[list[Reply]]: ...


class HFGenerator:
    """Replies through `model.generate`.

    `batch_size` is halved when the GPU runs out of memory, which changes no reply beyond the rounding of kernels.
    `constraint` makes a logits processor for the items of a batch (`evals.generation.control`).
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, constraint: Any = None) -> None:
        self.model, self.tokenizer, self.batch_size, self.constraint = model, tokenizer, batch_size, constraint
        self.ends = end_ids(model, tokenizer)

    def generate(self, jobs: Sequence[Job], sampling: Sampling) -> Iterator[list[Reply]]:
        """Longest prompts first, so that memory runs out at once or not at all."""
        ids = self.tokenizer([job.prompt for job in jobs], add_special_tokens=False)["input_ids"]
        waiting = sorted(zip(jobs, ids, strict=True), key=lambda pair: -len(pair[1]))
        while waiting:
            part = waiting[: self.batch_size]
            try:
                replies = self._batch([job for job, _ in part], [tokens for _, tokens in part], sampling)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size = max(1, min(self.batch_size, len(part)) // 2)
                logger.warning("out of memory: going on with %d replies at a time", self.batch_size)
                torch.cuda.empty_cache()
                continue
            waiting = waiting[len(part) :]
            yield replies

    def _batch(self, jobs: Sequence[Job], ids: Sequence[list[int]], sampling: Sampling) -> list[Reply]:
        batch, mask = left_padded(ids, self.tokenizer.pad_token_id)
        device = self.model.device
        config = GenerationConfig(
            do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=self.ends, pad_token_id=self.ends[0]
        )
        with own_generation_config(self.model), torch.no_grad():
            output = self.model.generate(
                input_ids=batch.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=self._processors(jobs, batch.shape[1], sampling),
            )
        return [
            self._reply(job, tokens) for job, tokens in zip(jobs, output[:, batch.shape[1] :].tolist(), strict=True)
        ]

    def _processors(self, jobs: Sequence[Job], start: int, sampling: Sampling) -> LogitsProcessorList:
        found: list[LogitsProcessor] = [] if self.constraint is None else [self.constraint(jobs, start)]
        if sampling.temperature > 0:
            seeds = [row_seed(sampling.seed, job.task, job.item, job.sample) for job in jobs]
            found += [*filters(sampling), SharedNoise(seeds, start)]
        return LogitsProcessorList(found)

    def _reply(self, job: Job, tokens: list[int]) -> Reply:
        count = next((n for n, token in enumerate(tokens, 1) if token in self.ends), None)
        kept = tokens if count is None else tokens[:count]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        finish = "length" if count is None else "stop"
        return Reply(job.item, job.sample, text_hash(job.prompt), text, len(kept), finish)  # type: ignore[arg-type]


def filters(sampling: Sampling) -> list[LogitsProcessor]:
    """Temperature, then top-k, then top-p; those that are off are left out."""
    found: list[Any] = [] if sampling.temperature == 1 else [TemperatureLogitsWarper(sampling.temperature)]
    found += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    return found + ([TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else [])


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a reply: the tokenizer's, and those of the model's own generation config (Qwen has two)."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *named) if i is not None))


@contextlib.contextmanager
def own_generation_config(model: Any) -> Iterator[None]:
    """`generate` fills every field that is None from the model's own config (top_k, repetition penalty, length): here
    it finds an empty one.
    """
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before, training = owner.generation_config, model.training
    owner.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        owner.generation_config = before
        model.train(training)


def left_padded(ids: Sequence[Sequence[int]], pad: int | None) -> tuple[Tensor, Tensor]:
    """Token lists -> (B, L) ids and mask, padded on the left."""
    width = max(map(len, ids))
    fill = 0 if pad is None else pad
    batch = torch.tensor([[fill] * (width - len(row)) + list(row) for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    return batch, mask
