"""What can go wrong between here and the Hub: what passes is tried again, the rest is told with what to do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors

from trl_ext.run_facts import PublishError

T = TypeVar("T")
WAITS = (1.0, 4.0)
"""Seconds before the second and the third attempt, when the Hub fails or the connection breaks."""


def patiently(call: Callable[[], T]) -> T:
    """`call()`, tried again when the Hub fails (5xx, 429) or the connection breaks: all that we ask may be asked twice."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            if not _passing(error):
                raise
            time.sleep(wait)
    return call()


def _cause(error: BaseException) -> BaseException:
    """The Hub's own error: an upload that failed wraps it."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _unreachable(error: BaseException) -> bool:
    """Whether no answer came: what the HTTP library raises, whichever it is, or the switch HF_HUB_OFFLINE."""
    return isinstance(error, hub_errors.HTTPError | ConnectionError | TimeoutError) and _status(error) is None


def _passing(error: BaseException) -> bool:
    error = _cause(error)
    status = _status(error)
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return False
    return _unreachable(error) or (status is not None and (status >= 500 or status == 429))


@contextlib.contextmanager
def told(repo: str, api: HfApi) -> Iterator[None]:
    """Turns the Hub's errors into a PublishError that says what to do, without the token."""
    try:
        yield
    except PublishError:
        raise
    except Exception as raised:
        error = _cause(raised)
        if _status(error) is None and not _unreachable(error) and not isinstance(error, ValueError):
            raise
        what = _advice(error, api.endpoint)
        raise PublishError(f"{repo} on {api.endpoint}", [what.replace(str(api.token), "<token>")]) from None


def _advice(error: BaseException, endpoint: str) -> str:
    status = _status(error)
    said = " ".join(str(getattr(error, "server_message", None) or error).split())
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to publish"
    if _unreachable(error):
        return f"no answer from {endpoint}: check the network (or HF_ENDPOINT), then run the same command again"
    if status == 401:
        return (
            "the token is not valid, or the repository does not exist for it (401): `hf auth login`, or set HF_TOKEN"
        )
    if isinstance(error, hub_errors.GatedRepoError):
        return "gated: accept its terms on its page with this account first"
    if status == 403:
        return f"no permission (403): the token needs write access to this name; {said}"
    if status == 404:
        return "there is no such repository (404), or this token may not see it"
    if status is not None and status >= 500:
        return f"the Hub failed ({status}) three times: run the same command later; what was sent is kept"
    return said
