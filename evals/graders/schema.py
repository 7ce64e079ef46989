"""A JSON Schema made ready: is a value valid, which keys must it have, which may it have?

Formats are asserted. References stay inside the document. Patterns run in bounded time.

**Key paths.** A path is a tuple of keys; `ITEMS` ("[]") stands for every element of an array. The rules are
conservative: a key is *required* only if every valid value has it, and *allowed* if some valid value might.
- required: `required` keys, those below them, and those in `items` where `minItems` is at least 1; through `$ref` and
  `allOf` all, through `oneOf` and `anyOf` what every branch requires.
- allowed: a key that any applicable subschema (`$ref`, `allOf`, `anyOf`, `oneOf`, `then`, `else`, `dependentSchemas`)
  lists in `properties`, matches in `patternProperties`, or opens by an `additionalProperties` that is written down and
  not false. JSON Schema lets an object have further keys by default; here those count as invented, since the schema
  names none of them. A subschema that says nothing about keys, in itself or in its branches, allows all.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema_rs

from evals.graders import schema_nodes as nodes

Path = tuple[str, ...]
ITEMS = nodes.ITEMS
BACKTRACKING = 100_000
"""Steps of a pattern with look-around; others take linear time."""


class Schema:
    """A compiled schema. ValueError when `document` is no valid schema, or refers to the network or to files."""

    def __init__(self, document: dict[str, Any] | bool) -> None:
        self.document = document
        try:
            self._validator = _validator(document)
        except ValueError as error:
            raise ValueError(f"not a usable JSON Schema: {' '.join(str(error).split())}") from None
        self.required: dict[Path, frozenset[str] | None] = nodes.required(document)
        """Path of each required key to the types that its value may have; None where the schema names none."""

    @property
    def required_keys(self) -> frozenset[str]:
        """The names of the required keys at any depth."""
        return frozenset(path[-1] for path in self.required)

    def valid(self, value: Any) -> bool:
        """Whether a value that `strict_json` has read passes the schema."""
        return self._validator.is_valid(value)

    def key_counts(self, value: Any) -> tuple[int, int]:
        """(keys that the schema does not allow, all keys) of `value`, nested too. Below an invented key all are."""
        allowed = list(self._keys(value, [self.document]))
        return allowed.count(False), len(allowed)

    def _keys(self, value: Any, schemas: Sequence[Any]) -> Iterator[bool]:
        """For each key in `value`, whether it is allowed. `schemas`: the subschemas that apply here."""
        if isinstance(value, dict):
            applicable = nodes.expanded(self.document, schemas)
            for key, below in value.items():
                found = nodes.below_key(applicable, key, matches)
                yield bool(found)
                yield from self._keys(below, found)
        elif isinstance(value, list):
            applicable = nodes.expanded(self.document, schemas)
            for position, element in enumerate(value):
                yield from self._keys(element, nodes.below_index(applicable, position))


@functools.lru_cache(1_000)
def _compiled(text: str) -> Schema:
    return Schema(json.loads(text))


def compiled(document: dict[str, Any] | bool) -> Schema:
    """`Schema(document)`, compiled once for equal documents."""
    return _compiled(json.dumps(document, sort_keys=True))


@functools.lru_cache(1_000)
def _pattern(pattern: str) -> Any:
    return _validator({"pattern": pattern})


def matches(pattern: str, key: str) -> bool:
    """Whether a schema's regular expression finds something in `key`."""
    return _pattern(pattern).is_valid(key)


def _refuse(uri: str) -> Any:
    raise ValueError(f"references outside the document are not followed: {uri}")


def _validator(document: dict[str, Any] | bool) -> Any:
    return jsonschema_rs.validator_for(
        document,
        validate_formats=True,
        retriever=_refuse,
        pattern_options=jsonschema_rs.FancyRegexOptions(backtrack_limit=BACKTRACKING),
    )
