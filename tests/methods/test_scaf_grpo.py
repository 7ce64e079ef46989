"""Scaf-GRPO: the ladder of trials, the swap, the card's advantages, and training under the hinted prompt."""

from __future__ import annotations

import math

import pytest
import torch
import trl

import trl_ext
from tests.methods.attempts import attempt, question, text
from tests.methods.groups import logged
from tests.methods.spy import spied
from tests.methods.training import make, train
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext.method import RunShape
from trl_ext.methods.grpo.scaf_grpo import ScafGrpo, failed, warmed_up
from trl_ext.plan import PlanError, make_plan
from trl_ext.recipe import load_recipe

TIERS = {"k": "Knowledge Hints", "s": "Solution Hints"}
NOW = {"warmup": 0.0, "columns": {"answer": "Hint"}}
LOOK = {"epo": {"coefficient": 0.0}}
"""A method that takes part in the loss and changes nothing, so that the loss can be looked into."""


def rows(*questions):
    """Two tiers of two parts each."""
    return [question(q, k=[f"{q}-k1", f"{q}-k2"], s=[f"{q}-s1", f"{q}-s2"]) for q in questions]


def with_hint(completions, prompts, **kwargs):
    """Only who has a hint is right."""
    return [float("Hint:" in prompt[-1]["content"]) for prompt in prompts]


def hint_and_letters(completions, prompts, **kwargs):
    """Below one half without a hint, above it with one, and never the same twice."""
    hints = with_hint(completions, prompts)
    return [0.5 * hint + 0.4 * letters for hint, letters in zip(hints, letters_reward(completions), strict=True)]


# Trials and swaps


def test_all_levels_of_all_failed_prompts_are_made_in_one_call():
    method = ScafGrpo(columns=TIERS)
    seen, asked = attempt([[0, 0], [0, 1], [0, 0]], rows("a", "b", "c"))
    assert method.revise(seen).swaps == {}
    ((*made,),) = asked.sampled
    assert [text(row) for row in made] == [
        f"{q}\n{label}: {parts}"
        for q in "ac"
        for label, parts in (
            ("Knowledge Hints", f"{q}-k1"),
            ("Knowledge Hints", f"{q}-k1 {q}-k2"),
            ("Solution Hints", f"{q}-s1"),
            ("Solution Hints", f"{q}-s1 {q}-s2"),
        )
    ]
    found = logged(seen.metrics)
    assert (found["failed_groups"], found["rescued"], found["rescue_rate"]) == (2, 0, 0)
    assert (found["extra_completions"], found["extra_tokens"]) == (8, 40)
    assert found["unhinted_reward"] == pytest.approx(1 / 6) and "level" not in found


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_the_lowest_level_that_succeeds_joins_the_group(level):
    """Card: a generator that succeeds from level l on -> level l, in the place of the first failed one."""
    ladder = ["q-k1", "q-k1 q-k2", "q-s1", "q-s1 q-s2"]
    good = ladder[level - 1 :]
    seen, _ = attempt([[1, 0], [0, 0]], rows("x", "q"), lambda row: float(text(row).split(": ")[1] in good))
    revision = ScafGrpo(columns=TIERS).revise(seen)
    assert revision.swaps == {(1, 0): 100 + level - 1} and revision.helped and not revision.own_prompt
    found = logged(seen.metrics)
    assert (found["level"], found["rescued"], found["rescue_rate"]) == (level, 1, 1)
    assert found["tier_knowledge_hints"] == float(level <= 2) and found["tier_solution_hints"] == float(level > 2)


def test_shares_of_tiers_and_mean_level():
    good = ("a-k1", "b-s1", "c-s1", "c-s1 c-s2")
    seen, _ = attempt(torch.zeros(4, 2), rows(*"abcd"), lambda row: float(text(row).split(": ")[1] in good))
    ScafGrpo(columns=TIERS).revise(seen)
    found = logged(seen.metrics)
    assert found["rescue_rate"] == 0.75 and found["level"] == pytest.approx((1 + 3 + 3) / 3)
    assert found["tier_knowledge_hints"] == pytest.approx(1 / 3)
    assert found["tier_solution_hints"] == pytest.approx(2 / 3)


def test_a_second_replacement_keeps_its_own_prompt():
    seen, _ = attempt(torch.zeros(1, 4), rows("q"), lambda row: 1.0)
    both = ScafGrpo(columns=TIERS, replace_num=2).revise(seen)
    assert both.swaps == {(0, 0): 100, (0, 1): 100} and both.own_prompt == {(0, 1)}
    seen, _ = attempt(torch.zeros(1, 4), rows("q"), lambda row: 1.0)
    bare = ScafGrpo(columns=TIERS, replace_hint_prompt=True).revise(seen)
    assert bare.swaps == {(0, 0): 100} and bare.own_prompt == {(0, 0)}


