"""`schema_synth`: random JSON schemas from a grammar, each with the object that the prompt asks for.

Level 1 is flat, 2 has nested objects or arrays, 3 records or alternatives (`oneOf`), 4 recursion. Schema and instance
grow together; `conforms`, which knows nothing of how they grew, checks the instance when a question is made.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from evals.data.build import Redraw, canonical, conversation, count, draw_all
from evals.data.schema_check import Schema, conforms
from evals.task import Item, Source

NAME = "schema_synth"
Grown = tuple[Schema, Callable[[], Any]]  # a schema, and a function that draws an instance of it
Maker = Callable[[random.Random], Grown]
SYSTEM = "You write JSON. Reply with one JSON value that is valid under the given JSON Schema, and nothing else."
# fmt: off
KEYS = (
    "name", "code", "title", "status", "owner", "city", "street", "unit", "colour", "label", "notes", "kind",
    "height", "width", "weight", "price", "amount", "rank", "level", "year", "month", "active", "visible", "score",
    "phase", "region", "batch", "source", "target", "channel", "origin", "limit", "version",
)
WORDS = (
    "amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "hazel", "ivory", "jade", "kelp", "lunar",
    "maple", "north", "ocean", "pearl", "quartz",
)
# fmt: on


def text(rng: random.Random) -> Grown:
    """A word with bounds on its length."""
    schema = {"type": "string", "minLength": rng.randint(1, 4), "maxLength": rng.randint(6, 12)}
    return schema, lambda: rng.choice(WORDS)


def integer(rng: random.Random) -> Grown:
    """An integer within bounds."""
    low = rng.randint(-20, 50)
    high = low + rng.randint(5, 200)
    return {"type": "integer", "minimum": low, "maximum": high}, lambda: rng.randint(low, high)


def number(rng: random.Random) -> Grown:
    """A number with one decimal above a bound."""
    low = rng.randint(0, 20)
    return {"type": "number", "exclusiveMinimum": low}, lambda: (10 * low + rng.randint(1, 99)) / 10


def boolean(rng: random.Random) -> Grown:
    """true or false."""
    return {"type": "boolean"}, lambda: rng.random() < 0.5


def enum(rng: random.Random) -> Grown:
    """One word of a few."""
    words = rng.sample(WORDS, rng.randint(2, 5))
    return {"enum": words}, lambda: rng.choice(words)


def pattern(rng: random.Random) -> Grown:
    """Capitals, a hyphen, digits: the pattern is anchored at both ends."""
    letters, digits = rng.randint(1, 3), rng.randint(2, 4)

    def draw() -> str:
        return "".join(rng.choices("ABCDEFGH", k=letters)) + "-" + "".join(rng.choices("0123456789", k=digits))

    return {"type": "string", "pattern": f"^[A-Z]{{{letters}}}-[0-9]{{{digits}}}$"}, draw


SCALARS: tuple[Maker, ...] = (text, integer, number, boolean, enum, pattern)


def scalar(rng: random.Random) -> Grown:
    """Any of the scalars."""
    return rng.choice(SCALARS)(rng)


def obj(members: Mapping[str, Grown]) -> Grown:
    """A closed object, all of whose keys are required."""
    schema = {
        "type": "object",
        "properties": {key: member for key, (member, _) in members.items()},
        "required": list(members),
        "additionalProperties": False,
    }
    return schema, lambda: {key: draw() for key, (_, draw) in members.items()}


def record(rng: random.Random, makers: Sequence[Maker]) -> Grown:
    """A closed object with one key for each maker."""
    keys = rng.sample(KEYS, len(makers))
    return obj({key: make(rng) for key, make in zip(keys, makers, strict=True)})


def flat(rng: random.Random) -> Grown:
    """Two to four scalars."""
    return record(rng, [scalar] * rng.randint(2, 4))


def choices(rng: random.Random) -> Grown:
    """An enum and a pattern among scalars."""
    return record(rng, [enum, pattern, *[scalar] * rng.randint(0, 2)])


def nested(rng: random.Random) -> Grown:
    """An object in an object, beside scalars."""
    return record(rng, [scalar, flat, *[scalar] * rng.randint(0, 2)])


def array(rng: random.Random, make: Maker = scalar) -> Grown:
    """Elements of one schema, with bounds on their number."""
    schema, draw = make(rng)
    low = rng.randint(1, 2)
    high = low + rng.randint(0, 2)
    limits = {"type": "array", "items": schema, "minItems": low, "maxItems": high}
    return limits, lambda: [draw() for _ in range(rng.randint(low, high))]


def arrays(rng: random.Random) -> Grown:
    """Arrays of scalars, beside a scalar."""
    return record(rng, [array, scalar, *[array] * rng.randint(0, 1)])


def records(rng: random.Random) -> Grown:
    """An array of objects that hold an array, beside a nested object."""
    return record(rng, [lambda r: array(r, arrays), flat, scalar])


def one_of(rng: random.Random) -> Grown:
    """One of two or three closed objects, told apart by the constant of their key `type`."""
    variants = [_variant(rng, tag) for tag in rng.sample(WORDS, rng.randint(2, 3))]
    return {"oneOf": [schema for schema, _ in variants]}, lambda: rng.choice(variants)[1]()


def _variant(rng: random.Random, tag: str) -> Grown:
    constant: Grown = ({"const": tag}, lambda: tag)
    keys = rng.sample(KEYS, rng.randint(1, 3))
    return obj({"type": constant, **{key: scalar(rng) for key in keys}})


def alternatives(rng: random.Random) -> Grown:
    """A `oneOf` beside scalars."""
    return record(rng, [one_of, scalar, *[scalar] * rng.randint(0, 2)])


def tree(rng: random.Random) -> Grown:
    """Nodes with a scalar and up to two children of the same kind, one or two levels below the root."""
    key, (value_schema, draw) = rng.choice(KEYS), scalar(rng)
    link = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}
    schema, _ = obj({key: (value_schema, draw), "children": (link, list)})

    def node(depth: int) -> dict[str, Any]:
        width = rng.randint(1, 2) if depth else 0
        return {key: draw(), "children": [node(depth - 1) for _ in range(width)]}

    return {"$defs": {"node": schema}, "$ref": "#/$defs/node"}, lambda: node(rng.randint(1, 2))


def forest(rng: random.Random) -> Grown:
    """A tree and a `oneOf` in one object; the tree's definition stands at the root, where its reference points."""
    schema, draw = record(rng, [tree, one_of, scalar])
    trunk = next(member for member in schema["properties"].values() if "$defs" in member)
    return {"$defs": trunk.pop("$defs"), **schema}, draw


