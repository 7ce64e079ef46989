"""PasoDoble's rounds with scripted players: who is updated, what is remembered, what is written, and the diary."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from trl_ext.loops import LoopError, make_loop
from trl_ext.loops.diary import Diary
from trl_ext.loops.pasodoble import Game, State
from trl_ext.loops.rules import Phase, Proposal
from trl_ext.loops.settings import PasoDoble


def text(question: str, answer: str = "77") -> str:
    return f"<problem>{question}</problem>\\boxed{{{answer}}}"


class Scripted:
    """Proposes the given texts; a question "p..." is answered right with the share that its verdicts say."""

    def __init__(self, verdicts: dict[str, Sequence[float]]) -> None:
        self.verdicts, self.texts, self.updates, self.asked = verdicts, [""], 0, []
        self.game: Game | None = None
        self.questions = 6

    def propose(self, row: dict[str, Any]) -> dict[str, Any]:
        self.rewards = self.game.judge(self.texts)
        return {}

    def answer(self, questions: Sequence[Proposal]) -> tuple[dict[str, Any], torch.Tensor]:
        self.asked.append([q.question for q in questions])
        rows = [self.verdicts[q.question] for q in questions]
        return {"questions": [q.question for q in questions]}, torch.tensor(rows)

    def update_proposer(self, batch: dict[str, Any]) -> None:
        self.updates += 1

    def kept(self, batch: dict[str, Any], keep: Sequence[bool]) -> list[str]:
        return [q for q, k in zip(batch["questions"], keep, strict=True) if k]

    def token_ids(self, text: str) -> frozenset[int]:
        return frozenset(map(ord, text))


def made(verdicts: dict[str, Sequence[float]], **settings: Any) -> tuple[Game, Scripted, dict[str, list[float]], list]:
    players, told, written = Scripted(verdicts), {}, []
    game = Game(
        PasoDoble(**settings), players, lambda name, value: told.setdefault(name, []).append(value), written.extend
    )
    players.game = game
    return game, players, told, written


HALF, NONE, ALL, THIRD = [1.0, 1, 1, 0, 0, 0], [0.0] * 6, [1.0] * 6, [1.0, 1, 0, 0, 0, 0]


def test_online_round() -> None:
    game, players, told, written = made({"abc": HALF, "def": NONE, "ghi": ALL, "jkl 77": THIRD})
    players.texts = [text("abc"), text("def"), text("ghi"), text("jkl 77"), text("mno", ""), "nothing"]
    assert game.play({}) == ["abc"], "the only question with 0.2 < p < 1 that gives nothing away"
    assert players.asked == [["abc", "def", "ghi", "jkl 77"]], "a question without an answer is not asked"
    assert players.rewards == pytest.approx([0.6 + 0.2, 0, 0.1 + 0.2, 0, 0, 0])
    assert players.updates == 1
    assert [e["gates"] for e in written] == [[], [], [], ["answer in question"], ["missing"], ["missing"]]
    assert [e["verdicts"] for e in written] == [HALF, NONE, ALL, THIRD, [], []]
    assert [e["pass_rate"] for e in written] == pytest.approx([1 / 2, 0, 1, 1 / 3, 0, 0])
    assert [e["kept"] for e in written] == [True, False, False, False, False, False]
    expected = {
        "pass_rate": 1.5 / 6,
        "pass_rate_raw": (1.5 + 1 / 3) / 6,
        "complete": 4 / 6,
        "gated": 3 / 6,
        "invalid": 4 / 6,
        "too_easy": 1 / 6,
        "valid": 2 / 6,
        "diversity": 1.0,
        "proposer_reward": 1.1 / 6,
        "solver_questions": 1,
        "skipped": 0,
        "history": 5,  # "nothing" holds no question
    }
    assert {name: values[0] for name, values in told.items()} == pytest.approx(expected)


def test_raw_filter_trains_on_a_gated_question() -> None:
    game, players, _, _ = made({"abc": HALF, "jkl 77": THIRD}, filter="raw")
    players.texts = [text("abc"), text("jkl 77")]
    assert game.play({}) == ["abc", "jkl 77"]
    assert players.rewards[1] == 0


def test_nothing_solved_changes_nothing() -> None:
    game, players, told, written = made({"abc": NONE, "def": [1.0, 0, 0, 0, 0, 0]})
    players.texts = [text("abc"), text("def")]
    assert game.play({}) is None
    assert (players.updates, game.state.history, told["skipped"]) == (0, [], [1.0])
    assert game.state.rounds == 1, "a skipped round counts"
    assert written[0]["skipped"] == "pass rates"


def test_equal_rewards_are_skipped_but_remembered() -> None:
    game, players, _, written = made({"abc": HALF, "def": HALF})
    players.texts = [text("abc"), text("def")]
    assert game.play({}) is None
    assert (players.updates, len(game.state.history), written[0]["skipped"]) == (0, 2, "advantages")


def test_too_easy_is_skipped_but_remembered() -> None:
    game, players, _, _ = made({"abc": ALL, "def": NONE})
    players.texts = [text("abc"), text("def")]
    assert game.play({}) is None
    assert len(game.state.history) == 2, "p = 1 is above tau_low"


def test_no_question_at_all() -> None:
    game, players, _, _ = made({})
    players.texts = ["a", "b"]
    assert game.play({}) is None
    assert players.asked == []


def test_a_question_competes_with_earlier_rounds_alone() -> None:
    game, players, _, written = made({"abc": HALF, "xyz": NONE})
    players.texts = [text("abc"), text("abc"), text("xyz")]
    game.play({})
    assert [e["diversity"] for e in written] == [1, 1, 1]
    game.play({})
    assert [e["diversity"] for e in written[3:]] == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert players.rewards == pytest.approx([0.6 + 0.2 / 3, 0.6 + 0.2 / 3, 0])
    players.texts = [text("abc")] * 3
    for _ in range(40):
        game.play({})
    assert len(game.state.history) == 100
    assert players.rewards == [0, 0, 0], "the whole history is this question"


def test_offline_blocks() -> None:
    game, players, told, written = made(
        {"abc": HALF, "def": THIRD, "ghi": ALL}, schedule="offline", proposer_updates=2, solver_rounds=2
    )
    players.texts, players.questions = [text("abc"), text("def"), text("ghi")], 3
    assert [game.play({}), game.play({})] == [None, None]
    assert players.updates == 2
    assert [p.question for p in game.state.buffer] == ["abc", "def"] * 2
    players.verdicts = {"abc": ALL, "def": THIRD}
    assert game.play({}) == ["def"]  # abc, def, abc
    assert game.state.next_question == 3
    assert game.play({}) == ["def", "def"]  # def, then abc, def round the end
    assert (players.updates, game.state.phase) == (2, Phase("proposer", 0))
    assert [e["player"] for e in written] == ["proposer"] * 6 + ["solver"] * 6
    assert told["buffer_pass_rate"] == pytest.approx([7 / 9, 5 / 9])
    players.verdicts = {"abc": ALL, "def": NONE, "ghi": NONE}
    game.play({})
    assert len(game.state.buffer) == 4, "a skipped round adds nothing"


def test_offline_skip_is_decided_anew_for_each_batch() -> None:
    game, players, _, _ = made({"abc": HALF, "d": NONE}, schedule="offline", proposer_updates=1, solver_rounds=2)
    players.texts, players.questions = [text("abc"), text("d")], 1
    game.play({})
    players.verdicts = {"abc": ALL}
    assert game.play({}) is None
    players.verdicts = {"abc": HALF}
    assert game.play({}) == ["abc"]


def test_state_survives() -> None:
    state = State(3, [frozenset({1, 5})], [Proposal("q", "a")], 1, Phase("solver", 2))
    assert State.loaded(json.loads(json.dumps(state.saved()))) == state


def test_diary_rewinds(tmp_path: Path) -> None:
    diary = Diary(tmp_path)
    diary.rewind(0)
    question = "é\u2028a\u2029b\x85c\x0c\r\n"  # str.splitlines() splits at all of these
    diary.write([{"round": 0, "question": question}, {"round": 1}])
    diary.write([{"round": 2}])
    with diary.path.open("a") as file:
        file.write('{"round": 2, "que')
    diary.rewind(2)
    with diary.path.open(encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == [{"round": 0, "question": question}, {"round": 1}]


def test_diary_that_cannot_be_rewound_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diary = Diary(tmp_path)
    diary.write([{"round": 0}, {"round": 1}])
    before = diary.path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        diary.rewind(1)
    assert diary.path.read_bytes() == before


def test_settings_from_a_recipe() -> None:
    assert make_loop(None) is None
    assert make_loop("pasodoble") == PasoDoble()
    assert make_loop({"pasodoble": {"tau_low": "0.1", "schedule": "offline"}}) == PasoDoble("offline", 0.1)
    with pytest.raises(LoopError, match="did you mean 'pasodoble'"):
        make_loop("pasodobel")
    with pytest.raises(LoopError, match="pasodoble: schedule: 'both' is not one of online, offline"):
        make_loop({"pasodoble": {"schedule": "both"}})
