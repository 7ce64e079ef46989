"""The templates of `gsm_json_synth`: steps against formula, levels, distractors, prompt."""

import json
import random
import re

import jsonschema
import pytest

from evals.data import gsm8k
from evals.data.build import Redraw
from evals.data.gsm_json_synth import follow, load
from evals.data.gsm_templates import TEMPLATES
from evals.task import Source


def test_steps_are_followed_in_order_and_exactly() -> None:
    assert follow(("t = a * b", "r = t - 5"), {"a": 3, "b": 4}) == (7, ["3 * 4 = 12", "12 - 5 = 7"])
    assert follow(("t = a / 2", "r = t + a"), {"a": 8}) == (12, ["8 / 2 = 4", "4 + 8 = 12"])
    for steps, values in ((("r = a / 2",), {"a": 3}), (("r = a - 3",), {"a": 3}), (("r = a * a",), {"a": 400})):
        with pytest.raises(Redraw):  # a fraction, zero, and above 99,999
            follow(steps, values)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_steps_and_formula_agree(template) -> None:
    rng, made = random.Random(1), 0
    for _ in range(4000):
        values = {slot: rng.randint(*bounds) for slot, bounds in template.slots.items()}
        try:
            answer, lines = follow(template.steps, values)
        except Redraw:
            continue
        made += 1
        assert template.formula(values) == answer
        # A third opinion: Python's own evaluation of the worked lines.
        for line in lines:
            left, right = line.split(" = ")
            assert eval(left) == int(right)
    assert made >= 20


def test_twenty_four_templates_six_of_each_level() -> None:
    assert len({t.name for t in TEMPLATES}) == 24
    for level in (2, 3, 4, 5):
        assert sum(len(t.steps) == level for t in TEMPLATES) == 6


def test_every_number_of_a_story_is_used_and_every_slot_told() -> None:
    for template in TEMPLATES:
        slots = set(re.findall(r"\{(\w+)\}", template.story + template.question)) - {"who", "friend"}
        steps = {word for step in template.steps for word in step.split()}
        assert slots == set(template.slots), template.name
        assert slots <= steps, template.name


@pytest.mark.parametrize("seed", range(5))
def test_gold_reasoning_ends_in_the_answer_and_counts_the_steps(seed: int) -> None:
    for item in load(Source(limit=96, seed=seed)):
        lines = item.gold["reasoning"].split("\n")
        assert len(lines) == item.level
        assert lines[-1].endswith(f" = {item.gold['answer']}")
        jsonschema.validate(item.gold, gsm8k.SCHEMA)


def test_half_of_the_questions_carry_a_number_that_does_not_matter() -> None:
    items = load(Source(limit=192))
    numbers = [len(re.findall(r"\d+", item.messages[1]["content"])) for item in items]
    slots = {t.name: len(re.findall(r"\{[a-f]\}|\d+", t.story + t.question)) for t in TEMPLATES}
    extra = [n - slots[item.group] for n, item in zip(numbers, items, strict=True)]
    assert sorted(set(extra)) == [0, 1]
    assert sum(extra) == 96


def test_prompt_is_the_card_s() -> None:
    system, user = load(Source(limit=1))[0].messages
    assert system == {"role": "system", "content": gsm8k.SYSTEM}
    assert user["role"] == "user"
    assert json.dumps(gsm8k.SCHEMA).index("reasoning") < json.dumps(gsm8k.SCHEMA).index('"answer"')
