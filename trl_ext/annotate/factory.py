"""From what stands in a recipe to an annotator."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from trl_ext.annotate.base import Annotator
from trl_ext.annotate.endpoint import EndpointAnnotator, check_fields
from trl_ext.annotate.policy import PolicyAnnotator


def make_annotator(
    spec: str | Mapping[str, Any], generate: Callable[[list[list[dict[str, Any]]]], list[str]] | None = None
) -> Annotator:
    """ "policy" (with `generate`), "sandbox", "module.function", or the fields of an `EndpointAnnotator`.

    Raises ValueError for anything else, ImportError or AttributeError when a named function does not exist.
    """
    if isinstance(spec, Mapping):
        check_fields(EndpointAnnotator, spec)
        return EndpointAnnotator(**spec)
    if spec == "policy":
        if generate is None:
            raise ValueError("the policy annotator needs the trainer's generation")
        return PolicyAnnotator(generate)
    if spec == "sandbox":
        spec = "trl_ext.sandbox.annotator.rule_annotator"
    module, _, function = spec.rpartition(".")
    if not module:
        raise ValueError(f"'{spec}' is not policy, sandbox, module.function or a mapping of endpoint fields")
    return getattr(importlib.import_module(module), function)
