"""PasoDoble's rules against the card's numbers: gates, diversity, the Proposer's reward, filters and the schedule."""

from __future__ import annotations

import pytest
import torch

from trl_ext.loops import rules
from trl_ext.loops.rules import Phase, Proposal

P = [1 / 2, 1 / 6, 1.0, 2 / 3, 0.0, 1 / 3]
D = [1, 1, 0.9, 0.25, 1, 0.6]
R = [0.8, 0, 0.28, 0, 0, 0.886667]


def test_worked_rewards() -> None:
    assert [rules.proposer_reward(p, d) for p, d in zip(P, D, strict=True)] == pytest.approx(R, abs=1e-6)


def test_worked_advantages() -> None:
    """Group mean, sample standard deviation, + 1e-4, as TRL's."""
    r = torch.tensor([rules.proposer_reward(p, d) for p, d in zip(P, D, strict=True)], dtype=torch.float64)
    centred = r - r.mean()
    without = [0.472222, -0.327778, -0.047778, -0.327778, -0.327778, 0.558889]
    scaled = [1.138389, -0.790176, -0.115178, -0.790176, -0.790176, 1.347317]
    assert centred.tolist() == pytest.approx(without, abs=1e-6)
    assert (centred / (r.std() + 1e-4)).tolist() == pytest.approx(scaled, abs=1e-6)


def test_worked_filter() -> None:
    assert [i for i, p in enumerate(P, 1) if rules.trains_solver(p)] == [1, 4, 6]


def test_filter_is_strict() -> None:
    assert not rules.trains_solver(0.2) and not rules.trains_solver(1.0)
    assert rules.trains_solver(0.2 + 1e-9) and rules.trains_solver(1.0 - 1e-9)
    assert not rules.trains_solver(1 / 5), "one of five answers is exactly the lower threshold"


@pytest.mark.parametrize("p", [k / 12 for k in range(13)])
@pytest.mark.parametrize("d", [0, 0.3, 0.31, 0.6, 1])
def test_reward_is_zero_exactly_when_invalid_or_old(p: float, d: float) -> None:
    reward = rules.proposer_reward(p, d)
    assert (reward == 0) == (p <= 0.2 or d <= 0.3)
    assert 0 <= reward <= 1.1


def test_reward_falls_in_p_and_rises_in_d() -> None:
    by_p = [rules.proposer_reward(p, 0.7) for p in (0.3, 0.5, 0.9, 1.0)]
    by_d = [rules.proposer_reward(0.5, d) for d in (0.4, 0.7, 1.0)]
    assert by_p == sorted(by_p, reverse=True) and len(set(by_p)) == 4
    assert by_d == sorted(by_d) and len(set(by_d)) == 3
    assert rules.proposer_reward(1.0, 0.8) == pytest.approx(0.1 + 0.2 * 0.8), "a question that is too easy still earns"


def test_without_diversity() -> None:
    assert rules.proposer_reward(0.4, 0.0, tau_div=-0.1, weight=0) == pytest.approx(0.7)


def test_worked_jaccard() -> None:
    new = frozenset(range(10))
    history = [frozenset(range(10)), frozenset(range(9)), frozenset(range(5)), frozenset({20, 21})]
    assert [rules.jaccard(new, old) for old in history] == pytest.approx([1.0, 0.9, 0.5, 0.0])
    assert rules.diversity(new, history) == pytest.approx(0.5, abs=1e-6)


def test_diversity_at_its_ends() -> None:
    question = frozenset({1, 2, 3})
    assert rules.diversity(question, []) == 1.0
    assert rules.diversity(question, [question] * 7) == 0.0
    assert rules.proposer_reward(0.5, rules.diversity(question, [question] * 7)) == 0.0
    exactly = frozenset({1, 2, 3, 4}), frozenset({1, 2, 3, 4, 5})  # 4 / 5, which is not above 0.8
    assert rules.diversity(exactly[0], [exactly[1]]) == 1.0
    assert rules.jaccard(frozenset(), frozenset()) == 0.0


def test_history_drops_the_oldest_and_takes_no_empty_question() -> None:
    history = [frozenset({i}) for i in range(99)]
    new = rules.remembered(history, [frozenset({200}), frozenset(), frozenset({201}), frozenset({202})])
    assert len(new) == 100
    assert (new[0], new[-1]) == (frozenset({2}), frozenset({202}))
    assert len(history) == 99, "the history given is not changed"


