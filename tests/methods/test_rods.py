"""RODS: the card's numbers, the pool in real training, its checkpoints, an endpoint that fails, and the file of rows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import trl

import trl_ext
from tests.methods.groups import logged, made_group
from tests.methods.spy import spied
from tests.methods.training import train
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext import checkpoints, revision
from trl_ext.annotate import endpoint
from trl_ext.annotate.chat_http import TransientError
from trl_ext.method import Draw, Metrics, Unavailable
from trl_ext.methods.grpo import rods
from trl_ext.methods.grpo.rods import Rods, group_variance
from trl_ext.plan import PlanError, make_plan
from trl_ext.recipe import load_recipe

HERE = "tests.methods.test_rods"
WIDE = {"low": 0.0, "high": 1.0, "retire": 1.0, "evaluation": [], "similar": 1.0, "repairs": 0}
"""Every row is a seed and none retires: the tiny model's rewards have no meaning."""
OWN = WIDE | {"synthesizer": f"{HERE}.sums", "budget": 3, "cooldown": 0}


def sums(seed_row, stats, n, rng):
    """Sums of three-digit numbers."""
    made = []
    for _ in range(n):
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        made.append({"prompt": [{"role": "user", "content": f"{a} + {b} ="}], "answer": str(a + b)})
    return made


def nothing(seed_row, stats, n, rng):
    return []


def by_text(completions, prompts, **kwargs):
    """A reward in [0, 1] that depends on prompt and completion."""
    texts = [p[0]["content"] + c[0]["content"] for p, c in zip(prompts, completions, strict=True)]
    return [(sum(map(ord, text)) % 5) / 4 for text in texts]


def group(progress, drawn=None, **more):
    """(P, G) progress rewards as a Group of one rollout."""
    return made_group(progress, ["progress"], drawn=None if drawn is None else torch.tensor(drawn), **more)


def draw(count, size, folder=".", **more):
    """What the trainer asks for, of a training set of sums."""
    rows = [{"prompt": [{"role": "user", "content": f"{i} + 1 ="}], "answer": str(i + 1)} for i in range(size)]
    return Draw(count, size, seed=3, step=0, metrics=Metrics(), row=rows.__getitem__, folder=str(folder), **more)


def lines(folder):
    return [json.loads(line) for line in (folder / rods.FOLDER / rods.ROWS).read_text().splitlines()]


# Statistics


@pytest.mark.parametrize(
    ("rewards", "rbar", "variance"),
    [
        ([1, 0.5, 0.75, 0.25], 0.625, 0.078125),
        ([0.2, 0, 0.4, 0], 0.15, 0.0275),
        ([0.9, 1, 0.8, 0.8], 0.875, 0.006875),
        ([0.5, 0, 0.5, 0.25], 0.3125, 0.04296875),
        ([1, 1, 1, 1], 1.0, 0.0),
    ],
)
def test_worked_groups(rewards, rbar, variance):
    """The variances of all but the first are worked out by hand: mean of squares minus square of the mean."""
    method = Rods()
    method.choose_prompts(draw(1, 2))
    seen = group([rewards], drawn=[0])
    method.observe(seen)
    assert method.state["pool"]["entries"][0]["rbar"] == pytest.approx(rbar, abs=1e-6)
    assert float(group_variance(seen.rewards[..., 0])) == pytest.approx(variance, abs=1e-6)
    assert variance <= rbar * (1 - rbar) + 1e-9
    found = logged(seen.metrics)
    assert found["rbar"] == pytest.approx(rbar, abs=1e-6) and found["zero_variance"] == float(rbar == 1)
    where = "variance_boundary" if 0.2 <= rbar <= 0.85 else "variance_outside"
    assert found[where] == pytest.approx(variance, abs=1e-6) and len(found) == 4


