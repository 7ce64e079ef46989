"""Tools that a recipe gives the model (`tools:`): the sandbox's by name, or any `module.function`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.utils import get_json_schema

from trl_ext.plan import did_you_mean
from trl_ext.rewards.registry import imported

TOOLS = {"calculator": "trl_ext.sandbox.calculator.calculator"}
"""Name in a recipe -> function."""


def load_tools(spec: Any) -> list[Callable[..., Any]]:
    """The functions behind a name or a list of names, as TRL's `tools` takes them.

    Raises ValueError for an unknown name, a function that cannot be imported, or one whose signature and docstring do
    not tell the model how to call it.
    """
    names = [] if spec is None else [spec] if isinstance(spec, str) else list(spec)
    return [_tool(str(name)) for name in names]


def _tool(name: str) -> Callable[..., Any]:
    if name not in TOOLS and "." not in name:
        raise ValueError(
            f"unknown tool '{name}'{did_you_mean(name, TOOLS)}; known: {', '.join(TOOLS)}, or module.function"
        )
    tool: Callable[..., Any] = imported(TOOLS.get(name, name))
    try:
        get_json_schema(tool)
    except Exception as error:  # what a docstring lacks is told in words of transformers
        raise ValueError(f"'{name}' cannot be described to the model: {error}") from None
    return tool
