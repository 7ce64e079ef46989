"""Strict JSON, its tolerant form, repair, compiled schemas and their key paths."""

from __future__ import annotations

import json

import jsonschema
import pytest

from evals.graders.repair import repaired
from evals.graders.schema import ITEMS, Schema, compiled
from evals.graders.strict_json import load, load_tolerant, unfence

FENCED = '```json\n{"a": 1}\n```'


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        (' \t\r\n{"a": 1}\n', {"a": 1}),
        ("[]", []),
        ("4", 4),
        ("null", None),
        ('"\\ud83d\\ude00"', "😀"),
        ('"\\\\ud83d"', "\\ud83d"),
        ("-0.5e-3", -0.0005),
        ('"[[[["', "[[[["),
        ("[" * 200 + "]" * 200, json.loads("[" * 200 + "]" * 200)),
        ("1" + "0" * 999, 10**999),
        ('{"a": {"b": 1}, "b": 1}', {"a": {"b": 1}, "b": 1}),
    ],
)
def test_json(text: str, value: object) -> None:
    parsed = load(text)
    assert parsed.ok
    assert parsed.value == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ('{"a": 1,}', "property name"),
        ("[1,]", ""),
        ("{'a': 1}", ""),
        ("{a: 1}", ""),
        ('{"a": 1', ""),
        ('{"a": 1} x', "Extra data"),
        ('{"a": 1}{"a": 1}', "Extra data"),
        ("NaN", "NaN is not JSON"),
        ('{"a": Infinity}', "Infinity is not JSON"),
        ("-Infinity", "-Infinity is not JSON"),
        ("1e999", "too large"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ('{"a": 1, "\\u0061": 2}', "the key 'a' occurs twice"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' occurs twice"),
        ('"\\ud800"', "unpaired surrogate"),
        ('"\\udc00\\ud800"', "unpaired surrogate"),
        ('{"\\ud800": 1}', "unpaired surrogate"),
        ('"\ud800"', "unpaired surrogate"),
        ('\u00a0{"a": 1}', ""),
        ('\ufeff{"a": 1}', ""),
        ('{"a":\u20091}', ""),
        ('\f{"a": 1}', ""),
        ('"\n"', "control character"),
        ("01", ""),
        ("+1", ""),
        ("1.", ""),
        ("１", ""),
        ("True", ""),
        ("[" * 201 + "]" * 201, "nested deeper than 200"),
        ("[" * 100_000, "nested deeper than 200"),
        ('{"a":' * 100_000, "nested deeper than 200"),
        ("9" * 5000, "integer of more than 1,000 digits"),
        ('"' + "x" * 1_000_000 + '"', "longer than 1,000,000 characters"),
        (FENCED, ""),
    ],
)
def test_not_json(text: str, problem: str) -> None:
    parsed = load(text)
    assert not parsed.ok
    assert parsed.problem
    assert problem in parsed.problem


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        (FENCED, True),
        ('```\n{"a": 1}\n```\n', True),
        ('```JSON\r\n{"a": 1}```', True),
        ('```json {"a": 1} ```', True),
        ('```{"a": 1}```', True),
        ('<think>hm</think>\n{"a": 1}', True),
        ("<think>{}</think>" + FENCED, True),
        ('{"a": "</think> x"}', True),
        ('{"a": "<think>"}', True),
        ('<think>{"a": 1}', False),
        ('Here: ```json\n{"a": 1}\n```', False),
        ("```json\n" + FENCED + "\n```", False),
        (FENCED + FENCED, False),
        ('```json\n{"a": 1}', False),
        ("``````", False),
        ("```", False),
        ('`{"a": 1}`', False),
    ],
)
def test_the_tolerant_form(text: str, ok: bool) -> None:
    assert load_tolerant(text).ok is ok