def test_worked_advantages(tmp_path, monkeypatch):
    """In training they are TRL's own: (R - rbar) / (std + 1e-4); with the card's 1e-6, 1.161891 and 0.387297."""

    def progress(completions, **kwargs):
        return [1, 0.5, 0.75, 0.25] * (len(completions) // 4)

    seen = spied(monkeypatch)
    train(tmp_path, {"rods": OWN, "epo": {"coefficient": 0.0}}, rewards=progress, num_generations=4, max_steps=1)
    expected = sorted([1.161535, -0.387178, 0.387178, -1.161535] * 2)
    assert sorted(seen[0].advantages.tolist()) == pytest.approx(expected, abs=1e-6)


def test_variance_is_bounded_by_the_mean():
    values = torch.rand(500, 6, generator=torch.Generator().manual_seed(0))
    mean = values.mean(1)
    assert (group_variance(values) <= mean * (1 - mean) + 1e-6).all()
    ends = (values > 0.5).float()
    assert torch.allclose(group_variance(ends), ends.mean(1) * (1 - ends.mean(1)), atol=1e-6)


def test_rewards_outside_the_unit_interval_are_refused():
    with pytest.raises(ValueError, match=r"'progress' is between 0 and 1\.5, a progress reward lies in"):
        Rods().observe(group([[0.0, 1.5]]))


def test_groups_that_were_replaced_count_for_their_own_row():
    method = Rods()
    method.choose_prompts(draw(2, 4))
    rewards = torch.tensor([[[0.25], [0.25]]])
    method.observe(
        group([[1, 0], [1, 1]], drawn=[0, -1], discarded_drawn=torch.tensor([3]), discarded_rewards=rewards)
    )
    entries = method.state["pool"]["entries"]
    assert [entries[i]["rbar"] for i in range(4)] == [0.5, None, None, 0.25]


# Epochs, by hand


def test_an_epoch_by_hand(tmp_path):
    """Four rows, two per rollout. Rates 0.5, 0, 1, 0.75: two boundary seeds; one row may enter (a quarter of four)."""
    method = Rods(**OWN | {"low": 0.2, "high": 0.85, "retire": 0.95, "fraction": 0.25, "category": "answer"})
    rates = {0: [1, 0, 1, 0], 1: [0] * 4, 2: [1] * 4, 3: [1, 1, 1, 0], 4: [1, 0, 0, 0]}
    first = []
    for _ in range(2):
        chosen = method.choose_prompts(draw(2, 4, tmp_path))
        first += chosen.numbers.tolist()
        method.observe(group([rates[i] for i in chosen.numbers.tolist()], drawn=chosen.numbers.tolist()))
    assert sorted(first) == [0, 1, 2, 3] and not (tmp_path / rods.FOLDER).exists()
    asked = draw(2, 4, tmp_path)
    chosen = method.choose_prompts(asked)
    pool = method.state["pool"]
    assert [(r["number"], r["parent"], r["verdict"]) for r in lines(tmp_path)] == [
        (0, 0, "accepted"),
        (1, 3, "accepted"),
    ]
    record = lines(tmp_path)[0]
    assert record["generator"] == OWN["synthesizer"] and (record["seed"], record["step"], record["epoch"]) == (3, 0, 0)
    assert record["stats"] == {"rbar": 0.5, "priority": 1.0, "category": "1", "epoch": 0}
    assert record["row"] == sums({}, {}, 1, random.Random("rods/3/0"))[0]
    assert (pool["epoch"], sorted(pool["order"]), len(pool["queue"])) == (1, [0, 1, 2, 3, 4], 1)
    assert pool["entries"][4]["row"] == record["row"] and pool["entries"][4]["parent"] == 0
    found = logged(asked.metrics)
    expected = {"injected": 1, "retired": 0, "put_out": 0, "synthesised": 2, "rejected": 0, "pool": 5, "seeds": 4}
    expected |= {"generated": 1, "queue": 1, "epoch": 1, "share_hard": 0.25, "share_boundary": 0.5}
    assert found == expected | {"share_mastered": 0.25}
    while 4 not in chosen.numbers.tolist():  # the last row of an odd pool is left out, as TRL's sampler does
        chosen = method.choose_prompts(draw(2, 4, tmp_path))
    seen = group([rates[i] for i in chosen.numbers.tolist()], drawn=chosen.numbers.tolist())
    method.observe(seen)
    assert {k: v for k, v in logged(seen.metrics).items() if k.startswith("new")} == {
        "new_rbar": 0.25,
        "new_in_band": 1,
    }
    assert chosen.rows[chosen.numbers.tolist().index(4)] == record["row"]
    assert method.summary(str)[0].startswith(f"Pool after {pool['epoch']} epochs: 4 rows at first, now 5, of which 1")


def run_epochs(method, folder, epochs, rate):
    """Draws and observes until so many epochs are over; `rate(id)` is each row's share of right answers."""
    while True:
        chosen = method.choose_prompts(draw(2, 6, folder))
        if method.state["pool"]["epoch"] == epochs:
            return
        numbers = chosen.numbers.tolist()
        method.observe(group([[rate(i), rate(i)] for i in numbers], drawn=numbers))


def test_mastered_and_hard_rows_leave_unless_told_otherwise(tmp_path):
    def rate(row):
        return 0.5 if row < 6 else (1.0 if row % 2 else 0.1)

    settings = OWN | {"low": 0.2, "high": 0.85, "retire": 0.95, "fraction": 1.0}
    method = Rods(**settings)
    run_epochs(method, tmp_path / "a", 2, rate)
    assert sorted(method.state["pool"]["entries"])[:6] == list(range(6))
    assert not {6, 7, 8} & set(method.state["pool"]["entries"])  # seen in epoch 1: mastered or too hard
    kept = Rods(**settings | {"leave": "none"})
    run_epochs(kept, tmp_path / "b", 2, rate)
    assert {6, 7, 8} <= set(kept.state["pool"]["entries"])


def test_seeds_retire_when_told_so_but_a_rollout_is_left(tmp_path):
    method = Rods(**OWN | {"low": 0.2, "high": 0.85, "retire": 0.95, "leave": "all"})
    run_epochs(method, tmp_path, 2, lambda row: 1.0)
    assert len(method.state["pool"]["entries"]) == 2


def test_the_total_bounds_attempts(tmp_path):
    method = Rods(**OWN | {"total": 4, "synthesizer": f"{HERE}.nothing", "repairs": 3})
    run_epochs(method, tmp_path, 3, lambda row: 0.5)
    assert method.state["attempts"] == method.state["refused"] == 4 == len(lines(tmp_path))
    assert len(method.state["pool"]["entries"]) == 6


def test_the_pool_does_not_depend_on_who_computes_it(tmp_path):
    """A process that is told what the main one made comes to the same state."""
    told = []

    def main(make):
        told.append(make())
        return told[-1]

    def drive(on_main):
        method = Rods(**OWN)
        for _ in range(8):
            chosen = method.choose_prompts(draw(2, 6, tmp_path, on_main=on_main))
            method.observe(group([[0.25, 0.5]] * 2, drawn=chosen.numbers.tolist()))
        return method.state

    answers = iter(told)
    assert drive(main) == drive(lambda make: next(answers)) and len(told) == 3  # what is checked first, and two epochs


def test_draws_that_cannot_be():
    with pytest.raises(ValueError, match=r"takes 8 different prompts and the training set has 6; lower"):
        Rods().choose_prompts(draw(8, 6))
    with pytest.raises(ValueError, match="category 'level' is no column; the training set has prompt, answer"):
        Rods(category="level").choose_prompts(draw(2, 6))


# Training


def recorded(monkeypatch):
    """The first prompt of each group of every rollout from here on."""
    seen = []
    original = trl_ext.GRPOTrainer._calculate_rewards

    def record(self, inputs, prompts, completions, ids):
        seen.append([p[0]["content"] for p in prompts][::4])
        return original(self, inputs, prompts, completions, ids)

    monkeypatch.setattr(trl_ext.GRPOTrainer, "_calculate_rewards", record)
    return seen


@pytest.mark.parametrize("settings", [{"capacity": 0}, {"fraction": 0.0}])
def test_without_room_for_new_rows_it_is_trl_bit_for_bit(tmp_path, settings):
    ours = train(tmp_path, {"rods": settings}, beta=0.1)
    config = trl.GRPOConfig(**grpo_args(str(tmp_path), loss_type="grpo", beta=0.1))
    stock = trl.GRPOTrainer(tiny_path(), letters_reward, config, prompts())
    stock.train()
    assert_equal(weights(ours), weights(stock))
    assert "rods/zero_variance" in ours.state.log_history[0] and "rods/pool" not in ours.state.log_history[0]


def test_a_synthesiser_that_returns_nothing_is_grpo_on_the_drawn_rows(tmp_path, monkeypatch):
    """8 rollouts are an epoch, at whose end TRL's loader draws a random number; the ninth shows that nothing changed."""
    rows = recorded(monkeypatch)
    settings = OWN | {"synthesizer": f"{HERE}.nothing"}
    ours = train(tmp_path, {"rods": settings}, max_steps=8)
    order = [int(text.split(" +")[0]) for rollout in rows for text in rollout]
    assert sorted(order) == list(range(16)) and order != list(range(16))
    config = trl.GRPOConfig(**grpo_args(str(tmp_path), loss_type="grpo", max_steps=8), shuffle_dataset=False)
    stock = trl.GRPOTrainer(tiny_path(), letters_reward, config, prompts().select(order))
    stock.train()
    assert_equal(weights(ours), weights(stock))
    log = train(tmp_path, {"rods": settings}, max_steps=9).state.log_history[8]
    assert (log["rods/pool"], log["rods/injected"], log["rods/rejected"]) == (16, 0, 3)


def test_training_meets_new_rows_from_the_next_epoch_on(tmp_path, monkeypatch):
    rows = recorded(monkeypatch)
    trainer = train(tmp_path, {"rods": OWN}, max_steps=20, rewards=by_text)
    made = [record["row"]["prompt"][0]["content"] for record in lines(tmp_path) if record["epoch"] == 0]
    assert len(made) == 3
    flat = [text for rollout in rows for text in rollout]
    assert not set(made) & set(flat[:16])  # epoch 0: the training set
    assert set(made) <= set(flat[16:34])  # epoch 1: 19 rows in 9 rollouts, with this seed all three among them
    (method,) = trainer.plan.methods
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[8]["rods/injected"] == 3 and log[8]["rods/generated"] == 3 and "rods/injected" not in log[7]
    seen = {key.removeprefix("rods/") for entry in log for key in entry if key.startswith("rods/")}
    expected = {"pool", "seeds", "generated", "queue", "epoch", "share_hard", "share_boundary", "share_mastered"}
    expected |= {"injected", "retired", "put_out", "synthesised", "rejected", "rbar", "variance"}
    expected |= {"zero_variance", "variance_boundary", "new_rbar", "new_in_band"}
    assert seen == expected  # low 0, high 1: nothing lies outside the boundary
    first = method.state["pool"]["entries"][16]
    assert first["origin"] == "generated" and first["rbar"] is not None and first["added"] == 1


def test_shaped_rewards_do_not_reach_the_statistics(tmp_path):
    """group_dpo stretches every group to [0, 1]; rbar stays the mean of the raw reward."""
    seen = []

    def small(completions, **kwargs):
        found = [value / 4 for value in letters_reward(completions)]
        seen.extend(found)
        return found

    methods = {"group_dpo": {"min_max": True}, "rods": OWN}
    log = train(tmp_path, methods, max_steps=1, rewards=small).state.log_history[0]
    assert log["rods/rbar"] == pytest.approx(sum(seen) / len(seen), abs=1e-6) and max(seen) <= 0.25


@pytest.mark.parametrize("stop", [8, 11])
def test_resume_equals_not_stopping(tmp_path, monkeypatch, stop):
    """At step 8 between two epochs, at step 11 inside a generation window: same rows, pool, file and weights."""
    settings = {"num_iterations": 2 if stop == 11 else 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 20}
    settings["rewards"] = by_text
    small = OWN | {"budget": 2}
    rows = recorded(monkeypatch)
    whole = train(tmp_path, {"rods": small}, **settings)
    drawn, rows[:] = list(rows), []
    file = (tmp_path / rods.FOLDER / rods.ROWS).read_text()
    resumed = train(tmp_path, {"rods": small}, resume=str(tmp_path / f"checkpoint-{stop}"), **settings)
    assert rows == drawn[-(-stop // settings["num_iterations"]) :]
    assert_equal(weights(whole), weights(resumed))
    assert whole.plan.methods[0].state == resumed.plan.methods[0].state
    assert (tmp_path / rods.FOLDER / rods.ROWS).read_text() == file and file


def test_resume_on_another_data_set_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    train(tmp_path, {"rods": OWN}, **settings)
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **settings), methods={"rods": OWN})
    other = trl_ext.GRPOTrainer(tiny_path(), letters_reward, args, prompts(20))
    with pytest.raises(ValueError, match="began with 16 rows, the training set has 20"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_accumulation_does_not_change_the_pool(tmp_path):
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 4}
    one = train(tmp_path / "a", {"rods": OWN}, max_steps=10, learning_rate=0.0, rewards=by_text)
    many = train(tmp_path / "b", {"rods": OWN}, max_steps=10, learning_rate=0.0, rewards=by_text, **split)
    (first,), (second,) = one.plan.methods, many.plan.methods
    assert first.state["pool"]["order"] == second.state["pool"]["order"]
    assert first.state["pool"]["entries"].keys() == second.state["pool"]["entries"].keys()


# An endpoint that fails


@pytest.fixture
def server(monkeypatch):
    """A chat model that writes sums; `down` after so many requests."""

    class Server:
        down: int | None = None
        texts: list = []

        def __call__(self, url, payload, key, timeout):
            text = json.loads(payload)["messages"][0]["content"]
            if self.down is not None and len(self.texts) >= self.down:
                raise TransientError("no connection")
            self.texts.append(text)
            number = 1000 + sum(map(ord, text))
            return json.dumps({"task": f"{number} + {number} =", "answer": str(2 * number)})

    found = Server()
    found.texts = []
    monkeypatch.setattr(endpoint, "post_chat", found)
    return found


def assert_same_run(whole, resumed):
    """Weights, both methods' state, the tokens seen, and the rows on disk."""
    assert_equal(weights(whole), weights(resumed))
    for first, second in zip(whole.plan.methods, resumed.plan.methods, strict=True):
        assert first.state == second.state
    assert whole.state.num_input_tokens_seen == resumed.state.num_input_tokens_seen
    one, other = (lines(Path(trainer.args.output_dir)) for trainer in (whole, resumed))
    assert one == other and [record["number"] for record in one] == list(range(len(one)))


ENDPOINT = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "judge": False, "retries": 0, "concurrency": 1}


