"""DSTC (arXiv 2411.13611): preference pairs from a model's own codes and its own tests. Pure functions.

J codes y_j and K tests z_k of one instruction, R[j, k] = 1 if y_j passes z_k, else 0. a_j = sum_k R[j, k] and
b_k = sum_j R[j, k]. Minimax takes the best code with the hardest test that it passes, and an easy test with the worst
code that fails it, by lowest index among equals:

    j+ = argmax_j a_j                 k+ = argmin_k b_k  subject to R[j+, k] = 1
    k- = argmax_k b_k  if b_k < J     j- = argmin_j a_j  subject to R[j, k-] = 0

Chosen is y_{j+} followed by z_{k+}, rejected y_{j-} followed by z_{k-}: the first passes and the second fails even where a
test is wrong. j- is inferred (card). j+ is that of `best_worst` as well; the two differ in the tests and in j-.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Matrix = Sequence[Sequence[int]]
"""R (J, K) of 0 and 1."""
_FENCE = re.compile(r"^(`{3,}|~{3,})[^\n`]*\n(.*?)^\1[`~]*[ \t]*$", re.MULTILINE | re.DOTALL)
_BINDING: dict[type[ast.AST], str] = {
    ast.FunctionDef: "name",
    ast.AsyncFunctionDef: "name",
    ast.ClassDef: "name",
    ast.arg: "arg",
    ast.ExceptHandler: "name",
    ast.MatchAs: "name",
    ast.MatchStar: "name",
    ast.MatchMapping: "rest",
}
"""Nodes that define a name, and the attribute that holds it; names that are assigned and imports come on top."""
_MAX_TEXT = 20_000
PARSE_ERRORS = (SyntaxError, ValueError, RecursionError, MemoryError)
"""What Python's parser raises for texts: a null byte is a ValueError, deep nesting a RecursionError or a MemoryError."""


@dataclass(frozen=True)
class Selection:
    """Numbers of the codes and tests of a pair."""

    chosen_code: int
    chosen_test: int
    rejected_code: int
    rejected_test: int


class Skipped(Exception):
    """An instruction that gives no pair; the message is the reason, a short phrase that is counted."""


def first_block(reply: str) -> str | None:
    """The text in a reply's first fenced block; None if there is none, or it does not end."""
    found = _FENCE.search(reply)
    return found[2].rstrip("\n") if found else None


def parsed(text: str) -> ast.Module | None:
    """A text as Python; None if it is none, is empty, or is longer than `_MAX_TEXT` characters."""
    if not text.strip() or len(text) > _MAX_TEXT:
        return None
    try:
        return ast.parse(text)
    except PARSE_ERRORS:
        return None


def calls(tree: ast.Module, entry_point: str) -> bool:
    """Whether the entry point is called by its name, and nothing in the text gives that name to anything else."""
    nodes = list(ast.walk(tree))
    called = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    return entry_point in called and entry_point not in {_bound(n) for n in nodes}


def _bound(node: ast.AST) -> str | None:
    """The name that a node gives a new meaning, if it does."""
    if isinstance(node, ast.alias):
        return (node.asname or node.name).partition(".")[0]
    if isinstance(node, ast.Name):
        return None if isinstance(node.ctx, ast.Load) else node.id
    attribute = next((name for kind, name in _BINDING.items() if isinstance(node, kind)), None)
    return getattr(node, attribute) if attribute else None


def kept(replies: Sequence[str], entry_point: str | None = None) -> tuple[list[str], dict[str, int]]:
    """The usable texts of replies, and how many were dropped for which reason. `entry_point`: they are tests of it."""
    texts: list[str] = []
    dropped = {"no block": 0, "does not parse": 0, "does not call": 0, "duplicate": 0}
    for reply in replies:
        text = first_block(reply)
        reason = None if text is None else _problem(text, entry_point, texts)
        if text is None or reason is not None:
            dropped[reason or "no block"] += 1
        else:
            texts.append(text)
    return texts, dropped