def test_prompts_that_are_too_long_are_left_out():
    """Level 2 has 20 more characters than tokens are allowed; level 3 is short again."""
    row = question("q", k=["k1", "k" * 20], s=["s1"])
    limit = len("q\nKnowledge Hints: k1")
    seen, asked = attempt(torch.zeros(2, 2), [row, question("z" * 40, k=["k1"])], lambda row: 1.0)
    revision = ScafGrpo(columns=TIERS, max_prompt_tokens=limit).revise(seen)
    assert [text(r) for r in asked.sampled[0]] == ["q\nKnowledge Hints: k1", "q\nSolution Hints: s1"]
    assert revision.swaps == {(0, 0): 100}
    found = logged(seen.metrics)
    assert (found["too_long"], found["no_hint"], found["rescue_rate"]) == (1, 0.5, 0.5)


def test_the_reward_that_decides():
    """Two rewards: the sum of the first group is above 0, its second reward is not; NaN is no success."""
    rewards = [[[1.0, 0.0], [1.0, math.nan]], [[0.0, 1.0], [0.0, 0.0]]]
    seen, asked = attempt(rewards, rows("a", "b"))
    ScafGrpo(columns=TIERS).revise(seen)
    assert asked.sampled == [[]]
    seen, asked = attempt(rewards, rows("a", "b"))
    ScafGrpo(columns=TIERS, reward="r1").revise(seen)
    assert {text(row)[0] for row in asked.sampled[0]} == {"a"}


def test_trigger_and_warm_up():
    rewards = torch.tensor([[0.0, 0], [0, 1], [-1, -0.5], [0.4, 0.2]])
    assert failed(rewards).tolist() == [True, False, True, False]
    assert failed(rewards, 0.4).tolist() == [True, False, True, True]
    # Card: step > warm-up; the step after k done ones is number k + 1
    assert [warmed_up(done, 50) for done in (48, 49, 50, 51)] == [False, False, True, True]
    assert [warmed_up(done, 0.15 * 20) for done in (2, 3)] == [False, True]
    assert [warmed_up(done, 0.1 * 30) for done in (2, 3)] == [False, True]  # 0.1 * 30 is not quite 3
    assert warmed_up(0, 0) and not warmed_up(19, 1.0 * 20)


@pytest.mark.parametrize("settings, first", [({}, 3), ({"warmup": 0.5}, 10), ({"warmup_steps": 7}, 7)])
def test_no_hints_before_the_warm_up_is_over(settings, first):
    for step in (first - 1, first):
        seen, asked = attempt([[0, 0]], rows("a"), lambda row: 1.0, step=step, run=RunShape(20, 2, 1))
        revision = ScafGrpo(columns=TIERS, **settings).revise(seen)
        assert (revision is not None) == bool(asked.sampled) == (step >= first)
        assert logged(seen.metrics)["failed_groups"] == 1  # counted all the same


# Training


def test_worked_example(tmp_path, monkeypatch):
    """Card: G = 8, one success: A+ 2.474174 and A- -0.353453 with TRL's epsilon 1e-4."""
    seen = spied(monkeypatch)
    trainer = train(tmp_path, {"scaf_grpo": NOW} | LOOK, rewards=with_hint, num_generations=8, max_steps=1)
    advantages = sorted(seen[0].advantages.tolist())
    assert advantages == pytest.approx([-0.353453] * 7 + [2.474174], abs=1e-6)
    g = 8
    assert advantages[-1] == pytest.approx((g - 1) / g / (1 / math.sqrt(g) + 1e-4), abs=1e-6)
    assert sum(advantages) == pytest.approx(0, abs=1e-5)
    log = trainer.state.log_history[0]
    assert log["scaf_grpo/failed_groups"] == log["scaf_grpo/rescued"] == log["scaf_grpo/level"] == 1
    assert log["scaf_grpo/tier_hint"] == log["scaf_grpo/extra_completions"] == log["scaf_grpo/rescue_rate"] == 1
    assert log["scaf_grpo/extra_tokens"] > 0 and log["scaf_grpo/no_hint"] == log["scaf_grpo/too_long"] == 0
    # What came without hints
    assert log["reward"] == log["rewards/with_hint/mean"] == log["scaf_grpo/unhinted_reward"] == 0
    assert log["frac_reward_zero_std"] == 0  # of what is trained on


