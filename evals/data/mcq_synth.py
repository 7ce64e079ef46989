"""`mcq_synth`: calculations with four options in GPQA's columns, made by eight families; blind guessing scores 25 %.

The right value is computed twice, in exact fractions by the formula and in floating point by another route. Wrong
options are the values of typical slips: a wrong factor, a forgotten square, one term too few.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from evals.data.build import Redraw, count, draw_all
from evals.data.choices import OPTIONS, rotations
from evals.task import Item, Source

NAME = "mcq_synth"
DIGITS = 4  # significant digits of an option; whole numbers may have more


@dataclass(frozen=True)
class Problem:
    """A question, its value by the formula and by another route, values of slips, and the unit."""

    text: str
    exact: Fraction
    other: float
    slips: tuple[Fraction | float, ...]
    unit: str


def speed(rng: random.Random) -> Problem:
    """km/h to m/s: v / 3.6."""
    v = rng.randint(11, 400)
    text = f"A train moves at {v} km/h. What is its speed in m/s?"
    slips = (Fraction(v) * 18 / 5, Fraction(v, 60), Fraction(v, 36), Fraction(v * 1000, 60))
    return Problem(text, Fraction(v * 5, 18), v * 1000 / 3600, slips, "m/s")


def area(rng: random.Random) -> Problem:
    """cm x mm to square metres: a b / 1e5."""
    a, b = rng.randint(12, 95), rng.randint(120, 980)
    text = f"A plate is {a} cm long and {b} mm wide. What is its area in square metres?"
    slips = (Fraction(a * b, 10**3), Fraction(a * b, 10**4), Fraction(a * b, 10**6), Fraction(2 * (10 * a + b), 1000))
    return Problem(text, Fraction(a * b, 10**5), (a / 100) * (b / 1000), slips, "m^2")


def half_life(rng: random.Random) -> Problem:
    """m 2^(-t/T) with t a multiple of T, and exp(-t ln 2 / T)."""
    m, period, n = rng.randint(20, 900), rng.randint(2, 60), rng.randint(2, 7)
    text = (
        f"A sample holds {m} mg of an isotope with a half-life of {period} days. "
        f"How much of the isotope is left after {n * period} days?"
    )
    left = Fraction(m, 2**n)
    slips = (m - left, Fraction(m, 2 * n), Fraction(m, 2 ** (n - 1)), m * math.exp(-n), Fraction(m, 2 ** (n + 1)))
    return Problem(text, left, m * math.exp(-(n * period) * math.log(2) / period), slips, "mg")


def stoichiometry(rng: random.Random) -> Problem:
    """Mass of water from burning hydrogen, methane or propane: m / M_fuel * ratio * 18."""
    fuel, molar, ratio = rng.choice([("hydrogen (H2)", 2, 1), ("methane (CH4)", 16, 2), ("propane (C3H8)", 44, 4)])
    m = rng.randint(3, 250)
    text = (
        f"{m} g of {fuel} burn completely in oxygen. What mass of water forms? "
        "Molar masses: H 1 g/mol, C 12 g/mol, O 16 g/mol."
    )
    slips = (
        Fraction(m * ratio * 16, molar),
        Fraction(m * 18, molar * (ratio + 1)),
        Fraction(m * ratio, molar),
        Fraction(m * molar * ratio, 18),
    )
    return Problem(text, Fraction(m * ratio * 18, molar), (m / molar) * ratio * (2 * 1 + 16), slips, "g")


def kinetic_energy(rng: random.Random) -> Problem:
    """m v^2 / 2, and the work of a constant force over the braking distance."""
    m, v = rng.randint(2, 900), rng.randint(3, 60)
    deceleration = 2.5
    work = m * deceleration * (v * v / (2 * deceleration))
    text = f"A body of mass {m} kg moves at {v} m/s. What is its kinetic energy?"
    slips = (Fraction(m * v, 2), Fraction(m * v * v), Fraction(m * m * v, 2), Fraction(m * v), Fraction(m * v * v, 4))
    return Problem(text, Fraction(m * v * v, 2), work, slips, "J")


def heat(rng: random.Random) -> Problem:
    """m c (T2 - T1) in kJ with c = 4.19 kJ/(kg K), and degree by degree."""
    m, low, step = rng.randint(2, 60), rng.randint(5, 30), rng.randint(8, 60)
    text = (
        f"How much heat warms {m} kg of water from {low} degrees Celsius to {low + step} degrees Celsius? "
        "The specific heat of water is 4.19 kJ/(kg K)."
    )
    c = Fraction(419, 100)
    slips = (m * c * (low + step), m * c * (step + 273), m * step / c, Fraction(m * step), m * c * (2 * low + step))
    return Problem(text, m * c * step, math.fsum(4.19 * m for _ in range(step)), slips, "kJ")


def arithmetic_sequence(rng: random.Random) -> Problem:
    """Sum of the first n terms, n (2 a + (n-1) d) / 2, and term by term."""
    a, d, n = rng.randint(2, 40), rng.randint(2, 15), rng.randint(8, 60)
    text = (
        f"An arithmetic sequence starts with {a} and grows by {d} from term to term. "
        f"What is the sum of its first {n} terms?"
    )

    def total(first: int, terms: int) -> Fraction:
        return Fraction(terms * (2 * first + (terms - 1) * d), 2)

    slips = (
        total(a, n - 1),
        total(a, n + 1),
        Fraction(n * (2 * a + n * d), 2),
        Fraction(a + (n - 1) * d),
        2 * total(a, n),
    )
    return Problem(text, total(a, n), float(sum(a + i * d for i in range(n))), slips, "")


def geometric_sequence(rng: random.Random) -> Problem:
    """Sum of n terms, a (q^n - 1) / (q - 1), and term by term."""
    a, q, n = rng.randint(2, 60), rng.randint(2, 5), rng.randint(4, 9)
    text = (
        f"A geometric sequence starts with {a} and each term is {q} times the one before. "
        f"What is the sum of its first {n} terms?"
    )

    def total(terms: int) -> Fraction:
        return Fraction(a * (q**terms - 1), q - 1)

    slips = (total(n - 1), total(n + 1), Fraction(a * q ** (n - 1)), Fraction(a * q**n), Fraction(n * a * (1 + q), 2))
    return Problem(text, total(n), math.fsum(a * q**i for i in range(n)), slips, "")


FAMILIES: dict[str, Callable[[random.Random], Problem]] = {
    family.__name__: family
    for family in (
        speed,
        area,
        half_life,
        stoichiometry,
        kinetic_energy,
        heat,
        arithmetic_sequence,
        geometric_sequence,
    )
}


def shown(value: Fraction | float, unit: str) -> str:
    """`value` with `DIGITS` significant digits and the unit, in plain decimal notation."""
    places = max(DIGITS - 1 - math.floor(math.log10(abs(float(value)))), 0)
    rounded = round(Fraction(value), places)
    text = f"{float(rounded):.{places}f}".rstrip("0").rstrip(".") if places else str(int(rounded))
    return f"{text} {unit}".strip()


def row(problem: Problem, record: str, family: str, rng: random.Random) -> dict[str, str]:
    """The problem in GPQA's columns. Redraw if fewer than three slips differ from the answer and from each other."""
    if not math.isclose(problem.exact, problem.other, rel_tol=1e-9):
        raise RuntimeError(f"{NAME}/{family}: the two solvers disagree on {problem.text}")
    right = shown(problem.exact, problem.unit)
    wrong = sorted({shown(slip, problem.unit) for slip in problem.slips} - {right})
    if len(wrong) < 3:
        raise Redraw
    options = [right, *rng.sample(wrong, 3)]
    columns = {"Record ID": record, "Question": problem.text, "Subdomain": family}
    return columns | dict(zip(OPTIONS, options, strict=True))


def rows(n: int, seed: int) -> list[dict[str, str]]:
    """`n` questions, family by family in turn."""
    rng = random.Random(f"{NAME}/{seed}")
    names, texts = list(FAMILIES), set[str]()

    def draw(i: int) -> dict[str, str]:
        family = names[i % len(names)]
        made = row(FAMILIES[family](rng), f"{NAME}-{seed}-{i:04d}", family, rng)
        if made["Question"] in texts:
            raise Redraw
        texts.add(made["Question"])
        return made

    return draw_all(NAME, n, draw)


def load(source: Source) -> list[Item]:
    """Four items, the rotations of its options, for each question."""
    made = rows(count(source.limit), source.seed)
    return [item for question in made for item in rotations(question, source.seed, group=question["Subdomain"])]