@pytest.mark.parametrize(
    ("question", "answer", "broken"),
    [
        ("What is 2 + 5?", "7", []),
        ("", "7", ["missing"]),
        ("What is 2 + 5?", "", ["missing"]),
        ("x", "x = 7", ["question in answer"]),
        ("Show \\boxed{3} + 4", "7", ["box"]),
        ("Is it 7?", "7", ["answer in question"]),
        ("Take 17 from 24", "7", ["answer in question"]),
        ("\\boxed{7}", "7", ["box", "answer in question"]),
    ],
)
def test_gates(question: str, answer: str, broken: list[str]) -> None:
    assert rules.failed_gates(Proposal(question, answer)) == broken


@pytest.mark.parametrize(
    ("question", "answer", "given_away"),
    [
        ("Take 17 from 24", "7", False),
        ("Take 7 from 14", "7", True),
        ("Round 7.5", "7", False),
        ("Is it 7.5?", "7.5", True),
        ("Is x + 1 prime?", "x + 1", True),  # no number: a substring, as in the paper
    ],
)
def test_whole_numbers(question: str, answer: str, given_away: bool) -> None:
    assert bool(rules.failed_gates(Proposal(question, answer), "tokens")) == given_away
    assert rules.failed_gates(Proposal(question, answer), "off") == []


@pytest.mark.parametrize(
    ("text", "question", "answer"),
    [
        ("<problem> 1 + 1? </problem><answer>so \\boxed{2}</answer>", "1 + 1?", "2"),
        ("<think><problem>a</problem>\\boxed{1}</think><problem>b</problem>\\boxed{2}", "b", "2"),
        ("<think></think><problem>a</problem>x</think><problem>b</problem>\\boxed{2}", "b", "2"),
        ("<problem>a</problem><problem>b</problem>\\boxed{1}\\boxed{\\frac{1}{2}}", "a", "\\frac{1}{2}"),
        ("<problem>a</problem>", "a", ""),
        ("<problem>a \\boxed{3}", "", "3"),
        ("<problem>a</problem>\\boxed{1} and \\boxed{2", "a", ""),  # cut off: no answer, as in the evaluation
        ("nothing", "", ""),
        ("<problem>a</problem>\\boxed{1} or \\boxed{2} or \\boxed{1}", "a", "1"),
        ("<problem>a</problem>\\boxed{}", "a", ""),
        ("</problem><problem>a", "", ""),
    ],
)
def test_blocks(text: str, question: str, answer: str) -> None:
    assert rules.parse_blocks(text) == Proposal(question, answer)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "piece", ["\\boxed{", "\\boxed{}", "\\boxed{a ", "{", "}", "<problem>", "</problem>", "</think>"]
)
def test_hostile_proposals(piece: str) -> None:
    """Each would take minutes or hours where time grows with the square of the length."""
    assert rules.parse_blocks(piece * 100_000 + "<problem>a").answer == ""
    assert rules.parse_blocks("\\boxed{" * 100_000 + "7" + "}" * 100_000) == Proposal("", "7")


@pytest.mark.parametrize(
    ("text", "question", "answer"),
    [
        ('How many?\n{"steps": [\n"1+1=2"],\n"answer": 2}', "How many?", "2"),
        ('How many?\n{"steps": ["1+1=2"], "answer": 2', "How many?", ""),
        ('{"steps": [], "answer": 2}', "", "2"),
        ("How many?", "How many?", ""),
    ],
)
def test_json(text: str, question: str, answer: str) -> None:
    assert rules.parse_json(text) == Proposal(question, answer)


@pytest.mark.parametrize(
    ("passes", "rewards", "reason"),
    [
        ([0.0, 0.2, 1.0], [0, 0, 0.3], "pass rates"),
        ([0.5, 0.5], [0.8, 0.8], "advantages"),
        ([0.5, 0.0], [0.8, 0.0], None),
    ],
)
def test_skip(passes: list[float], rewards: list[float], reason: str | None) -> None:
    assert rules.skipped(passes, rewards) == reason


def test_circular_order() -> None:
    items = [Proposal(str(i), "a") for i in range(5)]
    taken, start = [], 0
    for _ in range(4):
        found, start = rules.circular(items, start, 3)
        taken += [int(p.question) for p in found]
    assert taken == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert rules.circular(items[:2], 0, 6) == (items[:2], 0), "each of a small buffer once"


def test_offline_phases() -> None:
    """3 Proposer updates (skipped rounds do not count), then 2 Solver rounds, and again."""
    phase, players = Phase(), []
    for updated in (True, False, True, True, False, False, True):
        players.append(phase.player)
        phase = rules.next_phase(phase, updated, 3, 2)
    assert players == ["proposer"] * 4 + ["solver"] * 2 + ["proposer"]
    assert phase == Phase("proposer", 1)


def test_offline_without_solver() -> None:
    phase = Phase()
    for _ in range(5):
        phase = rules.next_phase(phase, True, 2, 0)
        assert phase.player == "proposer"
