"""One POST to an OpenAI-compatible `/chat/completions`, with bounded time and size, and errors sorted by what to do."""

from __future__ import annotations

import http.client
import json
import time
from contextlib import suppress
from email.message import Message
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from trl_ext.annotate.base import AnnotatorError

MAX_RESPONSE_BYTES = 4 << 20
MAX_RETRY_AFTER = 60.0  # seconds; a longer Retry-After is cut, a training run waits for this
EXCERPT_CHARS = 200
MIN_SECRET_CHARS = 8
REFUSED = (400, 413, 422)
"""Statuses of a request that the server does not want, such as one over the context length."""
_CHUNK = 1 << 16

_ADVICE = {
    401: "the variable named by api_key_env: is it set, and is its key valid for this server?",
    403: "whether this key may use this model",
    404: "base_url (the part before /chat/completions) and the model name",
}


class TransientError(Exception):
    """Worth another try. `wait` is the server's Retry-After in seconds, if it gave one.

    `refused`: the server read the request and did not want it, so that others may go through.
    """

    def __init__(self, reason: str, wait: float | None = None, refused: bool = False):
        super().__init__(reason)
        self.wait, self.refused = wait, refused


class _NoRedirects(HTTPRedirectHandler):
    """A redirect would carry the key to another address, so it is reported as an error instead."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = build_opener(_NoRedirects)


def post_chat(url: str, body: bytes, key: str | None, timeout: float) -> str:
    """The text of the first choice; "" if the server gave none (null). `timeout` in seconds.

    Raises TransientError (time-out, no connection, 408, 429, 5xx, unreadable or oversized reply, and what one odd
    rollout may cause alone: 400, 413, 422) or AnnotatorError (any other status). A key is replaced by *** wherever the server repeats it.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        with _OPENER.open(Request(url, body, headers), timeout=timeout) as response:
            raw = _read(response, time.monotonic() + timeout)
    except HTTPError as error:
        raise _status_error(url, error, key) from None
    except (OSError, http.client.HTTPException) as error:  # time-outs and URLError are OSErrors
        raise TransientError(_hide(f"{type(error).__name__}: {error}", key)) from None
    return _hide(_content(raw, key), key)


def _read(response: Any, deadline: float) -> bytes:
    """The whole reply. The deadline also ends replies that drip: a socket time-out starts anew with each byte."""
    chunks, size = [], 0
    while chunk := response.read1(_CHUNK):
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_RESPONSE_BYTES:
            raise TransientError(f"the reply is larger than {MAX_RESPONSE_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TransientError("the reply did not end within the time-out")
    return b"".join(chunks)


def _content(raw: bytes, key: str | None) -> str:
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        content = json.loads(raw)["choices"][0]["message"]["content"]
        if content is None or isinstance(content, str):
            return content or ""
    raise TransientError(f"the reply has no text at choices[0].message.content: {_excerpt(raw, key)}")


def _status_error(url: str, error: HTTPError, key: str | None) -> Exception:
    try:
        with error:
            excerpt = _excerpt(error.read1(_CHUNK), key)
    except (OSError, http.client.HTTPException):
        excerpt = "(its body could not be read)"
    if error.code in (*REFUSED, 408, 429) or error.code >= 500:
        # A refused request (a rollout over the context length, say) costs its own span, not the run: if the settings
        # are at fault, the whole batch fails and that is an error.
        refused = error.code in REFUSED
        return TransientError(f"status {error.code}: {excerpt}", _retry_after(error.headers), refused)
    if error.code < 400:
        check = "base_url: the server redirects, which is not followed; give the final address"
    else:
        check = _ADVICE.get(error.code, "base_url, model and extra_body")
    return AnnotatorError(f"annotator endpoint {url} answered with status {error.code}: {excerpt}\nCheck {check}.")


def _retry_after(headers: Message) -> float | None:
    value = headers.get("Retry-After", "").strip()
    if not (value.isascii() and value.isdigit()):
        return None  # absent, or a date: use the own back-off
    return min(float(value[:9]), MAX_RETRY_AFTER)


def _excerpt(raw: bytes, key: str | None) -> str:
    return _hide(raw.decode("utf-8", "replace"), key)[:EXCERPT_CHARS]


def _hide(text: str, key: str | None) -> str:
    # Shorter ones are placeholders of local servers ("EMPTY", "1"); replacing those would damage answers.
    return text.replace(key, "***") if key and len(key) >= MIN_SECRET_CHARS else text