def _problem(text: str, entry_point: str | None, before: Sequence[str]) -> str | None:
    if (tree := parsed(text)) is None:
        return "does not parse"
    if entry_point is not None and not calls(tree, entry_point):
        return "does not call"
    return "duplicate" if text in before else None


def code_sums(results: Matrix) -> list[int]:
    """a (J)."""
    return [sum(row) for row in results]


def test_sums(results: Matrix) -> list[int]:
    """b (K)."""
    return [sum(column) for column in zip(*results, strict=True)]


def minimax(results: Matrix, rng: random.Random) -> Selection:
    """The card's selection. `rng` is not used: it is deterministic."""
    a, b, codes = code_sums(results), test_sums(results), range(len(results))
    best = max(codes, key=a.__getitem__)
    hardest = min((k for k in range(len(b)) if results[best][k]), key=b.__getitem__)
    easiest = max((k for k in range(len(b)) if b[k] < len(a)), key=b.__getitem__)
    worst = min((j for j in codes if not results[j][easiest]), key=a.__getitem__)
    return Selection(best, hardest, worst, easiest)


def best_worst(results: Matrix, rng: random.Random) -> Selection:
    """Ablation: the codes that pass most and fewest tests, each with the first test that it passes, or fails."""
    a = code_sums(results)
    best, worst = max(range(len(a)), key=a.__getitem__), min(range(len(a)), key=a.__getitem__)
    if all(results[worst]):
        raise Skipped("every test is passed by all codes")
    return Selection(best, list(results[best]).index(1), worst, list(results[worst]).index(0))


def at_random(results: Matrix, rng: random.Random) -> Selection:
    """Ablation: any code with a test that it passes, and any with a test that it fails."""
    cells = [(j, k) for j, row in enumerate(results) for k in range(len(row))]
    chosen = rng.choice([cell for cell in cells if results[cell[0]][cell[1]]])
    rejected = rng.choice([cell for cell in cells if not results[cell[0]][cell[1]]])
    return Selection(*chosen, *rejected)


SELECTIONS: dict[str, Callable[[Matrix, random.Random], Selection]] = {
    "minimax": minimax,
    "best_worst": best_worst,
    "random": at_random,
}


def select(results: Matrix, how: str = "minimax", require_gap: bool = True, seed: str = "0") -> Selection:
    """The pair of one instruction. `require_gap`: a_{j+} must be above a_{j-} (card: inferred).

    Raises Skipped with the reason, ValueError for a matrix that is not rectangular or not of 0 and 1.
    """
    if {len(row) for row in results} - {len(results[0]) if results else 0} or not set().union(*results) <= {0, 1}:
        raise ValueError("execution results must be a rectangular matrix of 0 and 1")
    if len(results) < 2:
        raise Skipped("fewer than two codes")
    if not results[0]:
        raise Skipped("no test")
    if not any(map(any, results)):
        raise Skipped("no code passes a test")
    if all(map(all, results)):
        raise Skipped("every test is passed by all codes")
    found, a = SELECTIONS[how](results, random.Random(seed)), code_sums(results)
    if require_gap and a[found.rejected_code] >= a[found.chosen_code]:
        raise Skipped("no gap in quality")
    return found


def completion(code: str, test: str | None) -> str:
    """The text that is trained on: the code's block, an empty line and the test's, or the code's alone."""
    return "\n\n".join(_fenced(text) for text in (code, test) if text is not None)


def _fenced(text: str) -> str:
    """A block whose fence is longer than every run of backticks in it, so that none of them ends it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}python\n{text}\n{fence}"


def pair_texts(codes: Sequence[str], tests: Sequence[str], chosen: Selection, concat: bool) -> tuple[str, str]:
    """Chosen and rejected completion. Raises Skipped if they coincide."""
    good = completion(codes[chosen.chosen_code], tests[chosen.chosen_test] if concat else None)
    bad = completion(codes[chosen.rejected_code], tests[chosen.rejected_test] if concat else None)
    if good == bad:
        raise Skipped("the two texts coincide")
    return good, bad
