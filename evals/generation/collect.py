"""Asks a model what its store does not hold yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evals.generation.hf import Generator, Job
from evals.generation.lm import prompt_text
from evals.generation.store import Store, text_hash
from evals.task import DataError, Item, Sampling

MINIMUM = 16
"""New tokens below which a task is not worth asking."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The texts of a task's items, by item, and the length of the longest in tokens."""

    texts: Mapping[str, str]
    longest: int


def prompts_of(items: Sequence[Item], tokenizer: Any, settings: Mapping[str, Any]) -> Prompts:
    """The chat template's text for each item. Raises DataError when the template refuses one."""
    texts = {item.id: prompt_text(tokenizer, item.messages, settings) for item in items}
    ids = tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"]
    return Prompts(texts, max(map(len, ids)))


def fitted(task: str, sampling: Sampling, longest: int, context: int | None) -> tuple[Sampling, str | None]:
    """`sampling` with as many new tokens as fit beside the longest prompt, and a note if that is fewer than asked for.

    All items of a task get the same limit, and no prompt is ever cut. Raises DataError when a prompt does not fit.
    """
    if context is None or longest + sampling.max_new_tokens <= context:
        return sampling, None
    room = context - longest
    if room < MINIMUM:
        raise DataError(
            f"the longest prompt of {task} has {longest} tokens and the model's context is {context}: it cannot answer"
        )
    note = f"the limit is {room} new tokens, not {sampling.max_new_tokens}: the model's context has {context} tokens"
    return dataclasses.replace(sampling, max_new_tokens=room), note


def collect(
    store: Store,
    generator: Generator,
    task: str,
    prompts: Mapping[str, str],
    sampling: Sampling,
    advance: Callable[[int], None],
    processes: Any = None,
) -> None:
    """Fills the store with `sampling.samples` replies to each prompt; what it holds already is not asked again.

    processes: accelerate's PartialState when several share the work, each with its own copy of the model. `advance` is
    told of each reply.
    """
    jobs = [Job(task, item, n, text) for item, text in prompts.items() for n in range(sampling.samples)]
    found = store.read()
    missing = [job for job in jobs if (job.item, job.sample, text_hash(job.prompt)) not in found]
    advance(len(jobs) - len(missing))
    if processes is not None:
        processes.wait_for_everyone()  # all have read what there was before one adds to it
    count = 1 if processes is None else processes.num_processes
    own = missing[0 if processes is None else processes.process_index :: count]
    if own:
        with store.writing():
            for replies in generator.generate(own, sampling):
                store.append(replies)
                advance(len(replies) * count)
    if processes is not None:
        processes.wait_for_everyone()
