"""DSTC's selection on the card's numbers and against a brute-force reference; what is kept of replies; the pair's text."""

import itertools
import random

import pytest

from tests.bench import dstc_synthetic
from trl_ext.loops import dstc
from trl_ext.loops.dstc import Selection, Skipped

CARD = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]
REASONS = {
    "fewer than two codes",
    "no test",
    "no code passes a test",
    "every test is passed by all codes",
    "no gap in quality",
}


def reference(results):
    """Minimax by looking at every (j+, k+, j-, k-); of equals the lowest, side by side. None where a rule skips."""
    J, K = len(results), len(results[0])
    a = [sum(row) for row in results]
    b = [sum(results[j][k] for j in range(J)) for k in range(K)]
    best = min(j for j in range(J) if all(a[j] >= a[i] for i in range(J)))
    passed = [k for k in range(K) if results[best][k] == 1]
    open_tests = [k for k in range(K) if b[k] < J]
    if J < 2 or not passed or not open_tests:
        return None
    hardest = min(k for k in passed if all(b[k] <= b[i] for i in passed))
    easiest = min(k for k in open_tests if all(b[k] >= b[i] for i in open_tests))
    failing = [j for j in range(J) if results[j][easiest] == 0]
    worst = min(j for j in failing if all(a[j] <= a[i] for i in failing))
    return None if a[worst] >= a[best] else Selection(best, hardest, worst, easiest)


def matrices(n, seed=0, most=6):
    """Random matrices of 1 to `most` codes and tests, from nearly empty to nearly full."""
    rng = random.Random(seed)
    for _ in range(n):
        share = rng.choice([0.05, 0.3, 0.5, 0.7, 0.95])
        J, K = rng.randint(1, most), rng.randint(1, most)
        yield [[int(rng.random() < share) for _ in range(K)] for _ in range(J)]


def outcome(results, how="minimax", **options):
    """The selection, or None where it is skipped."""
    try:
        return dstc.select(results, how, **options)
    except Skipped as reason:
        assert str(reason) in REASONS
        return None


def test_the_card():
    assert dstc.code_sums(CARD) == [3, 2, 2, 0]
    assert dstc.test_sums(CARD) == [3, 2, 1, 1]
    assert dstc.select(CARD) == Selection(chosen_code=0, chosen_test=2, rejected_code=3, rejected_test=0)


def test_minimax_is_the_reference_on_every_matrix_of_three_by_three_and_on_random_ones():
    every = ([list(bits[i : i + 3]) for i in (0, 3, 6)] for bits in itertools.product((0, 1), repeat=9))
    for results in itertools.chain(every, matrices(2000)):
        assert outcome(results) == reference(results), results


@pytest.mark.parametrize("how", dstc.SELECTIONS)
def test_labels_are_true_and_the_gap_is_kept(how):
    for number, results in enumerate(matrices(1000, seed=1)):
        found = outcome(results, how, seed=str(number))
        if found is None:
            continue
        a, b = dstc.code_sums(results), dstc.test_sums(results)
        assert results[found.chosen_code][found.chosen_test] == 1
        assert results[found.rejected_code][found.rejected_test] == 0
        assert a[found.chosen_code] > a[found.rejected_code]
        if how == "minimax":
            assert all(b[found.chosen_test] <= b[k] for k in range(len(b)) if results[found.chosen_code][k])
            assert all(a[found.rejected_code] <= a[j] for j in range(len(a)) if not results[j][found.rejected_test])


def test_the_naive_pair_has_the_same_chosen_code_as_minimax():
    for results in matrices(500, seed=2):
        naive, ours = outcome(results, "best_worst"), outcome(results)
        if naive is not None and ours is not None:
            assert naive.chosen_code == ours.chosen_code


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        ([], "fewer than two codes"),
        ([[1, 0]], "fewer than two codes"),
        ([[], []], "no test"),
        ([[0, 0], [0, 0]], "no code passes a test"),
        ([[1, 1], [1, 1]], "every test is passed by all codes"),
        ([[1, 0], [0, 1]], "no gap in quality"),
    ],
)
@pytest.mark.parametrize("how", dstc.SELECTIONS)
def test_skips(results, reason, how):
    with pytest.raises(Skipped, match=reason):
        dstc.select(results, how)


def test_the_gap_is_an_option():
    assert dstc.select([[1, 0], [0, 1]], require_gap=False) == Selection(0, 0, 1, 0)


def test_a_test_that_nobody_passes():
    """It is never chosen, and rejected only where nothing else is left."""
    assert dstc.select([[0, 1], [0, 1], [0, 0]]) == Selection(0, 1, 2, 1)
    assert dstc.select([[1, 1, 0], [1, 1, 0]], require_gap=False).rejected_test == 2
    for results in matrices(500, seed=3):
        found, b = outcome(results), dstc.test_sums(results)
        if found is not None:
            assert b[found.chosen_test] > 0
            assert b[found.rejected_test] > 0 or not any(0 < count < len(results) for count in b)