def test_an_endpoint_that_fails_ends_with_a_checkpoint_and_resume_goes_on(tmp_path, server):
    """It fails at the second epoch's end, at step 17; no checkpoint was asked for before. The rest equals a whole run."""
    methods = {"rods": OWN | {"synthesizer": ENDPOINT, "budget": 2}}
    whole = train(tmp_path / "whole", methods, max_steps=20, rewards=by_text)
    asked, server.texts, server.down = list(server.texts), [], 2
    with pytest.raises(Unavailable, match=r"no new rows can be made(.|\n)*no connection(.|\n)*--resume goes on"):
        train(tmp_path / "cut", methods, max_steps=20, rewards=by_text)
    saved = checkpoints.last_whole(tmp_path / "cut")
    step = checkpoints.step_of(tmp_path / "cut" / saved.rpartition("/")[2])
    assert step == 17 and len(lines(tmp_path / "cut")) == 2  # 8 rollouts, then 9 of 18 rows
    server.down = None
    resumed = train(tmp_path / "cut", methods, resume=saved, max_steps=20, rewards=by_text)
    assert server.texts == asked
    assert_equal(weights(whole), weights(resumed))
    assert whole.plan.methods[0].state == resumed.plan.methods[0].state
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert [record["model"] for record in lines(tmp_path / "cut")] == ["m"] * 4


