"""Tool use as reward functions, on the messages that TRL hands over after its tool loop.

A completion is a list of messages: the assistant's may carry `tool_calls`, each {"type": "function", "function": {"name",
"arguments"}}, and {"role": "tool", "name", "content"} messages answer them. A failed call is answered by TRL with the text
of {"error": ...}; a tool may also say "error: ...", as the sandbox's calculator does. Calls that were never answered (the
completion was cut off) are not successful. Ours, no paper; time is linear in the completion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from evals.graders.schema import Schema, compiled
from evals.graders.strict_json import load
from trl_ext.rewards.checked import Reward, abstaining

ERROR = re.compile(r"\s{0,8}(?:\{\s{0,8}['\"]error['\"]\s{0,8}:|error\b)", re.IGNORECASE)
"""How the answer to a failed call begins."""
CALL_MARK = "<tool_call>"
"""Where it stands in an assistant's text, a call could not be read: Qwen's and Hermes's mark, which TRL's parser takes out
of the text of every call that it can read."""


def make_tool_call_count(least: int = 1, most: int = 8) -> Reward:
    """`tool_call_count`: 1 if a completion makes at least `least` and at most `most` calls, else 0."""
    if not 0 <= least <= most:
        raise ValueError(f"least {least} and most {most}: expected 0 <= least <= most")

    def tool_call_count(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        return [float(least <= len(calls_of(completion)) <= most) for completion in completions]

    return tool_call_count


def make_tool_call_success() -> Reward:
    """`tool_call_success`: answered without an error / all calls; None (not applicable) for a completion without calls."""

    def tool_call_success(completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
        return [_success(completion) for completion in completions]

    return abstaining(tool_call_success)


def make_tool_called_when_needed(column: str = "needs_tool") -> Reward:
    """`tool_called_when_needed`: 1 if a call was made exactly where the data set's `column` is true, else 0.

    None for a row whose column is None.
    """

    def tool_called_when_needed(completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
        return [
            None if needed is None else float(bool(calls_of(completion)) == bool(needed))
            for completion, needed in zip(completions, kwargs[column], strict=True)
        ]

    tool_called_when_needed.needs_columns = [(column,)]  # type: ignore[attr-defined]
    return tool_called_when_needed


def make_tool_call_format(tools: Sequence[str] | Mapping[str, Mapping[str, Any] | None]) -> Reward:
    """`tool_call_format`: well-formed calls / all that were tried; None for a completion that tried none.

    Well-formed: a function of `tools`, with a JSON object as arguments (or its text) that passes the JSON Schema that
    `tools`, as a mapping, gives for it (None: any object). A call that could not be read (`CALL_MARK`) counts as tried.
    """
    if isinstance(tools, str) or not tools:
        raise ValueError(f"tools: expected a list of names, or a mapping of names to JSON Schemas, got {tools!r}")
    given = dict(tools) if isinstance(tools, Mapping) else dict.fromkeys(tools)
    schemas = {name: _arguments_schema(name, schema) for name, schema in given.items()}

    def tool_call_format(completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
        return [_format(completion, schemas) for completion in completions]

    return abstaining(tool_call_format)


def calls_of(completion: Any) -> list[Any]:
    """All tool calls of a completion, in order; none of a plain text."""
    return [call for turn in _turns(completion, "assistant") for call in turn.get("tool_calls") or []]


def _turns(completion: Any, role: str) -> list[Mapping[str, Any]]:
    return [] if isinstance(completion, str) else [turn for turn in completion if turn.get("role") == role]


def _success(completion: Any) -> float | None:
    calls = len(calls_of(completion))
    good = sum(not _failed(turn.get("content")) for turn in _turns(completion, "tool"))
    return good / calls if calls else None


def _failed(content: Any) -> bool:
    """Whether a tool's answer is an error; content blocks (pictures) never are."""
    return isinstance(content, str) and ERROR.match(content) is not None


def _arguments_schema(name: Any, schema: Any) -> Schema:
    """ValueError, which names the tool, for what is no JSON Schema."""
    if schema is not None and not isinstance(schema, Mapping):
        raise ValueError(
            f"tools: the JSON Schema of '{name}' must be a mapping, or null for any object; got {schema!r}"
        )
    try:
        return compiled(True if schema is None else dict(schema))
    except ValueError as error:
        raise ValueError(f"tools: the JSON Schema of '{name}': {error}") from error


def _format(completion: Any, schemas: Mapping[str, Schema]) -> float | None:
    calls = calls_of(completion)
    texts = (
        [completion] if isinstance(completion, str) else [t.get("content") for t in _turns(completion, "assistant")]
    )
    tried = len(calls) + sum(text.count(CALL_MARK) for text in texts if isinstance(text, str))
    return sum(_well_formed(call, schemas) for call in calls) / tried if tried else None


def _well_formed(call: Any, schemas: Mapping[str, Schema]) -> bool:
    function = call.get("function") if isinstance(call, Mapping) and call.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or name not in schemas:
        return False
    arguments = _arguments(function.get("arguments"))  # type: ignore[union-attr]
    return isinstance(arguments, dict) and schemas[name].valid(arguments)


def _arguments(given: Any) -> Any:
    """The arguments, read by the bounded parser; None for what is not JSON. TRL hands over what its own parser read."""
    try:
        return load(given if isinstance(given, str) else json.dumps(given)).value
    except (TypeError, ValueError, RecursionError):
        return None
