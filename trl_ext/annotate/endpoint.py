"""An annotator behind any OpenAI-compatible endpoint, local or remote (TRACE card: external annotator)."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_ext.annotate.answers import annotate_with
from trl_ext.annotate.base import AnnotatorError, RefusedError, Request, Span
from trl_ext.annotate.cache import AnswerCache, content_key
from trl_ext.annotate.chat_http import TransientError, post_chat

MAX_BACKOFF = 30.0  # seconds
# A batch is given up when this many requests per thread failed and none was answered: with 256 requests and four tries
# of a minute each, a dead server would otherwise hold training for hours.
GIVE_UP_ROUNDS = 2

# No user, password or query: those can hold secrets, and the address is shown in errors.
_BASE_URL = re.compile(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", re.ASCII)
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_FIXED = {"model", "messages", "stream"}


@dataclass(frozen=True)
class EndpointAnnotator:
    """Asks `model` at `base_url`/chat/completions, greedily, with up to `concurrency` requests at a time.

    - `api_key_env`: NAME of the environment variable with the key; None sends no key. The key is read at each call
      and kept nowhere.
    - `timeout` (s) per try; `retries` more tries after time-outs, lost connections, 408, 429, 5xx and unreadable
      replies, waiting `backoff` (s), then twice that, and so on; Retry-After is honoured up to a bound.
    - `cache_dir`: answers are kept there by content (model, messages, parameters); None keeps none.
    - `extra_body`: more keys of the request, for instance to turn thinking off; may override temperature, max_tokens.
    - `stats` counts since the start: `requests`, `cache_hits`, `failures` (no answer after the retries: no spans for
      that rollout), `parse_failures`, `seconds`. Equal requests of one batch are sent once.

    Raises ValueError for unusable settings. Calling raises AnnotatorError for any other 4xx status, an unset key
    variable, or when every request of a batch failed.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    timeout: float = 60.0
    retries: int = 3
    concurrency: int = 8
    cache_dir: str | Path | None = None
    max_tokens: int = 512
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    backoff: float = 1.0
    stats: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("requests", "cache_hits", "failures", "parse_failures", "seconds"), 0),
        init=False,
        compare=False,
    )

    def __post_init__(self) -> None:
        problems = _setting_problems(self)
        if problems:
            raise ValueError("EndpointAnnotator: " + "; ".join(problems))

    @property
    def url(self) -> str:
        """Where requests go."""
        return self.base_url.rstrip("/") + "/chat/completions"

    def __call__(self, requests: Sequence[Request]) -> list[list[Span]]:
        """Spans of each request, in order."""
        return annotate_with(self.complete, requests, self.stats)

    def _body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        settings = {"temperature": 0, "max_tokens": self.max_tokens, **self.extra_body}
        return {"model": self.model, "messages": messages, **settings}

    def complete(self, conversations: list[list[dict[str, str]]]) -> list[str | None]:
        """The answer to each conversation, in order; None where none came after the retries. Raises as a call does."""
        bodies = [self._body(messages) for messages in conversations]
        keys = [content_key(body) for body in bodies]
        cache = AnswerCache(Path(self.cache_dir).expanduser()) if self.cache_dir is not None else None
        unique = dict(zip(keys, bodies, strict=True))
        stored = {key: text for key in unique if cache and (text := cache.get(key)) is not None}
        asked = self._ask_all({key: body for key, body in unique.items() if key not in stored}, cache)
        answers = [stored[key] if key in stored else asked[key] for key in keys]
        reasons = [answer for answer in answers if isinstance(answer, TransientError)]
        self.stats["cache_hits"] += sum(key in stored for key in keys)
        self.stats["failures"] += len(reasons)
        if len(reasons) == len(answers):
            kind = RefusedError if all(reason.refused for reason in reasons) else AnnotatorError
            raise kind(
                f"annotator endpoint {self.url}: all {len(answers)} requests of a batch failed "
                f"({self.retries + 1} tries each). Last reason: {reasons[0]}. "
                "Check that the server runs, base_url, timeout and the server's rate limits; after a status 400, "
                "413 or 422 also extra_body, max_tokens and the model's context length."
            )
        return [answer if isinstance(answer, str) else None for answer in answers]

    def _ask_all(
        self, bodies: dict[str, dict[str, Any]], cache: AnswerCache | None
    ) -> dict[str, str | TransientError]:
        """For each body the answer, or the last reason why there is none. Any other error stops the rest at once."""
        if not bodies:
            return {}
        batch = _Batch(_read_key(self.api_key_env), cache)
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="annotator") as pool:
            futures = {key: pool.submit(self._ask, key, body, batch) for key, body in bodies.items()}
            try:
                done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()  # raises what stopped the batch, before any unfinished future is looked at
                return {key: future.result() for key, future in futures.items()}
            finally:
                batch.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, key: str, body: dict[str, Any], batch: _Batch) -> str | TransientError:
        """One answer with its retries. Sends nothing any more when the server looks dead (see `GIVE_UP_ROUNDS`)."""
        if not batch.answered and len(batch.failed) >= GIVE_UP_ROUNDS * self.concurrency:
            return batch.failed[-1]
        payload = json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            try:
                text = post_chat(self.url, payload, batch.api_key, self.timeout)
            except TransientError as error:
                reason = error
            else:
                batch.answered = True
                if batch.cache and text:  # an empty answer may be a passing fault of the server
                    batch.cache.put(key, text)
                return text
            pause = min(self.backoff * 2**attempt, MAX_BACKOFF) if reason.wait is None else reason.wait
            if attempt == self.retries or batch.stop.wait(pause):
                break
        batch.failed.append(reason)
        return reason