def test_one_row_changes_and_its_log_probs_are_under_the_hint(tmp_path, monkeypatch):
    """Card: at the first update the ratio is 1 for all tokens of the replaced row."""
    seen = spied(monkeypatch)
    prompts_seen = []
    original = trl_ext.GRPOTrainer._calculate_rewards

    def record(self, inputs, prompts, completions, ids):
        found = original(self, inputs, prompts, completions, ids)
        prompts_seen.append(([p[-1]["content"] for p in prompts], found))
        return found

    monkeypatch.setattr(trl_ext.GRPOTrainer, "_calculate_rewards", record)
    train(tmp_path, {"scaf_grpo": NOW} | LOOK, rewards=with_hint, num_iterations=2, max_steps=1)
    shown, rewards = prompts_seen[0]
    answers = dict(zip((row["prompt"][0]["content"] for row in prompts()), prompts()["answer"], strict=True))
    for start in (0, 4):
        bare = shown[start + 1]
        assert shown[start : start + 4] == [f"{bare}\nHint: {answers[bare]}", bare, bare, bare]
    assert rewards.flatten().tolist() == [1, 0, 0, 0] * 2
    (x,) = seen
    drift = (x.mask * (x.old_logps - x.logps)).abs().max()
    assert drift < 1e-5 and x.old_logps.abs().max() > 1


def test_without_the_hint_in_the_prompt(tmp_path, monkeypatch):
    shown = []
    original = trl_ext.GRPOTrainer._calculate_rewards

    def record(self, inputs, prompts, completions, ids):
        shown.append(([p[-1]["content"] for p in prompts], original(self, inputs, prompts, completions, ids)))
        return shown[-1][1]

    monkeypatch.setattr(trl_ext.GRPOTrainer, "_calculate_rewards", record)
    train(tmp_path, {"scaf_grpo": NOW | {"replace_hint_prompt": True}}, rewards=with_hint, max_steps=1)
    contents, rewards = shown[0]
    assert not any("Hint" in content for content in contents) and rewards.flatten().tolist() == [1, 0, 0, 0] * 2


@pytest.mark.parametrize("cause", ["turn", "labels"])
def test_a_row_that_cannot_get_its_hints_is_refused_in_the_first_rollout(cause):
    """In the warm-up, and although no prompt has failed: not hours later."""
    columns = {"s": ["Plan", "Solution"]}
    good, bad = question("good", s=["1", "2"]), question("bad one", s=["1", "2", "3"])
    if cause == "turn":
        bad = {"prompt": [{"role": "system", "content": "bad one"}], "s": ["1"]}
    told = "which must be a text" if cause == "turn" else "3 hints in the column 's', for which there are 2 labels"
    seen, _ = attempt([[1, 1], [1, 1]], [good, bad], step=0)
    with pytest.raises(ValueError, match=rf"scaf_grpo: the row with the prompt .*bad one.*{told}"):
        ScafGrpo(columns=columns, warmup=0.5).revise(seen)
    empty, asked = attempt([[1, 1], [1, 1]], [good, bad | {"s": []}], step=0)
    assert ScafGrpo(columns=columns, warmup=0.5).revise(empty) is None and not asked.sampled


@pytest.mark.parametrize("case", ["warm-up", "no hints", "no failure"])
def test_neutral_settings_are_trl_bit_for_bit(tmp_path, case):
    settings = {
        "warm-up": NOW | {"warmup": 1.0, "threshold": 1.0},
        "no hints": {"warmup": 0.0, "threshold": 1.0},
        "no failure": NOW | {"threshold": -1.0},
    }[case]
    if case == "no hints":
        with pytest.warns(
            UserWarning, match=r"no column of hints \(knowledge_components_parts.*it has: prompt, answer"
        ):
            ours = train(tmp_path, {"scaf_grpo": settings}, num_iterations=2)
    else:
        ours = train(tmp_path, {"scaf_grpo": settings}, num_iterations=2)
    config = trl.GRPOConfig(**grpo_args(str(tmp_path), loss_type="grpo", num_iterations=2))
    stock = trl.GRPOTrainer(tiny_path(), letters_reward, config, prompts())
    stock.train()
    assert_equal(weights(ours), weights(stock))
    log = ours.state.log_history[0]
    assert log["scaf_grpo/failed_groups"] == (0 if case == "no failure" else 2)
    assert log.get("scaf_grpo/no_hint") == (1 if case == "no hints" else None)


def test_all_levels_fail(tmp_path):
    """Card: rewards and advantages stay zero; nothing is trained."""

    def never(completions, **kwargs):
        return [0.0] * len(completions)

    before = weights(make(tmp_path, {"scaf_grpo": NOW}, rewards=never))
    after = train(tmp_path, {"scaf_grpo": NOW}, rewards=never)
    assert_equal(before, weights(after))
    log = after.state.log_history[0]
    assert (log["scaf_grpo/failed_groups"], log["scaf_grpo/rescued"], log["frac_reward_zero_std"]) == (2, 0, 1)


