"""`sandbox_json` is graded as the sandbox's own reward grades, on real, wrong and mangled replies."""

import json
import random

from evals.task import Source
from evals.tasks import TASKS
from trl_ext.sandbox import problems, slips, tasks
from trl_ext.sandbox.rewards import answer_correct, parse_reply

TASK = TASKS["sandbox_json"]


def mangled(text: str, rng: random.Random) -> str:
    """One random edit: drop, double, swap or replace a character, or wrap the text."""
    i = rng.randrange(len(text))
    extra = rng.choice('{}[]",:0123456789 \n\\aA-.eE`NaN')
    return rng.choice(
        [
            text[:i] + text[i + 1 :],
            text[:i] + text[i] + text[i:],
            text[:i] + extra + text[i:],
            text[:i] + extra + text[i + 1 :],
            text[:i],
            text + extra,
            text.replace('"answer"', '"steps"'),
            text.replace("}", ', "more": 1}'),
        ]
    )


def test_same_verdict_as_the_reward_on_thousands_of_replies() -> None:
    rng = random.Random(0)
    stream = problems_of(rng)
    items = TASK.load(Source(limit=200))
    verdicts: dict[tuple[bool, bool], int] = {}
    for item, problem in zip(items * 20, stream * 20, strict=True):
        text = slips.sloppy(problem, rng, wrong=0.4, malformed=0.3)
        for _ in range(rng.choice((0, 0, 1, 2))):
            text = mangled(text, rng) if text else text
        scores = TASK.grade(item, text).scores
        valid = parse_reply(text) is not None
        right = answer_correct([text], [str(item.gold["answer"])]) == [1.0]
        raw = scores["json_validity_raw"] == 1
        if not raw:  # the reward wants bare JSON; the headline forgives one fence around it
            assert not valid, text
            continue
        assert (scores["schema_valid"] == 1) == (valid or _whole_float(text)), text
        if not _whole_float(text):
            assert (scores["valid_and_correct"] == 1) == right, text
        key = (valid, right)
        verdicts[key] = verdicts.get(key, 0) + 1
    assert all(verdicts[key] > 100 for key in ((True, True), (True, False), (False, False))), verdicts


def problems_of(rng: random.Random) -> list[problems.Problem]:
    """The problems behind the first 200 test rows: a row keeps no problem, its stream does."""
    stream = tasks.problems(random.Random("problems/test/0"), "test")
    return [next(stream) for _ in range(200)]


def _whole_float(text: str) -> bool:
    """4.0 and 4e0 are integers to JSON Schema, and none to the reward."""
    try:
        answer = json.loads(text).get("answer")
    except (ValueError, AttributeError):
        return False
    return isinstance(answer, float) and answer.is_integer()


def test_the_differences_that_are_left() -> None:
    item = TASK.load(Source(limit=1))[0]
    answer = item.gold["answer"]
    whole_float = json.dumps({"steps": [], "answer": float(answer)})
    long = json.dumps({"steps": ["x" * 2000], "answer": answer})
    surrogate = f'{{"steps": ["\\ud800"], "answer": {answer}}}'
    for text, reward, ours in ((whole_float, False, 1), (long, False, 1), (surrogate, True, 0)):
        assert (parse_reply(text) is not None) == reward
        assert TASK.grade(item, text).scores["valid_and_correct"] == ours


def test_a_fence_is_forgiven_but_not_in_the_raw_metric() -> None:
    item = TASK.load(Source(limit=1))[0]
    fenced = f"```json\n{json.dumps(item.gold)}\n```"
    assert parse_reply(fenced) is None
    scores = TASK.grade(item, fenced).scores
    assert (scores["json_validity_raw"], scores["valid_and_correct"], scores["format_consistency"]) == (0, 1, 0)


def test_limits_of_the_reward_are_in_the_schema() -> None:
    item = TASK.load(Source(limit=1))[0]
    for value in (
        {"steps": ["a"] * 17, "answer": 1},
        {"steps": [], "answer": 10**9},
        {"steps": [1], "answer": 1},
        {"steps": [], "answer": True},
        {"steps": [], "answer": "1"},
        {"steps": []},
        [1],
    ):
        text = json.dumps(value)
        assert parse_reply(text) is None
        assert TASK.grade(item, text).scores["schema_valid"] == 0
    for value in ({"steps": ["a"] * 16, "answer": 1}, {"steps": [], "answer": 10**9 - 1}):
        assert parse_reply(json.dumps(value)) is not None
        assert TASK.grade(item, json.dumps(value)).scores["schema_valid"] == 1


def test_prompts_and_golds_are_the_sandbox_s_own() -> None:
    rows = tasks.rows("math", 50, 3, "test")
    items = TASK.load(Source(limit=50, seed=3))
    assert [item.messages for item in items] == [row["prompt"] for row in rows]
    assert [str(item.gold["answer"]) for item in items] == [row["answer"] for row in rows]
    assert all(TASK.grade(i, r["solution"]).scores["content_f1"] == 1 for i, r in zip(items, rows, strict=True))