def test_an_endpoint_that_fails_where_the_data_loaders_epoch_ends(tmp_path, server):
    """The pool's first epoch is the loader's, which draws a random number at the beginning of its next one."""
    methods = {"rods": OWN | {"synthesizer": ENDPOINT, "budget": 2}}
    whole = train(tmp_path / "whole", methods, max_steps=10, rewards=by_text)
    server.texts, server.down = [], 0
    with pytest.raises(Unavailable, match="no connection"):
        train(tmp_path / "cut", methods, max_steps=10, rewards=by_text)
    saved = checkpoints.last_whole(tmp_path / "cut")
    assert saved is not None and saved.endswith("checkpoint-8")
    with pytest.raises(Unavailable, match="no connection"):
        train(tmp_path / "cut", methods, resume=saved, max_steps=10, rewards=by_text)
    server.down = None
    resumed = train(tmp_path / "cut", methods, resume=saved, max_steps=10, rewards=by_text)
    assert_same_run(whole, resumed)


def test_replies_before_the_failure_are_not_asked_for_again(tmp_path, server):
    """One of two requests was answered in a round: the other costs its row, and nothing else."""
    methods = {"rods": OWN | {"synthesizer": ENDPOINT, "budget": 2}}
    server.down = 1
    trainer = train(tmp_path, methods, max_steps=9, rewards=by_text)
    verdicts = [record["verdict"] for record in lines(tmp_path)]
    assert verdicts == ["accepted", "the endpoint gave no answer"]
    assert trainer.plan.methods[0].state["refused"] == 1


