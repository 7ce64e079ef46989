"""Win rates, filters, replay: the card's worked numbers (DNO, arXiv 2404.03715) and the edges."""

from __future__ import annotations

import random

import pytest
import torch

from trl_ext.loops.pairs import (
    Rubric,
    all_pairs,
    best_worst,
    chosen_pairs,
    contradicted,
    losing,
    repeats,
    replay_counts,
    replayed,
    rubric_pairs,
    self_play_rewards,
    type_counts,
    wins_of_members,
    wins_of_scores,
)

P = torch.tensor([[0.5, 0.8, 0.6, 0.9], [0.2, 0.5, 0.7, 0.6], [0.4, 0.3, 0.5, 0.75], [0.1, 0.4, 0.25, 0.5]])


def test_win_rates():
    expected = [0.766667, 0.500000, 0.483333, 0.250000]
    assert self_play_rewards(P).tolist() == pytest.approx(expected, abs=1e-6)
    for bad in (torch.tensor([[0.5]]), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="square matrix of at least 2"):
            self_play_rewards(bad)


def test_a_cycle_has_no_preference():
    """Rock, paper, scissors."""
    cycle = torch.tensor([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]])
    assert self_play_rewards(cycle).tolist() == [0.5, 0.5, 0.5]
    assert chosen_pairs("all", None, cycle, None, Rubric()) == []
    assert chosen_pairs("best_worst", None, cycle, None, Rubric()) == []


def test_wins_of_scores():
    wins = wins_of_scores([2, 1, None, 2])
    assert wins.tolist() == [[0.5, 1, 0.5, 0.5], [0, 0.5, 0.5, 0], [0.5] * 4, [0.5, 1, 0.5, 0.5]]
    assert torch.equal(wins + wins.T, torch.ones(4, 4))
    assert self_play_rewards(wins)[0].item() == pytest.approx(2 / 3)


def test_wins_of_members():
    """Two members, gaps 1 and -3 of replies 0 and 1: (sigmoid(1) + sigmoid(-3)) / 2 = (0.731059 + 0.047426) / 2."""
    scores = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    wins = wins_of_members(scores)
    assert wins[0, 1].item() == pytest.approx(0.389242, abs=1e-6)
    assert torch.allclose(wins + wins.T, torch.ones(2, 2).double())
    assert wins_of_members(scores, temperature=1e-3)[0, 1].item() == pytest.approx(0.5)  # a vote each
    abstains = torch.tensor([[1.0, 0.0], [float("nan"), 3.0]])
    assert wins_of_members(abstains)[0, 1].item() == pytest.approx(0.731059, abs=1e-6)
    assert wins_of_members(torch.full((2, 2), float("nan")))[0, 1].item() == 0.5


def test_rubric_of_the_card():
    """Teacher 6, students 5, 5, 4, 2, 3: 3 pairs of the teacher, 6 of the students, none with a positive below 5."""
    scores = [6, 5, 5, 4, 2, 3]
    found = rubric_pairs(scores, 0, Rubric())
    assert sorted(found) == [(0, 3), (0, 4), (0, 5), (1, 3), (1, 4), (1, 5), (2, 3), (2, 4), (2, 5)]
    pairs = chosen_pairs("rubric", scores, wins_of_scores(scores), 0, Rubric())
    assert type_counts(pairs) == {"teacher>student": 3, "student>teacher": 0, "student>student": 6}
    # r_t: 6 beats all five; 5 beats three, ties one: 3.5/5
    assert pairs[0].win_margin == pytest.approx(1.0 - 0.4)
    assert [p.win_margin for p in pairs if (p.chosen, p.rejected) == (1, 4)] == [pytest.approx(0.7)]


