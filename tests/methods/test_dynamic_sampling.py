"""Dynamic sampling: which groups give way to which, the budget, and training on what is left."""

from __future__ import annotations

import pytest
import torch
import trl

import trl_ext
from tests.methods.attempts import attempt, question, text
from tests.methods.groups import logged
from tests.methods.training import make, train
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext.methods.grpo.dynamic_sampling import DynamicSampling
from trl_ext.plan import PlanError, make_plan
from trl_ext.recipe import load_recipe

ROWS = [question(q) for q in ("a", "b", "c")]
FLAT = [[0.0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]]


def number(prompt):
    """Of the training row."""
    return int(prompt[-1]["content"].split(" +")[0])


def some_flat(completions, prompts, **kwargs):
    """Three prompts in four score 0, whatever the completion; the others by their letters."""
    letters = letters_reward(completions)
    return [value * (number(prompt) % 4 == 0) for value, prompt in zip(letters, prompts, strict=True)]


def one_in_four(completions, **kwargs):
    """One right answer in every group."""
    return [float(i % 4 == 0) for i in range(len(completions))]


class Scores:
    """New completions of a prompt score 0 and 1 in turns; those of a "flat" one score 1."""

    def __init__(self):
        self.count = 0

    def __call__(self, row):
        self.count += 1
        return 1.0 if "flat" in text(row) else float(self.count % 2)


def pool(*names):
    """Fresh rows in this order, as many as are asked for."""
    left = list(names)
    return lambda count, number: [question(left.pop(0)) for _ in range(min(count, len(left)))]


def test_groups_without_variance_are_replaced_whole():
    method = DynamicSampling(oversample=1.5)
    seen, asked = attempt(FLAT, ROWS, Scores(), pool("flat 1", "new 1", "new 2"))
    revision = method.revise(seen)
    assert asked.fresh == [(3, 0)] and method.state == {"draws": 1}
    assert [text(row) for row in asked.sampled[0]] == ["flat 1"] * 4 + ["new 1"] * 4 + ["new 2"] * 4
    assert revision.swaps == {(0, g): 104 + g for g in range(4)} | {(2, g): 108 + g for g in range(4)}
    assert revision.unused == [[100, 101, 102, 103]] and not revision.helped
    assert logged(seen.metrics) == pytest.approx(
        {
            "flat_before": 2 / 3,
            "flat_after": 0,
            "rounds": 1,
            "extra_completions": 12,
            "extra_tokens": 60,
            "fresh_kept": 2 / 3,
            "reward_before": 6 / 12,
        }
    )


def test_rounds_go_on_until_the_budget_is_spent():
    method = DynamicSampling(oversample=1, rounds=2)
    seen, asked = attempt(FLAT, ROWS, Scores(), pool("flat 1", "flat 2", "new 1", "flat 3", "new 2"))
    revision = method.revise(seen)
    assert asked.fresh == [(2, 0), (2, 1)] and method.state == {"draws": 2}
    assert revision.swaps == {(0, g): 108 + g for g in range(4)}
    assert [ids[0] for ids in revision.unused] == [100, 104, 112]
    found = logged(seen.metrics)
    assert (found["rounds"], found["flat_after"]) == (2, pytest.approx(1 / 3))
    assert (found["extra_completions"], found["fresh_kept"]) == (16, 0.25)


def test_a_round_is_not_larger_than_the_rollout():
    seen, asked = attempt(FLAT, ROWS, Scores(), pool("new 1", "new 2", "new 3"))
    DynamicSampling(oversample=10).revise(seen)
    assert asked.fresh == [(3, 0)]


def test_a_prompt_that_came_already_is_passed_over():
    seen, asked = attempt(FLAT, ROWS, Scores(), pool("b", "new 1", "new 1", "flat 1", "new 2"))
    revision = DynamicSampling(oversample=1).revise(seen)
    made = [[text(row) for row in rows[::4]] for rows in asked.sampled]
    assert made == [["new 1"], [], ["flat 1"], ["new 2"]]  # 2 asked for, then 1 at a time; a round may bring none
    assert len(revision.swaps) == 8


def test_nothing_to_replace_asks_for_nothing():
    method = DynamicSampling()
    seen, asked = attempt([[0, 1], [1, 0]], ROWS[:2])
    assert method.revise(seen).swaps == {} and asked.fresh == asked.sampled == [] and method.state == {}
    found = logged(seen.metrics)
    assert (found["flat_before"], found["flat_after"], found["extra_tokens"]) == (0, 0, 0)
    assert "fresh_kept" not in found