def test_a_missing_key_is_told_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.delenv("RODS_TEST_KEY", raising=False)
    methods = {"rods": OWN | {"synthesizer": ENDPOINT | {"api_key_env": "RODS_TEST_KEY"}}}
    with pytest.raises(Unavailable, match=r"RODS_TEST_KEY .* is not set"):
        train(tmp_path, methods)
    assert checkpoints.last_whole(tmp_path) is None


# Epochs that end inside a rollout, where dynamic_sampling asks for fresh prompts


REFILLED = {"rods": OWN | {"synthesizer": ENDPOINT, "budget": 2}, "dynamic_sampling": {"rounds": 3, "oversample": 1.0}}


def flat_for_some(completions, prompts, **kwargs):
    """No spread for every other prompt, so that fresh ones are asked for at all times."""
    found = by_text(completions, prompts)
    return [0.0 if sum(map(ord, p[0]["content"])) % 2 == 0 else v for p, v in zip(prompts, found, strict=True)]


@pytest.fixture
def turns(monkeypatch):
    """(epoch that ends, optimizer steps done, whether fresh prompts were asked for) of each turn."""
    seen, inside = [], []
    fresh, turn = revision._Revising.fresh, Rods._turn

    def asked(self, count, number):
        inside.append(True)
        try:
            return fresh(self, count, number)
        finally:
            inside.pop()

    def turned(self, pool, draw):
        seen.append((pool["epoch"], draw.step, bool(inside)))
        turn(self, pool, draw)

    monkeypatch.setattr(revision._Revising, "fresh", asked)
    monkeypatch.setattr(Rods, "_turn", turned)
    return seen