def test_rubric_edges():
    assert rubric_pairs([5, 5, 5], None, Rubric()) == []
    assert rubric_pairs([4, 1], None, Rubric()) == []  # no positive
    assert rubric_pairs([None, 6, 1], None, Rubric()) == [(1, 2)]
    assert rubric_pairs([5, 6], 0, Rubric()) == [(1, 0)]  # a student that beats the teacher by 1
    assert rubric_pairs([6, 5], 0, Rubric()) == []  # the teacher needs 2
    assert type_counts(chosen_pairs("rubric", [5, 6], wins_of_scores([5, 6]), 0, Rubric()))["student>teacher"] == 1
    assert rubric_pairs([5, 5], None, Rubric(5, 0, 0)) == []  # equal replies are no pair, whatever the margin
    with pytest.raises(ValueError, match="use all or best_worst"):
        chosen_pairs("rubric", None, P, None, Rubric())


def test_an_ensemble_whose_mean_score_contradicts_its_win_rate():
    """Members [9, 0], [0, 3], [0, 3]: means 3 and 2, but r = (sigmoid(9) + 2 sigmoid(-3)) / 3 = 0.364909 and 0.635091."""
    members = torch.tensor([[9.0, 0.0], [0.0, 3.0], [0.0, 3.0]])
    scores, wins, rubric = members.mean(0).tolist(), wins_of_members(members), Rubric(3, 1, 1)
    assert rubric_pairs(scores, None, rubric) == [(0, 1)]
    assert self_play_rewards(wins).tolist() == pytest.approx([0.364909, 0.635091], abs=1e-6)
    assert chosen_pairs("rubric", scores, wins, None, rubric) == []
    assert contradicted("rubric", scores, wins, None, rubric) == 1
    assert contradicted("all", scores, wins, None, rubric) == 0
    assert contradicted("rubric", [3, 2], wins_of_scores([3, 2]), None, rubric) == 0


def test_all_and_best_worst():
    rewards = [0.2, 0.9, 0.9, 0.1]
    assert all_pairs(rewards) == [(0, 3), (1, 0), (1, 3), (2, 0), (2, 3)]
    assert best_worst(rewards) == [(1, 3)]
    assert all_pairs([0.5] * 3) == best_worst([0.5] * 3) == []


def test_automatic_negatives_lose():
    wins = losing(P, [False, True, False, True])
    assert wins[1].tolist() == [0, 0.5, 0, 0.5] and wins[3].tolist() == [0, 0.5, 0, 0.5]
    assert wins[0].tolist() == pytest.approx([0.5, 1, 0.6, 1]) and torch.allclose(
        wins + wins.T, torch.ones(4, 4).double()
    )
    assert torch.equal(losing(P, [False] * 4), P.double())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a b c d " * 6, True),  # 21 4-grams, the first one 6 times
        ("a b c d e f g h i j", False),
        ("a b c d", False),  # the only 4-gram is all of them, and none is repeated
        ("a b", False),
        ("", False),
        ("x " * 5, True),  # 2 of 2
        ("a b c d e a b c d f g h i", False),  # 2 of 10 is 20 %, not more
        ("a b c d e a b c d f g h", True),  # 2 of 9
    ],
)
def test_repeated_ngrams(text, found):
    assert repeats(text.split(), 0.2) is found


def test_replay_halves():
    assert replay_counts(100, 0.3, 4) == [30, 15, 7, 3]
    assert replay_counts(100, 0.3, 0) == [] and replay_counts(3, 0.3, 2) == [0, 0]
    newest, older = [f"n{i}" for i in range(50)], ["o0", "o1"]
    drawn = replayed([newest, older], 100, 0.3, random.Random(0))
    assert len(drawn) == 32 and drawn[30:] in (["o0", "o1"], ["o1", "o0"]) and len(set(drawn)) == 32
    assert set(drawn[:30]) < set(newest) and drawn[:30] != newest[:30]
    assert drawn == replayed([newest, older], 100, 0.3, random.Random(0))
    assert replayed([newest], 100, 0.0, random.Random(0)) == []
