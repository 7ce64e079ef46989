"""Faithfulness as a reward: the sandbox's two rules, and the judge behind an endpoint."""

from __future__ import annotations

import json

import pytest

from tests.annotate.test_annotate_endpoint import chat, server  # noqa: F401 - a fixture
from trl_ext.rewards import RewardError, make_reward
from trl_ext.rewards.consistency import steps_consistent, steps_true


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def reply(steps: list[str], answer: object) -> list[dict[str, str]]:
    return said(json.dumps({"steps": steps, "answer": answer}))


@pytest.mark.parametrize(
    ("completion", "consistent", "true"),
    [
        (reply(["3+4=7", "7*2=14"], 14), 1.0, 1.0),
        (reply(["3+4=7", "7*2=14"], 7), 0.0, 1.0),
        (reply(["3+4=8", "8*2=16"], 16), 1.0, 0.5),  # wrong but consistent
        (reply(["3+4=8", "then double it", "8*2=17"], 17), 1.0, 0.0),
        (reply([], 7), 0.0, None),
        (reply(["so it is seven"], 7), 0.0, None),
        (reply(["2-5=-3"], -3), 1.0, 1.0),
        (reply(["3 + 4 = 07"], 7), 1.0, 1.0),
        (reply(["9" * 40 + "+1=2", "(((1=1"], 1), 1.0, 0.0),  # what the calculator refuses is not true
        (said('{"steps": ["3+4=7"], "answer": 7'), None, None),
        (said("7"), None, None),
    ],
)
def test_rules(completion, consistent, true):
    assert steps_consistent(completions=[completion]) == [consistent]
    assert steps_true(completions=[completion]) == [true]


def test_rules_are_in_the_table_and_read_no_column():
    both = [reply(["1+1=2"], 2), said("no")]
    assert make_reward("steps_consistent")(completions=both) == [1.0, None]
    assert make_reward("steps_true")(completions=both) == [1.0, None]


def judged(server, **settings):  # noqa: F811
    return make_reward("judge_consistent", {"base_url": server.url, "model": "m", "retries": 0} | settings)


ASKED = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]]


def test_the_judge_sees_question_and_reply(server):  # noqa: F811
    server.reply = lambda n, body: (200, chat("Yes."))
    assert judged(server)(prompts=ASKED, completions=[said("two and two, so 4")]) == [1.0]
    (body,) = server.bodies
    system, user = body["messages"]
    assert "YES" in system["content"] and "How many?" in user["content"] and "two and two, so 4" in user["content"]
    assert body["max_tokens"] == 16 and body["temperature"] == 0


@pytest.mark.parametrize(
    ("answer", "verdict"), [("YES", 1.0), (" **no**", 0.0), ("No, it says 5", 0.0), ("Nothing", None), ("", None)]
)
def test_verdicts(server, answer, verdict):  # noqa: F811
    """What cannot be read is not applicable; the second completion keeps the reward from abstaining on all."""
    server.reply = lambda n, body: (200, chat("YES" if "known" in body["messages"][1]["content"] else answer))
    found = judged(server)(prompts=["q", "q"], completions=[said("other"), said("known")])
    assert found == [verdict, 1.0]


def test_a_broken_judge_is_an_error(server):  # noqa: F811
    server.reply = lambda n, body: (500, "no")
    with pytest.raises(RewardError, match="all 1 requests of a batch failed"):
        judged(server)(prompts=["q"], completions=[said("a")])
    with pytest.raises(ValueError, match=r"unknown endpoint field modle; it has api_key_env"):
        judged(server, modle="x")