FAMILIES: dict[str, tuple[int, Maker]] = {
    "flat": (1, flat),
    "nested": (2, nested),
    "records": (3, records),
    "recursion": (4, tree),
    "choices": (1, choices),
    "arrays": (2, arrays),
    "alternatives": (3, alternatives),
    "forest": (4, forest),
}


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """Lines such as `items[0].name = "x"`, one for each scalar and each empty array."""
    if isinstance(value, dict):
        for key, member in value.items():
            yield from leaves(member, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for i, element in enumerate(value):
            yield from leaves(element, f"{path}[{i}]")
    else:
        yield f"{path} = {json.dumps(value)}"


def prompt(schema: Schema, instance: Any) -> str:
    """The schema on one line, and the values to be used."""
    values = "\n".join(leaves(instance))
    return f"JSON Schema:\n{json.dumps(schema)}\n\nUse exactly these values:\n{values}"


def load(source: Source) -> list[Item]:
    """Questions family by family in turn, with levels 1, 2, 3, 4 from question to question."""
    rng = random.Random(f"{NAME}/{source.seed}")
    names, seen = list(FAMILIES), set[str]()

    def draw(i: int) -> Item:
        family = names[i % len(names)]
        level, make = FAMILIES[family]
        schema, draw_instance = make(rng)
        instance = draw_instance()
        if not conforms(schema, instance):
            raise RuntimeError(f"{NAME}/{family}: {instance} does not conform to {schema}")
        if canonical(schema) in seen:
            raise Redraw
        seen.add(canonical(schema))
        name = f"{NAME}-{source.seed}-{i:04d}"
        messages = conversation(prompt(schema, instance), SYSTEM)
        return Item(name, name, messages, instance, family, level, {"schema": json.dumps(schema)})

    return draw_all(NAME, count(source.limit), draw)
