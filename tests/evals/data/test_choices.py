"""Options and their letters: the gold letter points at the right option, always, and at every letter equally often."""

import itertools
import random
import re
from collections import Counter

import pytest

from evals.data import mcq_synth
from evals.data.build import Redraw
from evals.data.choices import LETTERS, OPTIONS, base_order, rotations
from evals.task import Item, Source


def asked(item: Item) -> dict[str, str]:
    """Letter to option text, read back from the prompt."""
    return dict(re.findall(r"^([A-D])\) (.*)$", item.messages[-1]["content"], re.MULTILINE))


def row(record: str) -> dict[str, str]:
    return {"Record ID": record, "Question": "Which?"} | {name: f"text of {name}" for name in OPTIONS}


def test_gold_letter_points_at_the_right_option_over_100_seeds() -> None:
    for seed in range(100):
        for record in ("recA", "recB", "recC"):
            for item in rotations(row(record), seed):
                options = asked(item)
                assert options[item.gold] == "text of Correct Answer"
                assert {k: f"text of {v}" for k, v in item.details["options"].items()} == options
                assert LETTERS[item.details["position"]] == item.gold


def test_every_rotation_of_a_question_is_another_gold_letter_and_every_option_takes_every_letter() -> None:
    items = rotations(row("recA"), 0)
    assert [item.id for item in items] == ["recA/r0", "recA/r1", "recA/r2", "recA/r3"]
    assert {item.question for item in items} == {"recA"}
    assert sorted(item.gold for item in items) == list(LETTERS)
    for letter in LETTERS:
        assert sorted(item.details["options"][letter] for item in items) == sorted(OPTIONS)


def test_base_orders_are_uniform_and_depend_on_seed_and_record_alone() -> None:
    orders = [base_order(seed, f"rec{i}") for seed in range(20) for i in range(120)]
    counts = Counter(orders)
    assert set(counts) == set(itertools.permutations(OPTIONS))
    # 2,400 draws of 24: chi-square with 23 degrees of freedom; 49.7 is its 99.9 % point.
    assert sum((n - 100) ** 2 / 100 for n in counts.values()) < 49.7
    gold = Counter(order.index("Correct Answer") for order in orders)
    assert sum((gold[i] - 600) ** 2 / 600 for i in range(4)) < 16.3  # 3 degrees of freedom
    assert base_order(3, "rec1") == base_order(3, "rec1")
    assert len({base_order(seed, "rec1") for seed in range(100)}) > 12


def test_base_order_is_the_documented_one() -> None:
    import hashlib

    number = int.from_bytes(hashlib.sha256(b"5/recX").digest(), "big") % 24
    assert base_order(5, "recX") == list(itertools.permutations(OPTIONS))[number]


def test_an_item_of_a_question_does_not_depend_on_the_other_questions() -> None:
    alone = rotations(row("recB"), 7)
    assert [i for r in ("recA", "recB") for i in rotations(row(r), 7)][4:] == alone


@pytest.mark.parametrize("family", sorted(mcq_synth.FAMILIES))
def test_two_solvers_agree_and_four_options_differ_after_rounding(family: str) -> None:
    made = 0
    for seed in range(200):
        rng = random.Random(seed)
        problem = mcq_synth.FAMILIES[family](rng)
        assert float(problem.exact) == pytest.approx(problem.other, rel=1e-9)
        try:
            columns = mcq_synth.row(problem, "rec", family, rng)
        except Redraw:
            continue
        made += 1
        numbers = [float(columns[name].split()[0]) for name in OPTIONS]
        assert len(set(numbers)) == 4
        assert numbers[0] == pytest.approx(float(problem.exact), rel=5.1e-4)
    assert made >= 150


def test_solvers_that_disagree_stop_the_build() -> None:
    from fractions import Fraction

    problem = mcq_synth.Problem("?", Fraction(2), 2.001, (1, 3, 4), "m")
    with pytest.raises(RuntimeError, match="solvers disagree"):
        mcq_synth.row(problem, "rec", "family", random.Random(0))


def test_known_values() -> None:
    from fractions import Fraction

    assert mcq_synth.shown(Fraction(100, 18), "m/s") == "5.556 m/s"
    assert mcq_synth.shown(Fraction(1234567), "J") == "1234567 J"
    assert mcq_synth.shown(Fraction(1, 2), "") == "0.5"
    assert mcq_synth.shown(0.00012345, "g") == "0.0001234 g" or mcq_synth.shown(0.00012345, "g") == "0.0001235 g"
    by_family = {row["Subdomain"]: row for row in mcq_synth.rows(8, 0)}
    speed = by_family["speed"]
    kmh = int(re.search(r"at (\d+) km/h", speed["Question"])[1])  # type: ignore[index]
    assert float(speed["Correct Answer"].split()[0]) == pytest.approx(kmh / 3.6, rel=5.1e-4)


def test_letters_of_the_suite_are_uniform() -> None:
    items = mcq_synth.load(Source(limit=50))
    assert Counter(item.gold for item in items) == dict.fromkeys(LETTERS, 50)
    for item in items:
        assert asked(item)[item.gold] == next(
            asked(other)[other.gold] for other in items if other.question == item.question
        )