def test_unfence_leaves_other_text() -> None:
    assert unfence(" x ```y``` ") == "x ```y```"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"answer": 18', {"answer": 18}),
        ('{"answer": 18,}', {"answer": 18}),
        ('{"reasoning": "so it', {"reasoning": "so it"}),
        ('{"reasoning": "a\nb", "answer": 3}', {"reasoning": "a\nb", "answer": 3}),
        ("{'answer': 'x'}", {"answer": "x"}),
        ("{answer: 18}", {"answer": 18}),
        ('{"answer": 1,080}', {"answer": 1080}),
        ('{"answer": 1,080, "b": 2}', {"answer": 1080, "b": 2}),
        ("[1,080, 2]", None),  # three numbers, or two? and 080 is none
        ('{"answer": $18}', {"answer": "$18"}),
        ('{"answer": 18 dollars}', {"answer": 18}),
        ('{"ok": True, "no": None}', {"ok": True, "no": None}),
        ('Sure! {"a": [1, 2]} Done.', {"a": [1, 2]}),
        ('{"a": [1, 2', {"a": [1, 2]}),
        ('{"a": {"b": [1, {"c": "d', {"a": {"b": [1, {"c": "d"}]}}),
        ('{"a": "x\\', {"a": "x"}),
        ("no brackets", None),
        ("", None),
        ("{", {}),
    ],
)
def test_repair(text: str, value: object) -> None:
    assert repaired(text) == value


def test_repair_reads_what_is_json_as_json() -> None:
    value = {"a": [1, -2.5e3, "x, {y}", None, True], "b": {"c": "it's", "d": []}, "é": '"q"'}
    assert repaired(json.dumps(value)) == repaired(json.dumps(value, indent=1, ensure_ascii=False)) == value


@pytest.mark.parametrize(
    "text",
    [
        "{" * 500_000,
        "{'" * 300_000,
        '{"' + "\\" * 500_000,
        "[1,234" * 100_000,
        "{" + "'a " * 300_000,
        "[" + "1,111" * 150_000,
    ],
)
def test_repair_ends(text: str) -> None:
    assert not isinstance(repaired(text), str), "a value or None, in time; the text itself is no JSON"


# Schemas

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "home": {"$ref": "#/$defs/place"},
        "past": {"type": "array", "items": {"$ref": "#/$defs/place"}, "minItems": 1},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/place"}},
        "notes": {"type": "object", "additionalProperties": {"type": "string"}},
        "free": {},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["name", "home", "past", "tags"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "zip": {"type": ["string", "integer"]}},
            "required": ["city"],
        }
    },
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "number"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["v", "next"],
            "additionalProperties": False,
        }
    },
}
SHAPE = {
    "oneOf": [
        {"properties": {"kind": {"const": "circle"}, "r": {"type": "number"}}, "required": ["kind", "r"]},
        {"properties": {"kind": {"const": "box"}, "w": {"type": "number"}}, "required": ["kind", "w"]},
    ]
}


def test_required_paths() -> None:
    assert Schema(PERSON).required == {
        ("name",): {"string"},
        ("home",): {"object"},
        ("home", "city"): {"string"},
        ("past",): {"array"},
        ("past", ITEMS, "city"): {"string"},
        ("tags",): {"array"},  # its elements need a city, but there may be none
    }
    assert Schema(TREE).required == {("v",): {"number"}, ("next",): {"object", "null"}}
    assert Schema(SHAPE).required == {("kind",): None}
    assert Schema({"allOf": [{"required": ["a"]}, {"required": ["b"]}]}).required == {("a",): None, ("b",): None}
    assert Schema(True).required == {}
    assert Schema(PERSON).required_keys == {"name", "home", "city", "past", "tags"}


def test_a_schema_that_requires_itself_without_end() -> None:
    loop = {"properties": {"a": {"$ref": "#"}, "b": {"$ref": "#"}}, "required": ["a", "b"]}
    assert set(Schema(loop).required) == {("a",), ("b",)}
    doubling = {
        f"n{i}": {"properties": {k: {"$ref": f"#/$defs/n{i + 1}"} for k in "ab"}, "required": ["a", "b"]}
        for i in range(40)
    }
    assert len(Schema({"$ref": "#/$defs/n0", "$defs": doubling | {"n40": {}}}).required) == 1000


