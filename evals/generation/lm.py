"""The model that lm-eval sees: it answers from stored replies, so that lm-eval's own files come out of our runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from evals.generation.store import Reply, StoreError, text_hash
from evals.task import DataError

Replies = Mapping[tuple[str, int], Reply]


class StoredLM(LM):
    """One subject; `replies`: task -> (item, sample) -> reply.

    With a tokenizer it builds the prompts from lm-eval's requests and checks that the replies answer these very texts.
    Without one (regrading needs no model) replies are found by item and sample alone.
    """

    def __init__(self, replies: Mapping[str, Replies], tokenizer: Any = None, settings: Any = None) -> None:
        super().__init__()
        self._replies, self._tokenizer, self._settings = replies, tokenizer, dict(settings or {})

    @property
    def tokenizer_name(self) -> str:
        """Asked for by lm-eval's request cache, which is not used here."""
        return "stored"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template that lm-eval writes into its result file."""
        return "" if self._tokenizer is None else str(self._tokenizer.chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt's text."""
        return "" if self._tokenizer is None else prompt_text(self._tokenizer, chat_history, self._settings)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """A text for each request. lm-eval repeats a request once per sample: the n-th is sample n."""
        return [self._text(*named) for named in zip(requests, samples_of(requests), strict=True)]

    def _text(self, request: Instance, sample: int) -> str:
        item = str(request.doc["id"])
        reply = self._replies[str(request.task_name)][item, sample]
        if self._tokenizer is not None and reply.prompt_hash != text_hash(str(request.args[0])):
            raise StoreError(f"{request.task_name}: the reply to {item} answers another prompt than lm-eval's request")
        return reply.text

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not for these tasks."""
        raise NotImplementedError("our tasks generate; none asks for log-likelihoods")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Not for these tasks."""
        raise NotImplementedError("our tasks generate; none asks for log-likelihoods")


def samples_of(requests: Sequence[Instance]) -> list[int]:
    """The sample that each request stands for: how often its item occurred before."""
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for request in requests:
        name = str(request.task_name), str(request.doc["id"])
        found.append(seen[name])
        seen[name] += 1
    return found


def prompt_text(tokenizer: Any, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any]) -> str:
    """The chat template's text, open for the assistant. Raises DataError when the template refuses the messages."""
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **settings)
    except Exception as error:  # a template may raise anything, for instance on a system turn
        raise DataError(f"the chat template refuses the turns {[m['role'] for m in messages]}: {error}") from error
    return str(text)
