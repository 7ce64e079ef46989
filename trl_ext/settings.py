"""Text to typed settings: YAML without repeated keys, command-line overrides, and values cast by dataclass fields.

TRL's parser leaves YAML values as they are (only text is converted) and does not enforce choices. Here every value is
cast to the type of its field, and what does not fit is reported with the field's name.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from trl_ext.plan import cast_value, did_you_mean

_YES_NO = {"yes": True, "y": True, "1": True, "on": True, "no": False, "n": False, "0": False, "off": False}


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe subset; a key that occurs twice in one mapping is refused, since one of the two would be lost."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    for i, key in enumerate(keys):
        if key in keys[:i]:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' occurs twice", node.start_mark)
    loader.flatten_mapping(node)
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(text: str) -> Any:
    """The value of a YAML document; `yaml.YAMLError` for text that is not YAML or repeats a key."""
    return yaml.load(text, Loader=_UniqueKeys)


def read_overrides(words: Sequence[str]) -> list[tuple[list[str], Any]]:
    """`--key value`, `--key=value`, `--a.b value`, `--flag`, `--list x y` -> [(["a", "b"], value), ...], in order.

    Several values make a list, none makes True. A value of a dotted key is read as YAML, others stay text for
    the type of their field to decide. ValueError for a word that belongs to no key.
    """
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            found.append((key, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise ValueError(
                f"'{word}' belongs to no key; overrides look like --key value or --methods.NAME.key value"
            )
    overrides: list[tuple[list[str], Any]] = []
    for key, values in found:
        path = key.split(".")
        path[0] = path[0].replace("-", "_")
        read = [_nested_value(v) for v in values] if len(path) > 1 else values
        overrides.append((path, True if not read else read[0] if len(read) == 1 else list(read)))
    return overrides


def _nested_value(text: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        return text


def put(target: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Sets `target[path[0]][path[1]]... = value`, making mappings on the way; ValueError where a value is in the way."""
    for i, key in enumerate(path[:-1]):
        inner = target.get(key)
        if inner is not None and not isinstance(inner, Mapping):
            raise ValueError(f"{'.'.join(path)}: {'.'.join(path[: i + 1])} is {inner!r}, not a mapping")
        target[key] = dict(inner or {})
        target = target[key]
    target[path[-1]] = value


def fields_of(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields that a user may set."""
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def hints_of(cls: type) -> dict[str, Any]:
    """Field name -> type."""
    return typing.get_type_hints(cls)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default value; None when it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def cast_field(value: Any, hint: Any, choices: Sequence[Any] | None = None) -> Any:
    """`value` as the type `hint`, one of `choices` if there are any. ValueError says what was expected."""
    options = _options(hint)
    members = [o for o in options if isinstance(o, type) and issubclass(o, enum.Enum)]
    if members and value is False and "no" in {m.value for m in members[0]}:
        value = "no"  # a bare `no` is false in YAML
    value = _as_mapping(value, options)
    value = _as_bool(value, options)
    if listed := [o for o in options if typing.get_origin(o) is list]:
        value = _as_list(value, listed[0], options)
    elif not _fits(value, options):
        value = cast_value(value, _plain(hint))
    allowed = choices or [m.value for kind in members for m in kind]
    if allowed and value is not None and _text(value) not in set(map(_text, allowed)):
        near = did_you_mean(_text(value), map(_text, allowed))
        raise ValueError(f"{value!r} is not one of {', '.join(map(_text, allowed))}{near}")
    return value


def _text(value: Any) -> str:
    return str(value.value if isinstance(value, enum.Enum) else value)


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, each Literal spread out as the types of its values."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(o for part in typing.get_args(hint) for o in _options(part))
    if typing.get_origin(hint) is typing.Literal:
        return tuple({type(v) for v in typing.get_args(hint)})
    return (hint,)


def _plain(hint: Any) -> Any:
    """The same union with enums as text, for `cast_value`."""
    union: Any = None
    for option in _options(hint):
        known = option in (bool, int, float, str, type(None)) or typing.get_origin(option) or option in (dict, list)
        part = option if known else str
        union = part if union is None else union | part
    return union


def _fits(value: Any, options: tuple[Any, ...]) -> bool:
    """Whether TRL takes the value as it is: YAML gives booleans for some settings that are declared as text."""
    return isinstance(value, bool) and (str in options or bool in options)


def _as_mapping(value: Any, options: tuple[Any, ...]) -> Any:
    mapped = any((typing.get_origin(o) or o) is dict for o in options)
    if mapped and isinstance(value, str) and value.strip().startswith("{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON ({error})") from None
    return value


def _as_bool(value: Any, options: tuple[Any, ...]) -> Any:
    readable = bool in options and str not in options and isinstance(value, (str, int))
    return _YES_NO.get(str(value).lower(), value) if readable else value


def _as_list(value: Any, hint: Any, options: tuple[Any, ...]) -> Any:
    """A list of cast items; a single item becomes a list of one, unless plain text is allowed as well."""
    if value is None or (value in ("none", "null", "None") and type(None) in options):
        if type(None) not in options:
            raise ValueError("expected a list, got nothing")
        return value if str in options else None
    if isinstance(value, str) and str in options:
        return value
    if isinstance(value, str) and value.strip().startswith("["):
        value = _nested_value(value)
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    kind = typing.get_args(hint)[0]
    return [cast_value(v, kind) if kind in (int, float, str, bool) else v for v in items]
