"""A small validator for the keywords of `schema_synth`: the second opinion on every instance when it is made."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
}
LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "type": lambda v, name: TYPES[name](v),
    "enum": lambda v, allowed: v in allowed,
    "const": lambda v, constant: v == constant,
    "pattern": lambda v, regex: re.search(regex, v) is not None,
    "minLength": lambda v, n: len(v) >= n,
    "maxLength": lambda v, n: len(v) <= n,
    "minimum": lambda v, n: v >= n,
    "maximum": lambda v, n: v <= n,
    "exclusiveMinimum": lambda v, n: v > n,
    "minItems": lambda v, n: len(v) >= n,
    "maxItems": lambda v, n: len(v) <= n,
    "required": lambda v, keys: all(key in v for key in keys),
    "$defs": lambda v, definitions: True,
}


def conforms(schema: Schema, value: Any, root: Schema | None = None) -> bool:
    """Whether `value` is valid; knows the grammar's keywords alone, any other is a KeyError."""
    root = root or schema
    for keyword, rule in schema.items():
        if keyword == "$ref":
            ok = conforms(root["$defs"][rule.rsplit("/", 1)[1]], value, root)
        elif keyword == "oneOf":
            ok = sum(conforms(option, value, root) for option in rule) == 1
        elif keyword == "properties":
            ok = all(conforms(member, value[key], root) for key, member in rule.items() if key in value)
        elif keyword == "additionalProperties":
            ok = rule or value.keys() <= schema["properties"].keys()
        elif keyword == "items":
            ok = all(conforms(rule, element, root) for element in value)
        else:
            ok = LIMITS[keyword](value, rule)
        if not ok:
            return False
    return True