@pytest.mark.parametrize(
    "settings, replaced",
    [
        ({}, {0}),  # the sum: (1, 1), (1, 0), (1.5, 2)
        ({"reward": "r0"}, {1}),
        ({"reward": "r1"}, {2}),
        ({"low": 0.75}, {0, 1}),  # means 1, 0.5, 1.75
        ({"high": 0.75}, {0, 2}),
        ({"low": 0.5, "high": 1.75}, {0}),
    ],
)
def test_what_decides(settings, replaced):
    rewards = [[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]], [[0.5, 1.0], [1.0, 1.0]]]
    seen, _ = attempt(rewards, ROWS)
    signal = DynamicSampling(**settings)._signal(seen, seen.rewards)
    assert signal.tolist() == [place not in replaced for place in range(3)]


# Training


def recorded(monkeypatch):
    """Rows and rewards (P, G) that every rollout is trained on."""
    seen = []
    original = trl_ext.GRPOTrainer._calculate_rewards

    def record(self, inputs, prompts, completions, ids):
        found = original(self, inputs, prompts, completions, ids)
        seen.append(([number(p) for p in prompts[:: self.num_generations]], found.view(-1, self.num_generations)))
        return found

    monkeypatch.setattr(trl_ext.GRPOTrainer, "_calculate_rewards", record)
    return seen


def test_every_group_has_a_signal(tmp_path, monkeypatch):
    seen = recorded(monkeypatch)
    trainer = train(tmp_path, {"dynamic_sampling": {}}, rewards=some_flat, max_steps=4)
    log = trainer.state.log_history[:4]
    assert any(entry["dynamic_sampling/flat_before"] > 0 for entry in log)
    for entry, (rows, rewards) in zip(log, seen, strict=True):
        assert all(row % 4 == 0 for row in rows) and len(set(rows)) == 2
        assert bool((rewards.amax(1) > rewards.amin(1)).all())
        assert entry["frac_reward_zero_std"] == entry["dynamic_sampling/flat_after"] == 0
        assert entry["reward"] == pytest.approx(float(rewards.mean()), abs=1e-6)  # of what is trained on
        extra = entry["dynamic_sampling/extra_completions"]
        assert (extra > 0) == (entry["dynamic_sampling/flat_before"] > 0)
        assert entry["dynamic_sampling/extra_tokens"] <= 6 * extra


@pytest.mark.parametrize("case", ["off", "nothing flat"])
def test_neutral_settings_are_trl_bit_for_bit(tmp_path, case):
    rewards = some_flat if case == "off" else one_in_four
    ours = train(tmp_path, {"dynamic_sampling": {"rounds": 0} if case == "off" else {}}, rewards=rewards)
    stock = trl.GRPOTrainer(
        tiny_path(), rewards, trl.GRPOConfig(**grpo_args(str(tmp_path), loss_type="grpo")), prompts()
    )
    stock.train()
    assert_equal(weights(ours), weights(stock))
    assert (ours.state.log_history[0]["dynamic_sampling/flat_before"] > 0) == (case == "off")


@pytest.mark.parametrize("stop", [2, 3])
def test_resume_equals_not_stopping(tmp_path, monkeypatch, stop):
    """The counter is saved: the same fresh prompts come, also after a stop inside a generation window."""
    seen = recorded(monkeypatch)
    settings = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 8, "rewards": some_flat}
    methods = {"dynamic_sampling": {"rounds": 2}}
    whole = train(tmp_path, methods, **settings)
    first, seen[:] = [rows for rows, _ in seen], []
    resumed = train(tmp_path, methods, resume=str(tmp_path / f"checkpoint-{stop}"), **settings)
    assert [rows for rows, _ in seen] == first[(stop + 1) // 2 :]
    assert_equal(weights(whole), weights(resumed))
    assert whole.plan.methods[0].state == resumed.plan.methods[0].state and whole.plan.methods[0].state["draws"] >= 4


def test_micro_batches_do_not_matter(tmp_path):
    settings = {"rewards": some_flat, "optim": "sgd", "learning_rate": 0.1}
    one = train(tmp_path, {"dynamic_sampling": {}}, **settings)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    four = train(tmp_path, {"dynamic_sampling": {}}, **settings, **split)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(four)[name], value, rtol=1e-4, atol=1e-6)