class Killed(BaseException):
    """Nothing catches it."""


def test_a_kill_after_an_epoch_that_ended_inside_a_rollout_costs_time_alone(tmp_path, server, turns):
    """Rows and replies of the turn are on disk, no checkpoint is: the turn is made again from the replies."""
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 3}

    def killing(completions, prompts, **kwargs):
        if len(turns) == 2:
            raise Killed
        return flat_for_some(completions, prompts)

    whole = train(tmp_path / "whole", REFILLED, rewards=flat_for_some, **settings)
    assert turns[1] == (1, 8, True)
    asked, server.texts[:], turns[:] = list(server.texts), [], []
    with pytest.raises(Killed):
        train(tmp_path / "cut", REFILLED, rewards=killing, **settings)
    saved = checkpoints.last_whole(tmp_path / "cut")
    assert saved.endswith("checkpoint-6") and len(lines(tmp_path / "cut")) == 4
    assert server.texts == asked[:4]
    resumed = train(tmp_path / "cut", REFILLED, resume=saved, rewards=flat_for_some, **settings)
    assert server.texts == asked
    assert_same_run(whole, resumed)


def test_an_endpoint_that_fails_inside_a_rollout_ends_with_a_checkpoint_of_its_beginning(tmp_path, server, turns):
    """By then the rollout has drawn prompts and random numbers, moved the counters and counted tokens."""
    whole = train(tmp_path / "whole", REFILLED, max_steps=12, rewards=flat_for_some)
    assert turns[1] == (1, 8, True)
    asked, server.texts, server.down = list(server.texts), [], 2
    with pytest.raises(Unavailable, match="no connection"):
        train(tmp_path / "cut", REFILLED, max_steps=12, rewards=flat_for_some)
    saved = checkpoints.last_whole(tmp_path / "cut")
    assert saved is not None and saved.endswith("checkpoint-8")
    server.down = None
    resumed = train(tmp_path / "cut", REFILLED, resume=saved, max_steps=12, rewards=flat_for_some)
    assert server.texts == asked
    assert_same_run(whole, resumed)


