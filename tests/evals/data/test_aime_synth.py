"""The families of `aime_synth`: known values, two solvers, answers in range that do not cluster."""

import random
from collections import Counter

import pytest

from evals.data.aime_synth import FAMILIES, load
from evals.data.build import Redraw
from evals.task import Source


class Fixed(random.Random):
    """Returns the given numbers, one after the other."""

    def __init__(self, *values: object) -> None:
        super().__init__(0)
        self.values = list(values)

    def _next(self, *_: object) -> object:
        return self.values.pop(0)

    randint = choice = sample = randrange = _next  # type: ignore[assignment]


# Worked out by hand.
KNOWN = [
    ("modular_power", (2, 10, 1000), 24),  # 1024
    ("spaced_subsets", (5, 2, 2), 6),  # 13 14 15 24 25 35
    ("divisors", (2, 1, 0, 0, 1, 0), 4),  # of 12, even: 2 4 6 12
    ("inclusion_exclusion", (12, [2, 3, 5]), 7),  # 2 3 4 6 8 9 12
    ("lattice_paths", (2, 2, 1, 1), 2),  # 6 paths, 2 * 2 through the centre
    ("remainders", ([3, 4, 5], 2, 3, 1), 11),
    ("dice", (2, 6, 7), 7),  # 1/6
    ("digit_sum", (3, 3), 10),
    ("factorial_exponent", (5, 10, 25), 6),  # 35!/10!: 15 20 25 25 30 35 - eight fives less two
    ("recurrence", (1, 1, 1000, 10, 0, 1), 55),  # Fibonacci
    ("bounded_sums", (5, 2), 5),  # x=1: y+z=4, 3 ways; x=2: 2 ways
    ("triangle_points", (2, 2), 6),
]


@pytest.mark.parametrize(("family", "values", "answer"), KNOWN)
def test_known_values(family: str, values: tuple, answer: int) -> None:
    problem = FAMILIES[family](Fixed(*values))
    assert problem.formula == answer
    assert problem.counted == answer


def test_every_family_has_a_known_value() -> None:
    assert {family for family, _, _ in KNOWN} == set(FAMILIES)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_two_solvers_agree(family: str) -> None:
    made = 0
    for seed in range(150):
        try:
            problem = FAMILIES[family](random.Random(seed))
        except Redraw:
            continue
        assert problem.formula == problem.counted, problem.text
        made += 1
    assert made >= 30


@pytest.mark.parametrize("seed", range(5))
def test_answers_are_in_range_and_do_not_cluster(seed: int) -> None:
    items = load(Source(limit=200, seed=seed))
    assert all(item.gold == str(int(item.gold)) and 0 <= int(item.gold) <= 999 for item in items)
    assert max(Counter(item.gold for item in items[:100]).values()) == 1
    assert max(Counter(item.gold for item in items).values()) <= 2


def test_prompt_asks_for_a_box() -> None:
    (message,) = load(Source(limit=1))[0].messages
    assert message["role"] == "user"
    assert message["content"].endswith("\\boxed{answer}.")