@dataclass
class _Batch:
    """What the threads of one batch share. The key lives as long as the batch and is left out of repr."""

    api_key: str | None = field(repr=False)
    cache: AnswerCache | None
    stop: threading.Event = field(default_factory=threading.Event)
    answered: bool = False
    failed: list[TransientError] = field(default_factory=list)


def _read_key(variable: str | None) -> str | None:
    """The key in an environment variable. No error of this module, or of the HTTP library, may show it."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise AnnotatorError(
            f"annotator: the environment variable {variable} (api_key_env) is not set; export the key"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise AnnotatorError(
            f"annotator: {variable} holds characters that no key has (spaces, line breaks, non-ASCII)"
        )
    return key


def check_fields(endpoint: type, given: Iterable[str], but: Iterable[str] = ()) -> None:
    """Raises ValueError for a name that is none of a dataclass's settings, or one of `but`, which a recipe cannot set."""
    known = {f.name for f in dataclasses.fields(endpoint) if f.init} - set(but)
    if unknown := set(given) - known:
        raise ValueError(f"unknown endpoint field {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")


def _setting_problems(annotator: EndpointAnnotator) -> list[str]:
    checks = {
        "base_url must be http(s)://host[:port][/path], without user, query or spaces": bool(
            annotator.base_url.isascii() and _BASE_URL.fullmatch(annotator.base_url)
        ),
        "base_url must be the part before /chat/completions": not annotator.url.endswith("/chat/completions" * 2),
        "api_key_env must be the NAME of an environment variable (capitals, digits, _), not the key": (
            annotator.api_key_env is None or bool(_VARIABLE.fullmatch(annotator.api_key_env))
        ),
        "timeout must be over 0": annotator.timeout > 0,
        "retries must be 0 or more": annotator.retries >= 0,
        "concurrency must be 1 or more": annotator.concurrency >= 1,
        "max_tokens must be 1 or more": annotator.max_tokens >= 1,
        "backoff must be 0 or more": annotator.backoff >= 0,
        f"extra_body must not set {', '.join(sorted(_FIXED))}": not _FIXED & set(annotator.extra_body),
    }
    return [message for message, ok in checks.items() if not ok]
