"""Second attempts: what a method replaces is what TRL then scores, scores log-probs of, and trains on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

import trl_ext
from tests.test_services import Probe, train  # noqa: F401 - a fixture
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext.method import Revision
from trl_ext.methods import METHODS
from trl_ext.plan import PlanError
from trl_ext.revision import Revisions

SEEN: list = []
CALLS: list[int] = []
HINT = {"role": "user", "content": "hint"}


@pytest.fixture(autouse=True)
def forget():
    SEEN.clear()
    CALLS.clear()


@dataclass(frozen=True)
class Looks(Probe):
    """Makes samples and swaps none."""

    def revise(self, attempt):
        SEEN.append(attempt)
        return Revision({})


def test_looking_changes_nothing(train):  # noqa: F811
    assert_equal(weights(train(Probe)), weights(train(Looks)))
    attempt = SEEN[0]
    assert attempt.rewards.shape == (2, 4, 1) and attempt.reward(None).shape == (2, 4)
    assert attempt.rows[0]["prompt"] != attempt.rows[1]["prompt"] and attempt.reward_names == ["letters_reward"]


@dataclass(frozen=True)
class Hinted(Probe):
    """The second completion of the first prompt is made again with a hint."""

    def revise(self, attempt):
        row = attempt.rows[0]
        samples = attempt.sample([row | {"prompt": [*row["prompt"], HINT]}, attempt.rows[1]])
        SEEN.append((attempt, samples))
        return Revision({(0, 1): samples.ids[0]}, helped=True)

    def streams(self, rollout):
        SEEN.append(rollout)
        return {}

    def observe(self, group):
        SEEN.append(group)

    def aux_loss(self, x):
        SEEN.append(x)
        return None


def test_a_hinted_completion_takes_its_place(train):  # noqa: F811
    trainer = train(Hinted, max_steps=1, beta=1e-9, num_iterations=2, logging_steps=1)
    (attempt, samples), rollout, *_ = [s for s in SEEN if not hasattr(s, "truncated")]
    group = next(s for s in SEEN if hasattr(s, "truncated"))
    assert [HINT in p for p in rollout.prompts] == [False, True] + [False] * 6
    assert group.rewards[0, 1] == samples.rewards[0] and group.rewards[0, 0] == attempt.rewards[0, 0]
    assert torch.equal(group.rewards[1], attempt.rewards[1])
    assert samples.lengths.tolist()[0] == group.lengths[0, 1] and samples.lengths.shape == (2,)
    lengths = rollout.prompt_mask.sum(1)
    assert lengths[1] > lengths[0] == lengths[2]  # the batch holds the hinted prompt, under which all log-probs are
    x = SEEN[-1]
    assert x.old_logps is not None and (x.mask * (x.old_logps - x.logps)).abs().max() < 1e-5
    log = trainer.state.log_history[0]
    assert log["rewards/letters_reward/mean"] == pytest.approx(float(attempt.rewards.mean()), abs=1e-6)
    assert log["reward"] == pytest.approx(float(attempt.rewards.mean()), abs=1e-6)


@dataclass(frozen=True)
class Bare(Hinted):
    """The same, under the prompt without the hint."""

    def revise(self, attempt):
        return dataclasses.replace(super().revise(attempt), own_prompt=frozenset({(0, 1)}))


def test_a_completion_may_be_taken_without_its_prompt(train):  # noqa: F811
    train(Bare, max_steps=1, num_iterations=2)
    (_, samples), rollout, *_ = [s for s in SEEN if not hasattr(s, "truncated")]
    group = next(s for s in SEEN if hasattr(s, "truncated"))
    assert not any(HINT in p for p in rollout.prompts) and len(rollout.prompts) == 8
    assert torch.equal(rollout.prompt_ids[1], rollout.prompt_ids[0]) and HINT not in rollout.rows[1]["prompt"]
    assert group.rewards[0, 1] == samples.rewards[0] and group.lengths[0, 1] == samples.lengths[0]


@dataclass(frozen=True)
class Many(Probe):
    """Makes more samples than the rollout has rows."""

    def revise(self, attempt):
        rows = [row | {"prompt": [*row["prompt"], HINT] * n} for n in range(1, 10) for row in attempt.rows]
        SEEN.append(attempt.sample(rows))
        return Revision({(0, 0): SEEN[-1].ids[17]})


def test_many_samples_are_made_in_blocks_of_a_rollout(train, monkeypatch):  # noqa: F811
    made = []
    monkeypatch.setattr(
        Revisions, "_made", lambda self, rows, own=Revisions._made: made.append(own(self, rows)) or made[-1]
    )
    train(Many, max_steps=1)
    (samples,) = SEEN
    assert [len(values) for values, _ in made] == [8, 8, 2] and list(samples.ids) == list(range(18))
    assert torch.equal(samples.rewards, torch.cat([rewards for _, rewards in made]))
    assert samples.lengths.tolist() == [len(value[1]) for values, _ in made for value in values]


@dataclass(frozen=True)
class Wasteful(Probe):
    """Makes samples and swaps none."""

    def revise(self, attempt):
        SEEN.append(attempt.sample([row | {"prompt": [*row["prompt"], HINT]} for row in attempt.rows]))
        return Revision({})


def test_numbers_about_completions_are_those_of_the_rollout(train):  # noqa: F811
    names = ("completions/mean_length", "completions/max_length", "completions/clipped_ratio")
    plain = train(Probe, max_steps=1, max_completion_length=40).state.log_history[0]
    found = train(Wasteful, max_steps=1, max_completion_length=40).state.log_history[0]
    assert [found[name] for name in names] == [plain[name] for name in names]
    (samples,) = SEEN
    assert float(samples.lengths.float().mean()) != plain["completions/mean_length"]
    assert found["num_tokens"] > plain["num_tokens"]  # they were generated all the same


@dataclass(frozen=True)
class Fresh(Probe):
    """Replaces the second prompt by one that was not in the rollout."""

    def revise(self, attempt):
        (row,) = attempt.fresh(1, 7)
        samples = attempt.sample([row] * 4)
        SEEN.append((attempt, row, samples))
        return Revision({(1, place): samples.ids[place] for place in range(4)})

    def observe(self, group):
        SEEN.append(group)


def test_a_group_gets_a_fresh_prompt(train):  # noqa: F811
    trainer = train(Fresh, max_steps=1)
    (attempt, row, samples), group = SEEN
    assert torch.equal(group.rewards[1], samples.rewards) and torch.equal(group.rewards[0], attempt.rewards[0])
    assert group.drawn is None and group.discarded_rewards is None
    assert row in list(prompts())
    log = trainer.state.log_history[0]
    assert log["reward"] == pytest.approx(float(group.rewards.mean()), abs=1e-6)


@dataclass(frozen=True)
class FreshDrawn(Fresh):
    owns = ("sampler",)

    def choose_prompts(self, draw):
        SEEN.append(draw.count)
        return torch.arange(draw.count) + (10 if draw.count == 1 else 3)


def test_fresh_prompts_come_from_the_method_that_draws(train):  # noqa: F811
    train(FreshDrawn, max_steps=1)
    count, again, (attempt, row, _), group = SEEN
    assert (count, again) == (2, 1) and row == prompts()[10]
    assert group.drawn.tolist() == [3, 10] and group.discarded_drawn.tolist() == [4]
    assert torch.equal(group.discarded_rewards[0], attempt.rewards[1])


@dataclass(frozen=True)
class TwoFresh(FreshDrawn):
    """Makes two groups and takes the second."""

    def revise(self, attempt):
        rows = attempt.fresh(2, 7)
        samples = attempt.sample([row for row in rows for _ in range(4)])
        SEEN.append((attempt, samples))
        return Revision({(1, place): samples.ids[4 + place] for place in range(4)}, unused=[samples.ids[:4]])


def test_groups_that_were_made_in_vain_are_told(train):  # noqa: F811
    train(TwoFresh, max_steps=1)
    *_, (attempt, samples), group = SEEN
    assert group.drawn.tolist() == [3, 4] and group.discarded_drawn.tolist() == [4, 3]
    assert torch.equal(group.discarded_rewards[0], attempt.rewards[1])
    assert torch.equal(group.discarded_rewards[1], samples.rewards[:4])


def counting(completions, **kwargs):
    CALLS.append(len(completions))
    return letters_reward(completions)


def test_rewards_are_asked_for_once(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "probe", Hinted)
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), max_steps=1), methods="probe")
    trl_ext.GRPOTrainer(tiny_path(), counting, args, prompts()).train()
    assert CALLS == [8, 2]


@dataclass(frozen=True)
class Rows(Probe):
    owns = ("sampler",)

    def choose_prompts(self, draw):
        return [draw.row(5), {"prompt": [HINT], "answer": "new"}]

    def streams(self, rollout):
        SEEN.append([row["answer"] for row in rollout.rows])
        return {}


def test_rows_may_come_from_outside_the_data(train):  # noqa: F811
    train(Rows, max_steps=1)
    (answers,) = SEEN
    assert answers == [prompts()[5]["answer"]] * 4 + ["new"] * 4


def test_environments_and_images_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "probe", Hinted)
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path)), methods="probe")

    def rollout(prompts, trainer):
        raise AssertionError

    with pytest.raises(PlanError, match="probe: no second attempts with a rollout_func"):
        trl_ext.GRPOTrainer(tiny_path(), letters_reward, args, prompts(), rollout_func=rollout)
