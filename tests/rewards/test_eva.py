"""EVA's rewards: the card's numbers, what the judge may see, and that guessing cannot pay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from trl_ext.rewards import make_rewards
from trl_ext.rewards.eva import choice_reward, eva_rewards, evidence, format_reward, rouge_mean

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which? A) x B) y C) z D) w"}]


def call(evidence_text: str) -> list[dict[str, Any]]:
    tool = {"type": "function", "function": {"name": "look", "arguments": {}}}
    return [
        {"role": "assistant", "content": "secret thought", "tool_calls": [tool]},
        {"role": "tool", "name": "look", "content": evidence_text},
    ]


def say(letter: str) -> dict[str, Any]:
    return {"role": "assistant", "content": f"Answer: {letter}"}


class Judge:
    """Answers B where the evidence says so, else A; keeps what it was shown."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def __call__(self, conversations: list[list[dict[str, str]]]) -> Sequence[str | None]:
        texts = [turns[-1]["content"] for turns in conversations]
        self.shown += texts
        return ["Answer: B" if "it is y" in text else "Answer: A" for text in texts]


def score(completions: list[Any], golds: list[str], kinds: list[str] | None = None, **settings: Any) -> list[list]:
    judge = Judge()
    columns = {"answer": golds, "question_kind": kinds or ["choice"] * len(golds)}
    given = {"prompts": [QUESTION] * len(golds), "completions": completions, **columns}
    return [reward(**given) for reward in eva_rewards(judge, **settings)] + [judge.shown]


def test_the_cards_rewards() -> None:
    completions = [
        [*call("it is y"), say("B")],  # right, judge right
        [*call("nothing here"), say("B")],  # right, judge wrong, a tool was called
        [say("B")],  # right, judge wrong, no tool
        [*call("it is y"), say("C")],  # wrong, a tool was called
        [say("C")],  # wrong, no tool
    ]
    accuracy, form, _ = score(completions, ["B"] * 5)
    assert accuracy == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert form == [0.0, 0.05, 0.0, 0.05, 0.0]
    assert [a + f for a, f in zip(accuracy, form, strict=True)] == [1.0, 0.05, 0.0, 0.05, 0.0]


def test_the_table_of_both() -> None:
    assert [choice_reward(r, j) for r in (True, False) for j in (True, False)] == [1, 0, 0, 0]
    assert [format_reward(a, t) for a in (1.0, 0.0) for t in (True, False)] == [0, 0, 0.05, 0]


def test_the_judge_sees_the_question_and_the_last_evidence_alone() -> None:
    completion = [*call("first round"), *call("it is y"), *call("it is y, again")[1:], say("B")]
    accuracy, _, shown = score([completion], ["B"])
    assert accuracy == [1.0]
    (text,) = shown  # asked once, for both rewards
    assert "Which? A) x" in text and "it is y\nit is y, again" in text
    assert not any(hidden in text for hidden in ("first round", "secret thought", "Answer: B", "Be brief"))


def test_the_judge_is_asked_about_right_answers_alone() -> None:
    assert score([[*call("it is y"), say("C")], [say("D")]], ["B", "B"])[2] == []


def test_a_judge_without_a_verdict_confirms_nothing() -> None:
    accuracy, _ = eva_rewards(lambda asked: [None] * len(asked))
    given = {"prompts": [QUESTION], "completions": [[*call("it is y"), say("B")]]}
    assert accuracy(**given, answer=["B"], question_kind=["choice"]) == [0.0]


def test_evidence() -> None:
    assert evidence("plain text") == evidence([say("A")]) == ""
    blocks = [{"type": "image"}, {"type": "text", "text": "frame 7"}]
    assert evidence([{"role": "tool", "content": blocks}, say("A")]) == "frame 7"


def test_open_answers_are_the_mean_of_three_rouges(monkeypatch: pytest.MonkeyPatch) -> None:
    """the cat sat / the cat ran: 2 of 3 words, 1 of 2 pairs, a common subsequence of 2: (2/3 + 1/2 + 2/3) / 3."""
    assert rouge_mean("the cat sat", "the cat ran") == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert rouge_mean("the cat sat", "the cat sat") == 1.0 and rouge_mean("dog", "cat") == rouge_mean("", "cat") == 0.0
    accuracy, form, shown = score(
        [[*call("x"), {"role": "assistant", "content": "the cat sat"}]], ["the cat ran"], ["open"]
    )
    assert accuracy == [pytest.approx(11 / 18)] and form == [None] and shown == []


def test_the_cards_open_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROUGE 0.6, 0.4 and 0.5 give 0.5."""
    from trl_ext.rewards import eva

    class Scorer:
        def score(self, target: str, prediction: str) -> dict[str, Any]:
            values = zip(eva.ROUGE, (0.6, 0.4, 0.5), strict=True)
            return {name: type("Score", (), {"fmeasure": value}) for name, value in values}

    monkeypatch.setattr(eva, "_scorer", Scorer)
    assert rouge_mean("a", "b") == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "value", "fits"), [(4, 0.05, True), (4, 0.25, False), (5, 0.2, False), (5, 0.19, True)]
)
def test_a_format_reward_must_stay_below_chance(options: int, value: float, fits: bool) -> None:
    """Never right, always a tool: `value`; an honest guess: 1 / options."""
    if fits:
        _, form, _ = score([[*call("x"), say("C")]], ["B"], options=options, format=value)
        assert form == [value] and value < 1 / options
        return
    with pytest.raises(ValueError, match="the chance level of"):
        eva_rewards(Judge(), options, value)


def test_in_a_recipe() -> None:
    endpoint = {"base_url": "http://localhost:8000/v1", "model": "judge"}
    names = [reward.__name__ for reward in make_rewards("eva", endpoint)]
    assert names == ["eva_accuracy", "eva_format"]
    with pytest.raises(ValueError, match="chance level of 4 options"):
        make_rewards("eva", endpoint | {"format": 0.3})
    with pytest.raises(ValueError, match="unknown endpoint field"):
        make_rewards("eva", endpoint | {"modle": "x"})
