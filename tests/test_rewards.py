"""Rewards: the check around each, the table, and the mathematics reward over the evaluation's grader."""

from __future__ import annotations

import asyncio
import functools
import math
import warnings

import pytest
import torch

from trl_ext.rewards import REWARDS, RewardError, checked, make_reward
from trl_ext.rewards.checked import PATIENCE, columns_of, unchecked
from trl_ext.rewards.math import make_math_correct

LONG = "x" * 500


def returns(values: object):
    def reward(completions: list, **kwargs: object) -> object:
        return values

    return reward


def test_a_good_reward_passes_as_it_is_and_keeps_its_name() -> None:
    def my_reward(prompts: list, completions: list, answer: list, **kwargs: object) -> list:
        return [1, None, torch.tensor(0.5), True]

    wrapped = checked(my_reward)
    result = wrapped(prompts=["p"] * 4, completions=list("abcd"), completion_ids=[[1]] * 4, answer=list("abcd"))
    assert result == [1.0, None, 0.5, 1.0]
    assert wrapped.__name__ == "my_reward"
    assert columns_of(wrapped) == [("answer",)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "returned 1 values for 2 completions"),
        ([1.0, math.nan], "gave nan for row 1"),
        ([math.inf, 1.0], "gave inf for row 0"),
        ([1.0, "good"], "gave 'good', which is no number for row 1"),
        ([1.0, 1j], "no number for row 1"),
        (0.5, "returned float, not a list"),
        ("12", "returned str, not a list"),
        (None, "returned NoneType, not a list"),
    ],
)
def test_a_bad_result_names_function_row_and_completion(values: object, message: str) -> None:
    with pytest.raises(RewardError, match="reward 'reward'") as caught:
        checked(returns(values))(completions=["first", LONG])
    assert message in str(caught.value)
    assert "x" * 201 not in str(caught.value), "at most 200 characters of a completion"
    if "row 1" in message:
        assert "x" * 200 in str(caught.value)


def test_a_reward_that_raises_names_itself_and_keeps_its_cause() -> None:
    def broken(completions: list, **kwargs: object) -> list:
        raise KeyError("gold")

    with pytest.raises(RewardError, match="reward 'broken' raised KeyError: 'gold'") as caught:
        checked(broken)(completions=[[{"role": "assistant", "content": "hello"}]])
    assert isinstance(caught.value.__cause__, KeyError)
    assert "'hello'" in str(caught.value)


def test_none_for_a_whole_batch_is_refused_where_the_column_is_missing() -> None:
    reward = make_reward("math_correct")
    with pytest.raises(
        RewardError, match=r"'math_correct' returned None .* lacks the column it reads: answer or solution"
    ):
        reward(completions=["a", "b"], problem=["1", "2"])


def test_a_batch_may_hold_no_row_of_a_reward() -> None:
    """Of a mixed data set, on one process, in the first batches, or after a restart; said once if it goes on."""
    reward, other = make_reward("math_correct"), make_reward("math_correct")
    none = {"completions": ["a", "b"], "answer": [None, None]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(PATIENCE - 1):
            assert reward(**none) == other(**none) == [None, None]
        assert reward(completions=["a", "4"], answer=[None, "4"]) == [None, 1.0]
        for _ in range(2 * PATIENCE):
            assert reward(**none) == [None, None]
    with pytest.warns(UserWarning, match=r"first 10 batches.*stands in answer or solution be read.*`columns`"):
        other(**none)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other(**none)


def test_unchecked_takes_off_our_wrapper_alone() -> None:
    def mine(completions: list, **kwargs: object) -> list:
        return [None, None]

    @functools.wraps(mine)
    def timed(completions: list, **kwargs: object) -> list:
        return [0.5, 0.5]

    ours = checked(timed)
    assert unchecked(ours) is timed and unchecked(timed) is timed and unchecked(mine) is mine

    @functools.wraps(ours)
    def around(completions: list, **kwargs: object) -> list:
        return [1.0, 1.0]

    assert unchecked(around) is around and unchecked(checked(around)) is around


def test_an_async_reward_stays_async_and_is_checked() -> None:
    async def later(completions: list, **kwargs: object) -> list:
        return [math.nan]

    wrapped = checked(later)
    assert asyncio.iscoroutinefunction(wrapped)
    with pytest.raises(RewardError, match="'later' gave nan"):
        asyncio.run(wrapped(completions=["a"]))


def test_the_table() -> None:
    skipped = ("get_cosine_scaled_reward", "get_repetition_penalty_reward")  # TRL's, these take settings
    need_settings = (
        "rl_struct",
        "rl_struct_struct",
        "json_schema",
        "tool_call_format",
        "text_format",
        "reward_ensemble",
        "judge_consistent",
        "eva",
    )
    for name in set(REWARDS) - set(skipped):
        if name in need_settings:
            with pytest.raises(ValueError, match=r"missing a required argument|name either|at least two members"):
                make_reward(name)
        else:
            assert callable(make_reward(name))
    repetition = make_reward("get_repetition_penalty_reward", {"ngram_size": 2, "max_penalty": -1.0})
    # bigrams of 1 1 1: (1 1), (1 1); one of two is new, so half of the penalty
    assert repetition(completions=["a a a"], completion_ids=[[1, 1, 1]]) == [-0.5]
    with pytest.raises(ValueError, match=r"unexpected keyword argument 'ngram'.*ngram_size"):
        make_reward("get_repetition_penalty_reward", {"ngram": 2})


def test_a_dotted_name_with_settings_is_called_with_them() -> None:
    reward = make_reward("tests.test_rewards.scaled", {"factor": 3})
    assert reward.__name__ == "scaled"
    assert reward(completions=["a", "bb"]) == [3.0, 6.0]
    assert columns_of(reward) == []
    with pytest.raises(ValueError, match="is not a function"):
        make_reward("math.pi")


def scaled(completions: list, factor: float = 1.0, **kwargs: object) -> list[float]:
    return [factor * len(text) for text in completions]


def test_math_correct_reads_either_column_and_leaves_rows_without_gold_out() -> None:
    reward = make_math_correct()
    chat = [[{"role": "assistant", "content": r"\boxed{4}"}], [{"role": "assistant", "content": "five\nor so"}], "4"]
    assert reward(chat, answer=["4", "5", None]) == [1.0, 0.0, None]
    assert reward(chat, solution=["2+2. #### 4", r"\boxed{5}", ""]) == [1.0, 0.0, None]
    assert reward(chat) == [None, None, None]
    assert columns_of(reward) == [("answer", "solution")]
    with pytest.raises(ValueError, match="seconds must be above 0"):
        make_math_correct(seconds=0)