def test_a_curriculum_hears_of_all_groups_that_were_drawn(tmp_path):
    """FG-ExPO: every prompt that was drawn counts as a visit, also those that gave way or came in vain."""
    methods = {"fg_expo": {"akl": False, "threshold": 0.3}, "dynamic_sampling": {"rounds": 3}}
    trainer = train(tmp_path, methods, rewards=some_flat, max_steps=3)
    curriculum, refilled = trainer.plan.methods
    made = sum(e["dynamic_sampling/extra_completions"] for e in trainer.state.log_history[:3]) / 4
    assert made > 0 and refilled.state["draws"] == curriculum.state["draws"] - 3
    assert int(curriculum.state["visits"].sum()) == 3 * 2 + made


def test_after_scaf_grpo_a_rescued_group_stays(tmp_path, monkeypatch):
    def with_hint(completions, prompts, **kwargs):
        return [float("Hint:" in prompt[-1]["content"]) for prompt in prompts]

    seen = recorded(monkeypatch)
    methods = {"scaf_grpo": {"columns": {"answer": "Hint"}, "warmup": 0.0}, "dynamic_sampling": {}}
    log = train(tmp_path, methods, rewards=with_hint, max_steps=2).state.log_history[:2]
    for entry, (_, rewards) in zip(log, seen, strict=True):
        assert rewards.tolist() == [[1, 0, 0, 0]] * 2
        assert entry["dynamic_sampling/flat_before"] == entry["dynamic_sampling/extra_completions"] == 0
        assert entry["reward"] == 0 and entry["scaf_grpo/rescued"] == 2


# Declarations


def test_a_stream_is_refused_at_the_start(tmp_path):
    """Its rows have no numbers to draw by; without rounds nothing is drawn, and it trains."""

    def built(rounds):
        args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path)), methods={"dynamic_sampling": {"rounds": rounds}})
        return trl_ext.GRPOTrainer(tiny_path(), some_flat, args, prompts().to_iterable_dataset())

    with pytest.raises(PlanError, match=r"dynamic_sampling: draws rows by number.*dataset_streaming: false"):
        built(1)
    trainer = built(0)
    trainer.train()
    assert trainer.state.global_step == 3


def test_clashes_name_what_to_do(tmp_path):
    def built(methods):
        return trl_ext.GRPOConfig(**grpo_args(str(tmp_path), scale_rewards="none"), methods=methods)

    with pytest.raises(PlanError, match="name scaf_grpo before dynamic_sampling"):
        built(["dynamic_sampling", "scaf_grpo"])
    assert built(["scaf_grpo", "dynamic_sampling"])
    with pytest.raises(PlanError, match=r"own remedy for groups without variance.*leave dynamic_sampling out"):
        built(["dynamic_sampling", "riskpo"])
    with pytest.raises(PlanError, match=r"low 0.8 is above high 0.2"):
        built({"dynamic_sampling": {"low": 0.8, "high": 0.2}})
    with pytest.raises(PlanError, match=r"oversample: 0.5 must be >= 1"):
        built({"dynamic_sampling": {"oversample": 0.5}})
    with pytest.raises(PlanError, match=r"reward 'right' is not a reward of this run \(letters_reward\)"):
        make(tmp_path, {"dynamic_sampling": {"reward": "right"}})


def test_bounds_from_a_command_line_are_numbers():
    (method,) = make_plan('{"dynamic_sampling": {"low": "0.2", "high": "none", "rounds": "3"}}').methods
    assert (method.low, method.high, method.rounds) == (0.2, None, 3)


def test_recipe_has_the_papers_numbers():
    recipe = load_recipe("dynamic_sampling_qwen2.5_7b", ["--use_cpu", "true"])
    (method,), args = recipe.plan.methods, recipe.training_args
    assert (method.reward, method.rounds) == ("math_correct", 9)
    assert (args.epsilon, args.epsilon_high, args.beta, args.loss_type) == (0.2, 0.28, 0.0, "dapo")
    assert (args.num_generations, args.temperature, args.weight_decay, args.warmup_steps) == (16, 1.0, 0.1, 20)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32 * 16
    assert recipe.reward_names == ["math_correct", "soft_overlong_punishment_reward"]
