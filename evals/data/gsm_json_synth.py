"""`gsm_json_synth`: word problems of two to five steps from 24 templates, answered as a JSON object.

A template states its answer twice: as a list of steps, evaluated one by one in exact fractions, and as one formula.
Every other question carries a sentence with a number that does not matter.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Mapping
from fractions import Fraction

from evals.data.build import Redraw, agree, count, draw_all
from evals.data.gsm8k import json_item
from evals.data.gsm_templates import TEMPLATES, Template, Values
from evals.task import Item, Source

NAME = "gsm_json_synth"
NAMES = ("Ada", "Bruno", "Chen", "Dalia", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jonas", "Kofi", "Lena", "Mina")
DISTRACTORS = (
    "{who} is {x} years old.",
    "It is {x} minutes' walk from {who}'s home.",
    "{who} has done this for {x} weeks.",
    "There are {x} chairs in the room.",
    "{who} once saw {x} geese on the way.",
)
OPERATIONS: Mapping[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


def follow(steps: tuple[str, ...], values: Values) -> tuple[int, list[str]]:
    """(answer, worked lines such as `4 * 6 = 24`) of the steps in order; Redraw unless every result is in 1..99999."""
    known = {name: Fraction(value) for name, value in values.items()}
    lines = []
    for step in steps:
        target, _, left, sign, right = step.split()
        first, second = (known[word] if word in known else Fraction(word) for word in (left, right))
        known[target] = OPERATIONS[sign](first, second)
        if known[target].denominator != 1 or not 1 <= known[target] <= 99_999:
            raise Redraw
        lines.append(f"{first} {sign} {second} = {known[target]}")
    return int(known[target]), lines


def _question(template: Template, values: Values, rng: random.Random, distract: bool) -> str:
    who, friend = rng.sample(NAMES, 2)
    extra = rng.choice(DISTRACTORS).format(who=who, x=rng.randint(3, 60)) if distract else ""
    story = template.story.format(who=who, friend=friend, **values)
    return " ".join(part for part in (story, extra, template.question.format(who=who)) if part)


def load(source: Source) -> list[Item]:
    """Questions template by template in turn; `level` is the number of steps, `group` the template."""
    rng = random.Random(f"{NAME}/{source.seed}")
    texts: set[str] = set()

    def draw(i: int) -> Item:
        template = TEMPLATES[i % len(TEMPLATES)]
        values = {slot: rng.randint(*bounds) for slot, bounds in template.slots.items()}
        answer, lines = follow(template.steps, values)
        agree(f"{NAME}/{template.name} with {values}", Fraction(answer), template.formula(values))
        # The turn, not a coin, decides: half of every template's questions carry a distractor.
        text = _question(template, values, rng, distract=(i // len(TEMPLATES) + i) % 2 == 0)
        if text in texts:
            raise Redraw
        texts.add(text)
        name = f"{NAME}-{source.seed}-{i:04d}"
        return json_item(name, text, {"reasoning": "\n".join(lines), "answer": answer}, template.name, len(lines))

    return draw_all(NAME, count(source.limit), draw)
