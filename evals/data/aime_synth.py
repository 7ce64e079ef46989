"""`aime_synth`: competition-style questions with an integer answer from 0 to 999, made by twelve families.

Every family gives its answer twice, by a formula and by counting, and the two are compared when a question is made.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import product
from math import comb, gcd, lcm

from evals.data.build import Redraw, agree, conversation, count, draw_all
from evals.task import Item, Source

NAME = "aime_synth"
LARGEST = 999
INSTRUCTION = "Reason step by step, then give the final answer, an integer from 0 to 999, in the form \\boxed{answer}."


@dataclass(frozen=True)
class Problem:
    """A question, and its answer by a formula and by counting."""

    text: str
    formula: int
    counted: int


def modular_power(rng: random.Random) -> Problem:
    """a^b mod m by repeated squaring, and by b multiplications."""
    a, b, m = rng.randint(3, 99), rng.randint(50, 900), rng.randint(101, 1000)
    value = 1
    for _ in range(b):
        value = value * a % m
    return Problem(f"Find the remainder when ${a}^{{{b}}}$ is divided by ${m}$.", pow(a, b, m), value)


def spaced_subsets(rng: random.Random) -> Problem:
    """k of n in a row, any two at least d apart: C(n-(k-1)(d-1), k), and by a recursion on the last one."""
    n, k, d = rng.randint(8, 30), rng.randint(2, 6), rng.randint(2, 4)

    @cache
    def ways(length: int, left: int) -> int:
        if left == 0:
            return 1
        return 0 if length <= 0 else ways(length - 1, left) + ways(length - d, left - 1)

    text = (
        f"How many subsets of $\\{{1, 2, \\dots, {n}\\}}$ have exactly ${k}$ elements, "
        f"any two of which differ by at least ${d}$?"
    )
    return Problem(text, comb(max(n - (k - 1) * (d - 1), 0), k), ways(n, k))


def divisors(rng: random.Random) -> Problem:
    """Divisors of 2^a 3^b 5^c 7^e that are multiples of m = 2^i 3^j, by exponents, and by trial division of n/m."""
    a, b, c, e = rng.randint(2, 9), rng.randint(1, 6), rng.randint(0, 3), rng.randint(0, 2)
    i, j = rng.randint(0, a - 1), rng.randint(0, b)
    n, m = 2**a * 3**b * 5**c * 7**e, 2**i * 3**j
    rest, counted, d = n // m, 0, 1
    while d * d <= rest:
        counted += (rest % d == 0) * (1 if d * d == rest else 2)
        d += 1
    text = f"How many positive divisors of ${n}$ are multiples of ${m}$?"
    return Problem(text, (a - i + 1) * (b - j + 1) * (c + 1) * (e + 1), counted)


def inclusion_exclusion(rng: random.Random) -> Problem:
    """Multiples of a or b but not of c up to n, by least common multiples, and one by one."""
    n = rng.randint(300, 2500)
    a, b, c = rng.sample(range(2, 16), 3)

    def multiples(*numbers: int) -> int:
        return n // lcm(*numbers)

    formula = multiples(a) + multiples(b) - multiples(a, b) - multiples(a, c) - multiples(b, c) + multiples(a, b, c)
    counted = sum((x % a == 0 or x % b == 0) and x % c != 0 for x in range(1, n + 1))
    text = f"How many positive integers up to ${n}$ are divisible by ${a}$ or by ${b}$, but not by ${c}$?"
    return Problem(text, formula, counted)


def lattice_paths(rng: random.Random) -> Problem:
    """Paths to (w, h) that avoid a point, C(w+h, w) - C(x+y, x) C(w+h-x-y, w-x), and by adding up the grid."""
    w, h = rng.randint(3, 8), rng.randint(3, 8)
    x, y = rng.randint(1, w - 1), rng.randint(1, h - 1)
    grid = {(0, 0): 1}
    for i, j in product(range(w + 1), range(h + 1)):
        if (i, j) != (0, 0):
            grid[i, j] = 0 if (i, j) == (x, y) else grid.get((i - 1, j), 0) + grid.get((i, j - 1), 0)
    text = (
        f"A path goes from $(0,0)$ to $({w},{h})$ in unit steps to the right or up and never visits $({x},{y})$. "
        "How many such paths are there?"
    )
    return Problem(text, comb(w + h, w) - comb(x + y, x) * comb(w + h - x - y, w - x), grid[w, h])


def remainders(rng: random.Random) -> Problem:
    """The least non-negative x with three given remainders, by the Chinese remainder theorem, and by search."""
    moduli = rng.sample([3, 4, 5, 7, 9, 11, 13], 3)
    total = moduli[0] * moduli[1] * moduli[2]
    if lcm(*moduli) != total or total > 1000:
        raise Redraw
    rests = [rng.randrange(m) for m in moduli]
    formula = sum(r * (total // m) * pow(total // m, -1, m) for r, m in zip(rests, moduli, strict=True)) % total
    counted = next(x for x in range(total) if [x % m for m in moduli] == rests)
    given = ", ".join(f"${r}$ on division by ${m}$" for r, m in zip(rests, moduli, strict=True))
    return Problem(f"Find the smallest non-negative integer that leaves the remainders {given}.", formula, counted)


def dice(rng: random.Random) -> Problem:
    """m + n of P(sum of k dice with f faces = s) = m/n, by inclusion-exclusion, and over all throws."""
    k, f = rng.randint(2, 4), rng.randint(4, 8)
    s = rng.randint(k, k * f)
    ways = sum((-1) ** j * comb(k, j) * comb(s - f * j - 1, k - 1) for j in range((s - k) // f + 1))
    hits = sum(sum(throw) == s for throw in product(range(1, f + 1), repeat=k))
    text = (
        f"${k}$ fair dice with faces $1$ to ${f}$ are thrown. The probability that the sum is ${s}$ equals "
        "$\\frac{m}{n}$ with coprime positive integers $m$ and $n$. Find $m+n$."
    )
    shares = [Fraction(x, f**k) for x in (ways, hits)]
    return Problem(text, *(share.numerator + share.denominator for share in shares))


def digit_sum(rng: random.Random) -> Problem:
    """Numbers of at most d digits with digit sum s, by inclusion-exclusion, and one by one."""
    d, s = rng.randint(3, 4), rng.randint(3, 24)
    formula = sum((-1) ** j * comb(d, j) * comb(s - 10 * j + d - 1, d - 1) for j in range(min(d, s // 10) + 1))
    counted = sum(sum(map(int, str(x))) == s for x in range(10**d))
    return Problem(f"How many non-negative integers less than $10^{d}$ have digit sum ${s}$?", formula, counted)


def factorial_exponent(rng: random.Random) -> Problem:
    """Exponent of p in n!/m!, by Legendre's formula, and factor by factor."""
    p, m = rng.choice([2, 3, 5, 7]), rng.randint(10, 200)
    n = m + rng.randint(20, 600)

    def legendre(x: int) -> int:
        return 0 if x == 0 else x // p + legendre(x // p)

    def exponent(x: int) -> int:
        return 0 if x % p else 1 + exponent(x // p)

    text = f"Find the largest integer $k$ such that ${p}^k$ divides $\\frac{{{n}!}}{{{m}!}}$."
    return Problem(text, legendre(n) - legendre(m), sum(exponent(x) for x in range(m + 1, n + 1)))


def recurrence(rng: random.Random) -> Problem:
    """Term n of x_k = p x_{k-1} + q x_{k-2} mod m, by powers of the companion polynomial's root, and term by term."""
    p, q, m, n = rng.randint(1, 6), rng.randint(1, 6), rng.randint(101, 1000), rng.randint(20, 300)
    x, y = rng.randint(0, 9), rng.randint(1, 9)
    before, now = x, y
    for _ in range(n - 1):
        before, now = now, (p * now + q * before) % m
    high, low = _companion_power(n, p, q, m)  # x_n = high x_1 + low x_0
    text = (
        f"Let $x_0={x}$, $x_1={y}$ and $x_k={p}x_{{k-1}}+{q}x_{{k-2}}$ for $k \\ge 2$. "
        f"Find the remainder when $x_{{{n}}}$ is divided by ${m}$."
    )
    return Problem(text, (high * y + low * x) % m, now % m)


def _companion_power(n: int, p: int, q: int, m: int) -> tuple[int, int]:
    """(a, b) with t^n = a t + b modulo t^2 - p t - q and m, by squaring."""
    if n == 0:
        return 0, 1
    a, b = _companion_power(n // 2, p, q, m)
    a, b = (a * a * p + 2 * a * b) % m, (a * a * q + b * b) % m  # (a t + b)^2
    return ((a * p + b) % m, a * q % m) if n % 2 else (a, b)  # times t


def bounded_sums(rng: random.Random) -> Problem:
    """Triples of positive integers with a given sum and x <= a: C(n-1, 2) - C(n-a-1, 2), and one by one."""
    n, a = rng.randint(10, 60), rng.randint(3, 30)
    counted = sum(1 for x in range(1, min(a, n) + 1) for y in range(1, n) if n - x - y >= 1)
    text = f"How many ordered triples $(x,y,z)$ of positive integers satisfy $x+y+z={n}$ and $x \\le {a}$?"
    return Problem(text, comb(n - 1, 2) - comb(max(n - a - 1, 0), 2), counted)


def triangle_points(rng: random.Random) -> Problem:
    """Lattice points in or on the triangle (0,0), (a,0), (0,b), by Pick's theorem, and one by one."""
    a, b = rng.randint(5, 45), rng.randint(5, 45)
    border = a + b + gcd(a, b)
    counted = sum(x * b + y * a <= a * b for x in range(a + 1) for y in range(b + 1))
    text = f"How many points with integer coordinates lie in or on the triangle $(0,0)$, $({a},0)$, $(0,{b})$?"
    return Problem(text, (a * b - border + 2) // 2 + border, counted)


FAMILIES: dict[str, Callable[[random.Random], Problem]] = {
    family.__name__: family
    for family in (
        modular_power,
        spaced_subsets,
        divisors,
        inclusion_exclusion,
        lattice_paths,
        remainders,
        dice,
        digit_sum,
        factorial_exponent,
        recurrence,
        bounded_sums,
        triangle_points,
    )
}


def load(source: Source) -> list[Item]:
    """Questions family by family in turn. The i-th repeats no text, and no answer more than 1 + i//100 times."""
    rng = random.Random(f"{NAME}/{source.seed}")
    names, texts, answers = list(FAMILIES), set[str](), Counter[int]()

    def draw(i: int) -> Item:
        family = names[i % len(names)]
        problem = FAMILIES[family](rng)
        answer = agree(f"{NAME}/{family}: {problem.text}", problem.formula, problem.counted)
        if problem.text in texts or not 0 <= answer <= LARGEST or answers[answer] > i // 100:
            raise Redraw
        texts.add(problem.text)
        answers[answer] += 1
        name = f"{NAME}-{source.seed}-{i:04d}"
        return Item(name, name, conversation(f"{problem.text}\n\n{INSTRUCTION}"), str(answer), family)

    return draw_all(NAME, count(source.limit), draw)