@pytest.mark.parametrize(
    ("schema", "value", "counts"),
    [
        (PERSON, {"name": "x", "home": {"city": "y", "street": "z"}, "age": 1}, (1, 5)),
        (PERSON, {"past": [{"city": "x"}, {"town": "x", "zip": 1}]}, (1, 4)),
        (PERSON, {"extra": {"name": "x", "deep": {"city": 1}}}, (4, 4)),  # below an invented key all are
        (PERSON, {"notes": {"any": "x"}, "free": {"a": {"b": 1}}}, (0, 5)),
        (PERSON, {"tags": [[{"city": "x"}]]}, (0, 2)),  # wrong type, but the schema is silent about elements there
        (PERSON, [], (0, 0)),
        (PERSON, 4, (0, 0)),
        (TREE, {"v": 1, "next": {"v": 2, "next": {"w": 1, "next": None}}}, (1, 6)),
        (SHAPE, {"kind": "box", "r": 1, "w": 2, "h": 3}, (1, 4)),
        (True, {"a": {"b": 1}}, (0, 2)),
        ({"type": "object"}, {"a": 1}, (0, 1)),
        ({"properties": {"a": {}}}, {"b": 1}, (1, 1)),
        ({"properties": {"a": {}}, "additionalProperties": True}, {"b": 1}, (0, 1)),
        ({"patternProperties": {"^x": {"properties": {"y": {}}}}}, {"x1": {"y": 1, "z": 1}, "a": 1}, (2, 4)),
        ({"patternProperties": {"^(a+)+$": {}}}, {"a" * 5000 + "b": 1}, (1, 1)),
        (
            {"prefixItems": [{"properties": {"a": {}}}], "items": {"properties": {"b": {}}}},
            [{"b": 1}, {"b": 1}],
            (1, 2),
        ),
        (
            {"items": [{"properties": {"a": {}}}], "$schema": "http://json-schema.org/draft-07/schema#"},
            [{"b": 1}],
            (1, 1),
        ),
        (
            {"if": {"required": ["a"]}, "then": {"properties": {"a": {}}}, "properties": {"c": {}}},
            {"a": 1, "c": 1},
            (0, 2),
        ),
        ({"properties": {"a": False}}, {"a": {"b": 1}}, (2, 2)),
        ({"properties": {"$ref": {"type": "string"}}}, {"$ref": "x"}, (0, 1)),
        ({"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"properties": {"x": {}}}}}, {"x": 1, "y": 1}, (1, 2)),
    ],
)
def test_invented_keys(schema: dict | bool, value: object, counts: tuple[int, int]) -> None:
    assert Schema(schema).key_counts(value) == counts


@pytest.mark.parametrize(
    "document",
    [
        {"type": "nope"},
        {"pattern": "("},
        {"$ref": "http://example.org/schema.json"},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "other.json"},
        {"$ref": "#/$defs/missing"},
        {"properties": {"a": {"$ref": "https://example.org/schema.json"}}},
        5,
    ],
)
def test_a_bad_schema_is_an_error_for_people(document: object) -> None:
    with pytest.raises(ValueError, match="not a usable JSON Schema: ") as caught:
        Schema(document)  # type: ignore[arg-type]
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)


def test_validity_is_that_of_jsonschema() -> None:
    good = {"name": "x", "home": {"city": "y"}, "past": [{"city": "z", "zip": 5}], "tags": []}
    values = [good, good | {"age": 1.0}, good | {"age": "1"}, good | {"extra": 1}, good | {"born": "2024-02-30"}]
    values += [
        good | {"born": "2024-02-29"},
        good | {"past": []},
        good | {"home": {}},
        [],
        None,
        4,
        good | {"name": True},
    ]
    reference = jsonschema.Draft202012Validator(PERSON, format_checker=jsonschema.FormatChecker())
    schema = Schema(PERSON)
    assert [schema.valid(v) for v in values] == [reference.is_valid(v) for v in values]
    assert [schema.valid(v) for v in values[:6]] == [True, True, False, False, False, True]
    assert Schema({"multipleOf": 0.01}).valid(19.99)


def test_hostile_patterns_end() -> None:
    assert not Schema({"pattern": "^(a+)+$"}).valid("a" * 50_000 + "b")
    assert not Schema({"pattern": "^(?=(a|aa)+$)(a|aa)+$"}).valid("a" * 50_000 + "b")


def test_equal_documents_are_compiled_once() -> None:
    assert compiled({"type": "object", "minProperties": 1}) is compiled({"minProperties": 1, "type": "object"})
