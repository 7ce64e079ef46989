"""A JSON Schema made ready: is a value valid, which keys must it have, which may it have?

Formats are asserted. References stay inside the document.

**Patterns** take time that is linear in the text. Those with look-around or back-references need backtracking: they end
after `BACKTRACKING` steps, or fewer in a long text, and then find nothing. Of a text (or of all texts in a value) with n
characters, n rounded up to a power of two, each step may read all, so there are at most `WORK` / n steps: 16,384 for
8,000 characters, which suffices to try a pattern everywhere; in a longer text it is tried near the beginning alone, or
where it is anchored by ^.

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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jsonschema_rs

from evals.graders import schema_nodes as nodes

Path = tuple[str, ...]
ITEMS = nodes.ITEMS
BACKTRACKING = 100_000
"""The most steps of a pattern with look-around or back-references."""
WORK = 2**27
"""Their steps times the characters that they may read: about half a second at the most."""


class Schema:
    """A compiled schema. ValueError when `document` is no valid schema, or refers to the network or to files."""

    def __init__(self, document: dict[str, Any] | bool) -> None:
        self.document = document
        try:
            self._validators = {BACKTRACKING: _validator(document, BACKTRACKING)}
        except ValueError as error:
            raise ValueError(f"not a usable JSON Schema: {' '.join(str(error).split())}") from None
        self._backtracks = _backtracks(document)
        self.required: dict[Path, frozenset[str] | None] = nodes.required(document)
        """Path of each required key to the types that its value may have; None where the schema names none."""

    @property
    def required_keys(self) -> frozenset[str]:
        """The names of the required keys at any depth."""
        return frozenset(path[-1] for path in self.required)

    def valid(self, value: Any) -> bool:
        """Whether a value that `strict_json` has read passes the schema."""
        return self._valid(value, _characters(value) if self._backtracks else 0)

    def _valid(self, value: Any, characters: int) -> bool:
        """Whether `value`, a part of one with so many characters, passes."""
        steps = _steps(characters)
        if steps not in self._validators:
            self._validators[steps] = _validator(self.document, steps)
        return self._validators[steps].is_valid(value)

    def key_counts(self, value: Any) -> tuple[int, int]:
        """(keys that the schema does not allow, all keys) of `value`, nested too. Below an invented key all are."""
        size = _characters(value) if self._backtracks else 0
        allowed = list(self._keys(value, [self.document], lambda pattern, key: _pattern(pattern)._valid(key, size)))
        return allowed.count(False), len(allowed)

    def _keys(self, value: Any, schemas: Sequence[Any], matches: Callable[[str, str], bool]) -> Iterator[bool]:
        """For each key in `value`, whether it is allowed. `schemas`: the subschemas that apply here. `matches`: whether a
        pattern is in a key."""
        if isinstance(value, dict):
            applicable = nodes.expanded(self.document, schemas)
            for key, below in value.items():
                found = nodes.below_key(applicable, key, matches)
                yield bool(found)
                yield from self._keys(below, found, matches)
        elif isinstance(value, list):
            applicable = nodes.expanded(self.document, schemas)
            for position, element in enumerate(value):
                yield from self._keys(element, nodes.below_index(applicable, position), matches)


@functools.lru_cache(1_000)
def _compiled(text: str) -> Schema:
    return Schema(json.loads(text))


def compiled(document: dict[str, Any] | bool) -> Schema:
    """`Schema(document)`, compiled once for equal documents."""
    return _compiled(json.dumps(document, sort_keys=True))


@functools.lru_cache(1_000)
def _pattern(pattern: str) -> Schema:
    return Schema({"pattern": pattern})


def matches(pattern: str, key: str) -> bool:
    """Whether a schema's regular expression finds something in `key`."""
    return _pattern(pattern).valid(key)


def _characters(value: Any) -> int:
    """Of all texts and keys in a JSON value."""
    count, left = 0, [value]
    while left:
        part = left.pop()
        if isinstance(part, str):
            count += len(part)
        elif isinstance(part, dict):
            left += [*part, *part.values()]
        elif isinstance(part, list):
            left += part
    return count


def _steps(characters: int) -> int:
    """Steps of backtracking in a text; its length counts as the next power of two, so that few validators are made."""
    return max(1, min(BACKTRACKING, WORK >> max(0, characters - 1).bit_length()))


def _refuse(uri: str) -> Any:
    raise ValueError(f"references outside the document are not followed: {uri}")


def _validator(document: dict[str, Any] | bool, steps: int) -> Any:
    options = jsonschema_rs.FancyRegexOptions(backtrack_limit=steps)
    return jsonschema_rs.validator_for(document, validate_formats=True, retriever=_refuse, pattern_options=options)


def _backtracks(document: dict[str, Any] | bool) -> bool:
    """Whether the engine that has neither look-around nor back-references refuses a pattern of a usable schema."""
    try:
        jsonschema_rs.validator_for(document, retriever=_refuse, pattern_options=jsonschema_rs.RegexOptions())
    except ValueError:
        return True
    return False
