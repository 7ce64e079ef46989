"""The 24 stories of `gsm_json_synth`, six of each number of steps; longer than a module should be, for it is a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

Values = Mapping[str, int]


@dataclass(frozen=True)
class Template:
    """A story with slots, the range of each slot, the steps (`t = a * b`; the last one gives the answer), a formula."""

    name: str
    story: str
    question: str
    slots: Mapping[str, tuple[int, int]]
    steps: tuple[str, ...]
    formula: Callable[[Values], Fraction]


def F(value: int) -> Fraction:
    """Exact division needs one fraction in it."""
    return Fraction(value)


TEMPLATES = (
    Template(
        "muffins",
        "{who} bakes {a} trays of {b} muffins each and sells {c} of the muffins.",
        "How many muffins are left?",
        {"a": (3, 12), "b": (6, 24), "c": (5, 60)},
        ("t = a * b", "r = t - c"),
        lambda v: F(v["a"] * v["b"] - v["c"]),
    ),
    Template(
        "change",
        "{who} buys {a} notebooks at {b} coins each and pays with {c} coins.",
        "How many coins of change does {who} get?",
        {"a": (2, 9), "b": (3, 15), "c": (50, 200)},
        ("t = a * b", "r = c - t"),
        lambda v: F(v["c"] - v["a"] * v["b"]),
    ),
    Template(
        "share",
        "{who} collects {a} shells in the morning and {b} in the evening and splits them evenly among {c} children.",
        "How many shells does each child get?",
        {"a": (10, 90), "b": (10, 90), "c": (2, 9)},
        ("t = a + b", "r = t / c"),
        lambda v: F(v["a"] + v["b"]) / v["c"],
    ),
    Template(
        "reading",
        "A book has {a} pages. {who} has read {b} of them and reads {c} pages a day from now on.",
        "In how many days is the book finished?",
        {"a": (120, 400), "b": (20, 100), "c": (4, 20)},
        ("t = a - b", "r = t / c"),
        lambda v: F(v["a"] - v["b"]) / v["c"],
    ),
    Template(
        "lamps",
        "{who} hangs up {a} strings of {b} lamps each. {c} other lamps were there before.",
        "How many lamps are there now?",
        {"a": (3, 40), "b": (5, 50), "c": (5, 100)},
        ("t = a * b", "r = t + c"),
        lambda v: F(v["a"] * v["b"] + v["c"]),
    ),
    Template(
        "garden",
        "{who}'s garden is {a} metres wide and {b} metres long. Beds cover {c} square metres; the rest is grass.",
        "How many square metres are grass?",
        {"a": (5, 20), "b": (8, 30), "c": (10, 150)},
        ("t = a * b", "r = t - c"),
        lambda v: F(v["a"] * v["b"] - v["c"]),
    ),
    Template(
        "tickets",
        "{who} sells {a} tickets for children at {b} coins and {c} tickets for adults at {d} coins.",
        "How many coins does {who} take in?",
        {"a": (5, 40), "b": (3, 9), "c": (5, 40), "d": (10, 25)},
        ("s = a * b", "t = c * d", "r = s + t"),
        lambda v: F(v["a"] * v["b"] + v["c"] * v["d"]),
    ),
    Template(
        "wages",
        "{who} works {a} hours a day for {b} days at {c} coins an hour and then spends {d} coins.",
        "How many coins are left?",
        {"a": (4, 9), "b": (3, 20), "c": (8, 25), "d": (50, 400)},
        ("s = a * b", "t = s * c", "r = t - d"),
        lambda v: F(v["a"] * v["b"] * v["c"] - v["d"]),
    ),
    Template(
        "buses",
        "{who} leads {a} classes of {b} pupils and {c} teachers on a trip. Each bus holds {d} people, all are full.",
        "How many buses drive?",
        {"a": (3, 9), "b": (15, 30), "c": (4, 20), "d": (20, 50)},
        ("s = a * b", "t = s + c", "r = t / d"),
        lambda v: F(v["a"] * v["b"] + v["c"]) / v["d"],
    ),
    Template(
        "saving",
        "{who} wants a bicycle for {a} coins, has {b} coins already, and saves {c} coins a week but spends {d} of them.",
        "In how many weeks can {who} buy the bicycle?",
        {"a": (150, 500), "b": (10, 100), "c": (15, 40), "d": (2, 12)},
        ("s = a - b", "t = c - d", "r = s / t"),
        lambda v: F(v["a"] - v["b"]) / (v["c"] - v["d"]),
    ),
    Template(
        "water",
        "A tank holds {a} litres. {who} draws {b} buckets of {c} litres from it and then pours {d} litres in.",
        "How many litres are in the tank now, if it was full before?",
        {"a": (200, 600), "b": (3, 12), "c": (8, 15), "d": (5, 60)},
        ("s = b * c", "t = a - s", "r = t + d"),
        lambda v: F(v["a"] - v["b"] * v["c"] + v["d"]),
    ),
    Template(
        "stickers",
        "{who} has {a} stickers, {friend} has {b} times as many. Together they give away {c} stickers.",
        "How many stickers do the two have left?",
        {"a": (8, 60), "b": (2, 6), "c": (5, 60)},
        ("s = a * b", "t = a + s", "r = t - c"),
        lambda v: F(v["a"] * (v["b"] + 1) - v["c"]),
    ),
    Template(
        "orchard",
        "{who} plants {a} rows of {b} apple trees and {c} rows of {d} pear trees; {e} trees do not survive.",
        "How many trees are left?",
        {"a": (3, 12), "b": (4, 15), "c": (3, 12), "d": (4, 15), "e": (3, 30)},
        ("s = a * b", "t = c * d", "u = s + t", "r = u - e"),
        lambda v: F(v["a"] * v["b"] + v["c"] * v["d"] - v["e"]),
    ),
    Template(
        "party",
        "For a party {who} buys {a} bottles at {b} coins and {c} cakes at {d} coins. {e} friends share the cost evenly.",
        "How many coins does each friend pay?",
        {"a": (4, 20), "b": (2, 6), "c": (2, 8), "d": (8, 20), "e": (2, 8)},
        ("s = a * b", "t = c * d", "u = s + t", "r = u / e"),
        lambda v: F(v["a"] * v["b"] + v["c"] * v["d"]) / v["e"],
    ),
    Template(
        "train",
        "A train starts with {a} people. At the first stop {b} get off and {c} get on; at the second {d} off and {e} on.",
        "How many people are on {who}'s train after that?",
        {"a": (60, 200), "b": (5, 50), "c": (5, 50), "d": (5, 50), "e": (5, 50)},
        ("s = a - b", "t = s + c", "u = t - d", "r = u + e"),
        lambda v: F(v["a"] - v["b"] + v["c"] - v["d"] + v["e"]),
    ),
    Template(
        "fence",
        "{who}'s field is {a} metres by {b} metres. A fence goes all round, but for a gate of {c} metres, "
        "and costs {d} coins a metre.",
        "How many coins does the fence cost?",
        {"a": (10, 60), "b": (10, 60), "c": (2, 8), "d": (3, 15)},
        ("s = a + b", "t = s * 2", "u = t - c", "r = u * d"),
        lambda v: F((2 * v["a"] + 2 * v["b"] - v["c"]) * v["d"]),
    ),
    Template(
        "boxes",
        "{who} packs {a} eggs into boxes of {b} and sells each box for {c} coins. Feed costs {d} coins, boxes {e} coins.",
        "How many coins of profit are left?",
        {"a": (60, 240), "b": (6, 12), "c": (3, 9), "d": (5, 30), "e": (2, 20)},
        ("s = a / b", "t = s * c", "u = t - d", "r = u - e"),
        lambda v: F(v["a"]) / v["b"] * v["c"] - v["d"] - v["e"],
    ),
    Template(
        "relay",
        "{who} runs {a} laps of {b} metres, {friend} runs {c} laps of {d} metres on another track.",
        "How many metres do they run on average?",
        {"a": (3, 15), "b": (200, 400), "c": (3, 15), "d": (200, 400)},
        ("s = a * b", "t = c * d", "u = s + t", "r = u / 2"),
        lambda v: F(v["a"] * v["b"] + v["c"] * v["d"]) / 2,
    ),
    Template(
        "loaves",
        "{who} sells {a} loaves on each of {b} weekdays and {c} loaves on each of {d} Saturdays, "
        "at {e} coins a loaf. Flour costs {f} coins.",
        "How many coins remain?",
        {"a": (20, 60), "b": (3, 20), "c": (30, 90), "d": (2, 6), "e": (2, 6), "f": (50, 300)},
        ("s = a * b", "t = c * d", "u = s + t", "w = u * e", "r = w - f"),
        lambda v: F((v["a"] * v["b"] + v["c"] * v["d"]) * v["e"] - v["f"]),
    ),
    Template(
        "mosaic",
        "{who} lays {a} panels of {b} by {c} tiles, and {d} further tiles break. Tiles come in boxes of {e}, "
        "and no tile is left over. One more box stays closed as a reserve.",
        "How many boxes are there in all?",
        {"a": (2, 8), "b": (5, 20), "c": (5, 20), "d": (3, 30), "e": (10, 40)},
        ("s = b * c", "t = a * s", "u = t + d", "w = u / e", "r = w + 1"),
        lambda v: F(v["a"] * v["b"] * v["c"] + v["d"] + v["e"]) / v["e"],
    ),
    Template(
        "journey",
        "{who} drives {a} hours at {b} km an hour and {c} hours at {d} km an hour. The way is {e} km long.",
        "How many hours does the rest take at 10 km an hour?",
        {"a": (2, 5), "b": (40, 90), "c": (2, 5), "d": (40, 90), "e": (300, 900)},
        ("s = a * b", "t = c * d", "u = s + t", "w = e - u", "r = w / 10"),
        lambda v: F(v["e"] - v["a"] * v["b"] - v["c"] * v["d"]) / 10,
    ),
    Template(
        "library",
        "A library has {a} shelves of {b} books. {who} lends {c} books to each of {d} readers and buys {e} new books, "
        "then divides all books in the house evenly among {f} rooms.",
        "How many books are in each room?",
        {"a": (5, 20), "b": (20, 60), "c": (2, 6), "d": (5, 30), "e": (10, 60), "f": (2, 6)},
        ("s = a * b", "t = c * d", "u = s - t", "w = u + e", "r = w / f"),
        lambda v: F(v["a"] * v["b"] + v["e"] - v["c"] * v["d"]) / v["f"],
    ),
    Template(
        "phones",
        "{who} repairs {a} phones a day for {b} days and {friend} repairs {c} phones a day for {d} days. "
        "They earn {e} coins a phone and {friend} gets {f} coins of it.",
        "How many coins are left for {who}?",
        {"a": (3, 9), "b": (4, 12), "c": (2, 8), "d": (4, 12), "e": (10, 30), "f": (100, 900)},
        ("s = a * b", "t = c * d", "u = s + t", "w = u * e", "r = w - f"),
        lambda v: F(v["e"] * v["a"] * v["b"] + v["e"] * v["c"] * v["d"] - v["f"]),
    ),
    Template(
        "choir",
        "{who}'s choir has {a} rows of {b} singers. {c} singers leave, {d} join, and those present form {e} equal groups, "
        "each of which needs {f} more singers.",
        "How many singers will one group have then?",
        {"a": (3, 9), "b": (6, 15), "c": (2, 15), "d": (2, 20), "e": (2, 7), "f": (1, 9)},
        ("s = a * b", "t = s - c", "u = t + d", "w = u / e", "r = w + f"),
        lambda v: F(v["a"] * v["b"] - v["c"] + v["d"]) / v["e"] + v["f"],
    ),
)