def test_hints_are_not_evaluated(tmp_path, monkeypatch):
    trainer = make(tmp_path, {"scaf_grpo": NOW}, rewards=with_hint, per_device_eval_batch_size=8)
    shown = []
    original = trl.GRPOTrainer._generate
    monkeypatch.setattr(trl.GRPOTrainer, "_generate", lambda self, p: (shown.extend(p), original(self, p))[1])
    found = trainer.evaluate(prompts(4))
    assert shown and not any("Hint" in p[-1]["content"] for p in shown) and found["eval_reward"] == 0


def test_micro_batches_do_not_matter(tmp_path):
    """8 x 1 and 2 x 4 on the same rollout."""
    settings = {"rewards": hint_and_letters, "optim": "sgd", "learning_rate": 0.1}
    methods = {"scaf_grpo": NOW | {"threshold": 0.5}}
    one = train(tmp_path, methods, **settings)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    four = train(tmp_path, methods, **settings, **split)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(four)[name], value, rtol=1e-4, atol=1e-6)
    assert one.state.log_history[0]["scaf_grpo/rescued"] == four.state.log_history[0]["scaf_grpo/rescued"] == 2


@pytest.mark.parametrize("stop", [2, 3])
def test_resume_equals_not_stopping(tmp_path, stop):
    settings = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    methods = {"scaf_grpo": NOW | {"threshold": 0.5, "warmup": 0.5}}
    whole = train(tmp_path, methods, rewards=hint_and_letters, **settings)
    resumed = train(
        tmp_path, methods, resume=str(tmp_path / f"checkpoint-{stop}"), rewards=hint_and_letters, **settings
    )
    assert_equal(weights(whole), weights(resumed))
    rescued = [entry.get("scaf_grpo/rescued") for entry in whole.state.log_history[:6]]
    assert rescued == [None, None, None, None, 2, None]  # rollouts at steps 1, 3 and 5; hints past step 3 only


# Declarations


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"columns": {}}, "name at least one column of hints"),
        ({"columns": {"hints": 3}}, "the label of 'hints' must be a text, or a list of texts"),
        ({"columns": {"hints": []}}, "the label of 'hints' must be a text"),
        ({"replace_num": 2, "replace_hint_prompt": True}, "leave replace_hint_prompt false"),
        ({"replace_num": 3}, "replace_num: 3 must be <= 2"),
        ({"warmup": 1.5}, "warmup: 1.5 must be <= 1"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, settings, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path)), methods={"scaf_grpo": settings})


def test_a_group_must_keep_a_completion_of_its_own(tmp_path):
    with pytest.raises(PlanError, match="replace_num 2 leaves none of the 2 completions"):
        args = grpo_args(str(tmp_path), num_generations=2)
        trl_ext.GRPOConfig(**args, methods={"scaf_grpo": {"replace_num": 2}})


def test_the_reward_must_be_known(tmp_path):
    def built(settings):
        config = trl_ext.GRPOConfig(**grpo_args(str(tmp_path)), methods={"scaf_grpo": NOW | settings})
        return trl_ext.GRPOTrainer(tiny_path(), [letters_reward, with_hint], config, prompts())

    with pytest.raises(PlanError, match=r"several rewards \(letters_reward, with_hint\); name the one"):
        built({})
    with pytest.raises(PlanError, match="reward 'right' is not a reward of this run"):
        built({"reward": "right"})
    assert built({"reward": "with_hint"})


def test_columns_come_from_a_command_line():
    (method,) = make_plan('{"scaf_grpo": {"columns": {"hints": ["A", "B"]}, "cumulative": "false"}}').methods
    assert method.columns == {"hints": ["A", "B"]} and not method.cumulative
    assert ScafGrpo().columns is not ScafGrpo().columns


def test_recipe_has_the_papers_numbers():
    recipe = load_recipe("scaf_grpo_qwen2.5_math_7b", ["--use_cpu", "true"])
    (method,), args = recipe.plan.methods, recipe.training_args
    assert list(method.columns.values()) == ["Knowledge Hints", "Planning Hints", "Solution Hints"]
    assert (method.cumulative, method.warmup, method.replace_num, method.max_prompt_tokens) == (True, 0.15, 1, 4096)
    assert (args.num_generations, args.max_completion_length, args.beta, args.weight_decay) == (8, 2048, 0.0, 0.0)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64 * 8
    assert recipe.reward_names == ["math_correct"]