def test_relabelling_permutes_the_result():
    """Where no two codes and no two tests have equal sums, so that the lowest index decides nothing."""
    rng, seen = random.Random(4), 0
    for results in matrices(4000, seed=5):
        a, b = dstc.code_sums(results), dstc.test_sums(results)
        found = outcome(results)
        if found is None or len(set(a)) < len(a) or len(set(b)) < len(b):
            continue
        rows, columns = rng.sample(range(len(a)), len(a)), rng.sample(range(len(b)), len(b))
        moved = dstc.select([[results[j][k] for k in columns] for j in rows])
        back = Selection(
            rows[moved.chosen_code],
            columns[moved.chosen_test],
            rows[moved.rejected_code],
            columns[moved.rejected_test],
        )
        assert back == found
        seen += 1
    assert seen > 20


def test_random_is_seeded():
    picks = [dstc.select(CARD, "random", require_gap=False, seed=str(seed)) for seed in range(50)]
    assert picks == [dstc.select(CARD, "random", require_gap=False, seed=str(seed)) for seed in range(50)]
    assert len(set(picks)) > 10


def test_a_wrong_matrix_is_refused():
    for wrong in ([[1, 0], [1]], [[2, 0], [0, 0]]):
        with pytest.raises(ValueError, match="rectangular matrix of 0 and 1"):
            dstc.select(wrong)


def test_first_block():
    fenced = "Here:\n```python\nx = 1\n\ny = 2\n```\nand\n```\nz\n```"
    assert dstc.first_block(fenced) == "x = 1\n\ny = 2"
    assert dstc.first_block("~~~\na = '```'\n~~~") == "a = '```'"
    assert dstc.first_block("````py\n```\n````") == "```"
    assert dstc.first_block("x = 1") is None
    assert dstc.first_block("```python\nx = 1") is None
    assert dstc.first_block("```python\n```") == ""


@pytest.mark.parametrize("text", ["x = ", "", " \n", "a\0b", "(" * 5000, "-" * 15_000 + "1", "x" * 20_001])
def test_what_does_not_parse(text):
    assert dstc.parsed(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("assert f(1) == 2", True),
        ("def check():\n    return f(1)\nassert check()", True),
        ("assert g(1) == 2", False),
        ("print(f)", False),
        ("x.f(1)", False),
        ("def f(x): return 1\nassert f(1)", False),
        ("f = abs\nassert f(1)", False),
        ("from solution import f\nassert f(1) == 2", False),
        ("from solution import g as f\nassert f(1) == 2", False),
        ("import f\nf(1)", False),
        ("import f.g\nf(1)", False),
        ("def check(f):\n    f(1)", False),
        ("check = lambda *f: f(1)", False),
        ("try:\n    f(1)\nexcept ValueError as f:\n    pass", False),
        ("match [1]:\n    case [*f]:\n        f(1)", False),
        ("for f in [abs]:\n    f(1)", False),
        ("import math\nfrom f import g\nassert f(1, f=2) == math.pi", True),
    ],
)
def test_calls(text, expected):
    assert dstc.calls(dstc.parsed(text), "f") is expected


def test_kept():
    def fence(text):
        return f"```python\n{text}\n```"

    replies = [
        fence("assert f(1)"),
        "no",
        fence("assert ("),
        fence("assert g(1)"),
        fence("assert f(1)"),
        fence("f(2)"),
    ]
    texts, dropped = dstc.kept(replies, "f")
    assert texts == ["assert f(1)", "f(2)"]
    assert dropped == {"no block": 1, "does not parse": 1, "does not call": 1, "duplicate": 1}
    assert dstc.kept(replies)[0] == ["assert f(1)", "assert g(1)", "f(2)"]


def test_pair_texts():
    codes, tests, chosen = ["def f(): 1", "def f(): 2"], ["f()", "f() == 2"], Selection(0, 1, 1, 0)
    good, bad = dstc.pair_texts(codes, tests, chosen, concat=True)
    assert good == "```python\ndef f(): 1\n```\n\n```python\nf() == 2\n```"
    assert bad == "```python\ndef f(): 2\n```\n\n```python\nf()\n```"
    assert dstc.pair_texts(codes, tests, chosen, concat=False) == (
        "```python\ndef f(): 1\n```",
        "```python\ndef f(): 2\n```",
    )
    fences = "def f():\n    return '''\n```\n'''"
    whole = dstc.completion(fences, "assert f() == '\\n```\\n'")
    assert whole.startswith("````python\n") and dstc.first_block(whole) == fences
    assert dstc.first_block(whole.partition("\n````\n\n")[2]) == "assert f() == '\\n```\\n'"
    with pytest.raises(Skipped, match="coincide"):
        dstc.pair_texts(codes, tests, Selection(0, 1, 0, 0), concat=False)


def test_what_minimax_is_good_for():
    """A third of the tests corrupted, without any model: its codes are the naive pair's, its tests are sounder than both."""
    rows = dstc_synthetic.run("mixed", 1 / 3, seed=0, instructions=300)
    naive = [row for row in rows if {"minimax", "best_worst"} <= set(row)]
    assert len(naive) > 200
    assert all(row["minimax"][0] == row["best_worst"][0] for row in naive)
    lucky = [row for row in rows if {"minimax", "random"} <= set(row)]

    def gain(rows, other, i):
        return sum(row["minimax"][i] - row[other][i] for row in rows) / len(rows)

    assert gain(lucky, "random", 0) > 0.05
    assert gain(naive, "best_worst", 3) > 0.05
    assert gain(naive, "best_worst", 4) > 0.05
