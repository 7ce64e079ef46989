"""Walks through a schema document for `schema`: which keys does it require and allow? See there for the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

ITEMS = "[]"
MAX_REQUIRED = 1_000
"""Required paths that are listed; references can make them grow without measure."""
Path = tuple[str, ...]
Types = frozenset[str] | None
_KEYWORDS = ("properties", "patternProperties", "additionalProperties", "unevaluatedProperties")
_BRANCHES = ("allOf", "anyOf", "oneOf")
_SINGLE_BRANCHES = ("then", "else")


def resolved(document: Any, schema: Any) -> Any:
    """The subschema that a `$ref` from the root points at ("#", "#/..."); True, which allows all, for any other."""
    reference = schema["$ref"]
    if reference != "#" and not reference.startswith("#/"):
        return True
    found = document
    for part in reference[2:].split("/") if reference != "#" else []:
        part = unquote(part).replace("~1", "/").replace("~0", "~")
        try:
            found = found[int(part)] if isinstance(found, list) else found[part]
        except (KeyError, IndexError, ValueError, TypeError):  # relative to an inner `$id`: only the validator knows
            return True
    return found


def expanded(document: Any, schemas: Iterable[Any]) -> list[Any]:
    """`schemas` and all that may apply with them: targets of references and branches. Each once."""
    found: list[Any] = []
    seen: set[int] = set()
    waiting = list(schemas)
    while waiting:
        schema = waiting.pop()
        if id(schema) in seen and not isinstance(schema, bool):
            continue
        seen.add(id(schema))
        found.append(schema)
        if isinstance(schema, dict):
            waiting += _branches(document, schema)
    return found


def _branches(document: Any, schema: Mapping[str, Any]) -> list[Any]:
    found = [resolved(document, schema)] if "$ref" in schema else []
    found += [True] if "$dynamicRef" in schema or "$recursiveRef" in schema else []
    for keyword in _BRANCHES:
        found += schema.get(keyword, [])
    found += [schema[keyword] for keyword in _SINGLE_BRANCHES if keyword in schema]
    return found + list(schema.get("dependentSchemas", {}).values())


def below_key(applicable: Sequence[Any], key: str, matches: Callable[[str, str], bool]) -> list[Any]:
    """The subschemas for the value under `key`; none when the key is not allowed, or below such a key."""
    if applicable and _silent(applicable, _KEYWORDS):
        return [True]
    found: list[Any] = []
    for schema in applicable:
        if not isinstance(schema, dict):
            continue
        own = [schema["properties"][key]] if key in schema.get("properties", {}) else []
        own += [sub for pattern, sub in schema.get("patternProperties", {}).items() if matches(pattern, key)]
        further = [schema[k] for k in ("additionalProperties", "unevaluatedProperties") if k in schema]
        found += own or further
    said = [sub for sub in found if isinstance(sub, dict)]
    return said or [sub for sub in found if sub is True]


def below_index(applicable: Sequence[Any], position: int) -> list[Any]:
    """The subschemas for an element of an array; `[True]` when nothing is said of elements."""
    if applicable and _silent(applicable, ("items", "prefixItems", "additionalItems")):
        return [True]
    found: list[Any] = []
    for schema in applicable:
        if not isinstance(schema, dict):
            continue
        items = schema.get("items")
        first = schema.get("prefixItems", items if isinstance(items, list) else [])
        rest = schema.get("additionalItems") if isinstance(items, list) else items
        found += [first[position]] if position < len(first) else [] if rest is None else [rest]
    return found


def _silent(applicable: Sequence[Any], keywords: Sequence[str]) -> bool:
    """Whether a subschema allows all, or none of them has one of the keywords."""
    spoken = any(isinstance(schema, dict) and any(k in schema for k in keywords) for schema in applicable)
    return not spoken or any(schema is True for schema in applicable)


def required(document: Any) -> dict[Path, Types]:
    """Path of each key that every valid value has, with the types of its value (None: not said).

    A reference that leads back to a schema above is followed once; at most `MAX_REQUIRED` paths.
    """
    found: dict[Path, Types] = {}
    _require(document, [document], (), frozenset(), found)
    return found


def _require(document: Any, schemas: list[Any], path: Path, above: frozenset[int], found: dict[Path, Types]) -> None:
    certain = [schema for schema in _certain(document, schemas) if id(schema) not in above]
    above |= {id(schema) for schema in certain}
    names = {key for schema in certain for key in schema.get("required", [])} | _in_every_branch(document, certain)
    possible = expanded(document, certain)
    for key in sorted(names):
        if len(found) >= MAX_REQUIRED:
            return
        sure = [s["properties"][key] for s in certain if _has_property(s, key)]
        maybe = [s["properties"][key] for s in possible if _has_property(s, key)]
        found[(*path, key)] = _types(document, sure) if sure else _union(document, maybe)
        _require(document, sure, (*path, key), above, found)
    if any(schema.get("minItems", 0) >= 1 and "prefixItems" not in schema for schema in certain):
        items = [schema["items"] for schema in certain if isinstance(schema.get("items"), dict)]
        _require(document, items, (*path, ITEMS), above, found)


def _has_property(schema: Any, key: str) -> bool:
    return isinstance(schema, dict) and key in schema.get("properties", {})


def _certain(document: Any, schemas: Iterable[Any]) -> list[dict[str, Any]]:
    """`schemas` and those that apply whenever they do: targets of references, and `allOf`."""
    found: list[dict[str, Any]] = []
    waiting = list(schemas)
    while waiting:
        schema = waiting.pop()
        if isinstance(schema, dict) and not any(schema is other for other in found):
            found.append(schema)
            waiting += schema.get("allOf", []) + ([resolved(document, schema)] if "$ref" in schema else [])
    return found


def _in_every_branch(document: Any, certain: Sequence[Mapping[str, Any]]) -> set[str]:
    names: set[str] = set()
    for schema in certain:
        for keyword in ("anyOf", "oneOf"):
            branches = [_certain(document, [branch]) for branch in schema.get(keyword, [])]
            keys = [{key for part in branch for key in part.get("required", [])} for branch in branches]
            names |= set.intersection(*keys) if keys else set()
    return names


def _types(document: Any, schemas: Iterable[Any]) -> Types:
    """Types that subschemas which all apply name, in themselves or in all branches; None if none does."""
    for schema in _certain(document, schemas):
        own = schema.get("type")
        if own is not None:
            return frozenset([own] if isinstance(own, str) else own)
        for keyword in ("anyOf", "oneOf"):
            named = _union(document, schema.get(keyword, []))
            if named is not None:
                return named
    return None


def _union(document: Any, branches: Sequence[Any]) -> Types:
    """The types of branches taken together; None if one of them leaves its type open, or there is none."""
    named = [_types(document, [branch]) for branch in branches]
    return frozenset().union(*(n for n in named if n)) if named and None not in named else None