# Declarations


@pytest.mark.parametrize(
    ("settings", "kwargs", "words"),
    [
        ({"low": 0.9}, {}, "must not fall; swap them"),
        ({}, {"shuffle_dataset": False}, "leave shuffle_dataset on, or capacity: 0"),
        ({"synthesizer": "sandbx"}, {}, "'sandbx' is not sandbox, module.function"),
        ({"synthesizer": f"{HERE}.missing"}, {}, "cannot import"),
        ({"synthesizer": {"model": "m"}}, {}, "needs base_url"),
        ({"synthesizer": {"base_url": "http://x", "model": "m", "x": 1}}, {}, "unknown endpoint field x"),
        ({"evaluation": ["sandbox_jsn"]}, {}, "did you mean"),
        ({"seeds": "boundry"}, {}, "did you mean 'boundary'"),
        ({"capacity": -1}, {}, "must be >= 0"),
    ],
)
def test_clashes_name_the_flag(tmp_path, settings, kwargs, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **kwargs), methods={"rods": settings})


def test_the_progress_reward_must_be_known(tmp_path):
    def built(**settings):
        config = trl_ext.GRPOConfig(**grpo_args(str(tmp_path)), methods={"rods": settings})
        return trl_ext.GRPOTrainer(tiny_path(), [letters_reward, by_text], config, prompts())

    with pytest.raises(PlanError, match=r"several rewards \(letters_reward, by_text\); name the one that measures"):
        built()
    with pytest.raises(PlanError, match="reward 'text' is not a reward of this run"):
        built(reward="text")
    assert built(reward="by_text")


def test_two_samplers_clash():
    with pytest.raises(PlanError, match="both replace the sampler"):
        make_plan({"rods": {}, "fg_expo": {"akl": False}})


def test_defaults_are_the_papers():
    method = Rods()
    assert (method.low, method.high, method.retire) == (0.20, 0.85, 0.95)
    assert (method.capacity, method.fraction, method.repairs) == (400, 0.20, 3)
    assert (method.budget, method.variants, method.cooldown, method.stale) == (16, 1, 1, None)


def test_sandbox_recipe():
    recipe = load_recipe("sandbox_rods")
    (method,) = recipe.plan.methods
    assert (method.low, method.high, method.retire, method.fraction) == (0.2, 0.85, 0.95, 0.2)
    assert recipe.reward_names == ["steps_right"]


def test_real_recipe_has_the_papers_numbers():
    """One optimizer step on 32 problems with 16 completions each; a larger model writes and judges."""
    recipe = load_recipe("rods_qwen3_4b", ["--use_cpu", "true"])
    (method,), args = recipe.plan.methods, recipe.training_args
    assert (method.low, method.high, method.retire, method.capacity, method.fraction) == (0.2, 0.85, 0.95, 400, 0.2)
    assert (args.num_generations, args.beta, args.epsilon, args.epsilon_high, args.delta) == (16, 0.1, 0.2, 0.28, 10.0)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32 * 16
    assert recipe.extra.max_train_rows == 400 and recipe.reward_names == ["math_correct"]
    assert method.synthesizer["model"] == "Qwen/Qwen3-32B" and method.synthesizer["judge"] is True
