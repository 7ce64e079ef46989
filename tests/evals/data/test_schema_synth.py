"""`schema_synth`: instances valid by three validators, the own check refuses what it should, levels and paths."""

import json

import jsonschema
import jsonschema_rs
import pytest

from evals.data.schema_check import conforms
from evals.data.schema_synth import FAMILIES, leaves, load
from evals.graders.schema import Schema
from evals.task import Source


@pytest.mark.parametrize("seed", range(4))
def test_instances_are_valid_by_independent_validators(seed: int) -> None:
    for item in load(Source(limit=80, seed=seed)):
        schema = json.loads(item.details["schema"])
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.Draft202012Validator(schema).validate(item.gold)
        assert jsonschema_rs.is_valid(schema, item.gold)
        assert Schema(schema).valid(item.gold)
        assert conforms(schema, item.gold)


def spoiled(value: object) -> list[object]:
    """One-change neighbours of an instance: a key less, a key more, another type, an element less or more."""
    if isinstance(value, dict):
        changed: list[object] = [{k: v for k, v in value.items() if k != key} for key in value]
        changed.append({**value, "zzz": 1})
        return changed + [{**value, key: bad} for key in value for bad in spoiled(value[key])]
    if isinstance(value, list):
        inner = [value[:i] + [bad] + value[i + 1 :] for i in range(len(value)) for bad in spoiled(value[i])]
        return [None, [], value * 4, *inner]
    return [None, [value], 3.25, "x", -(10**6), True]


@pytest.mark.parametrize("seed", range(2))
def test_own_check_agrees_with_jsonschema_on_spoiled_instances(seed: int) -> None:
    verdicts = {True: 0, False: 0}
    for item in load(Source(limit=48, seed=seed)):
        schema = json.loads(item.details["schema"])
        validator = jsonschema_rs.validator_for(schema)
        for value in spoiled(item.gold):
            expected = validator.is_valid(value)
            assert conforms(schema, value) == expected, (schema, value)
            verdicts[expected] += 1
    assert verdicts[False] > 1000
    assert verdicts[True] > 50


def test_levels_add_what_they_say() -> None:
    words = {1: (), 2: ("object", "array"), 3: ("array", "oneOf"), 4: ("$ref",)}
    for item in load(Source(limit=64)):
        assert item.level == FAMILIES[item.group][0]
        inner = item.details["schema"][1:]
        assert not words[item.level] or any(word in inner for word in words[item.level])
        assert ("$ref" in inner) == (item.level == 4)
    assert {level for level, _ in FAMILIES.values()} == {1, 2, 3, 4}
    assert {i.level for i in load(Source(limit=4))} == {1, 2, 3, 4}


def test_leaves_name_every_value() -> None:
    value = {"a": {"b": [1, {"c": "x"}]}, "d": True, "e": []}
    assert list(leaves(value)) == ["a.b[0] = 1", 'a.b[1].c = "x"', "d = true", "e = []"]


def test_prompt_states_the_schema_and_the_values() -> None:
    for item in load(Source(limit=8)):
        system, user = (m["content"] for m in item.messages)
        assert "nothing else" in system
        schema = user.split("\n")[1]
        assert schema == item.details["schema"]
        assert all(line in user for line in leaves(item.gold))
