"""Around a step: drawn prompts, measured values, reference log-probs without beta, gradient noise, the learning rate."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import trl_ext
from tests.test_services import Probe, train  # noqa: F401 - a fixture
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext import checkpoints
from trl_ext.gradients import GradientWatch
from trl_ext.method import GRADIENT_NOISE, REF_LOGPS, Chosen, Setup, Unavailable
from trl_ext.methods import METHODS
from trl_ext.plan import PlanError, make_plan
from trl_ext.rollout_hooks import _number_of, _tools_used

SEEN: list = []


@pytest.fixture(autouse=True)
def forget():
    SEEN.clear()


@dataclass(frozen=True)
class Chooser(Probe):
    """Takes the last rows of the data, two at a time."""

    owns = ("sampler",)

    def choose_prompts(self, draw):
        SEEN.append((draw.count, draw.size, draw.seed, draw.step))
        return torch.tensor([draw.size - 1 - draw.step, 0])

    def streams(self, rollout):
        SEEN.append([row["answer"] for row in rollout.rows])
        return {}

    def observe(self, group):
        SEEN.append(group.drawn.tolist())


def test_prompts_are_drawn_in_place_of_the_loaders(train):  # noqa: F811
    train(Chooser, max_steps=2)
    answers = prompts()["answer"]
    assert SEEN[0] == (2, 16, 42, 0) and SEEN[1] == [15, 0]
    assert SEEN[2] == [answers[15]] * 4 + [answers[0]] * 4
    assert SEEN[3][3] == 1 and SEEN[4] == [14, 0]


@dataclass(frozen=True)
class Twice(Chooser):
    def choose_prompts(self, draw):
        return torch.tensor([3, 3])


def test_a_draw_must_be_of_different_rows(train):  # noqa: F811
    with pytest.raises(ValueError, match=r"probe: drew .* rows, not 2 different ones"):
        train(Twice)


@dataclass(frozen=True)
class Maker(Chooser):
    """Rows of its own with numbers of its own, as the main process makes them."""

    def choose_prompts(self, draw):
        made = draw.on_main(lambda: [draw.row(5) | {"answer": f"{draw.step}/{i}"} for i in range(draw.count)])
        SEEN.append(draw.folder)
        return Chosen(made, torch.tensor([100 + draw.step, 200]))


def test_rows_that_a_method_makes_keep_its_numbers(train, tmp_path):  # noqa: F811
    train(Maker, max_steps=2)
    assert SEEN[0] == str(tmp_path) and SEEN[2] == ["0/0"] * 4 + ["0/1"] * 4
    assert SEEN[1] == [100, 200] and SEEN[4] == [101, 200]


@dataclass(frozen=True)
class TooFew(Maker):
    def choose_prompts(self, draw):
        return Chosen([draw.row(0)], torch.tensor([0]))


def test_rows_that_a_method_makes_must_be_as_many_as_asked(train):  # noqa: F811
    with pytest.raises(ValueError, match="probe: gave 1 rows, not 2"):
        train(TooFew)


@dataclass(frozen=True)
class Stops(Chooser):
    """The outside is gone at the third step."""

    def choose_prompts(self, draw):
        if draw.step == 2:
            draw.on_main(self.fail)
        return super().choose_prompts(draw)

    def fail(self):
        raise Unavailable("nobody answers")


@pytest.mark.parametrize("rollouts", [1, 2])
def test_what_is_missing_outside_ends_the_run_with_a_checkpoint(train, tmp_path, rollouts):  # noqa: F811
    """At the start of a step: also where several rollouts make one, whose first one asks."""
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2 * rollouts, "steps_per_generation": 2}
    with pytest.raises(Unavailable, match="nobody answers"):
        train(Stops, max_steps=4, **sizes)
    assert checkpoints.last_whole(tmp_path) == str(tmp_path / "checkpoint-2")


@dataclass(frozen=True)
class StopsInside(Chooser):
    """The outside is gone at the second rollout of the second step."""

    def choose_prompts(self, draw):
        self.state["calls"] = self.state.get("calls", 0) + 1
        if self.state["calls"] == 4:
            raise Unavailable("nobody answers")
        return super().choose_prompts(draw)


def test_inside_a_step_the_last_whole_one_is_saved(train, tmp_path):  # noqa: F811
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 2}
    with pytest.raises(Unavailable):
        train(StopsInside, max_steps=4, **sizes)
    saved = checkpoints.last_whole(tmp_path)
    assert saved == str(tmp_path / "checkpoint-1")
    assert checkpoints.load(f"{saved}/{checkpoints.METHODS_FILE}")["states"] == {"probe": {"calls": 2}}


@dataclass(frozen=True)
class Measured(Probe):
    def measure(self, rollout):
        SEEN.append(rollout.advantages)
        return {"length": rollout.mask.sum(1).float()}

    def group_advantages(self, advantages, group):
        assert torch.equal(group.measured["length"], group.lengths.float())
        assert torch.equal(group.total, group.rewards[..., 0] * 2)
        assert torch.equal(group.reward("letters_reward"), group.rewards[..., 0])
        with pytest.raises(ValueError, match="no reward is called 'other'; this run has: letters_reward"):
            group.reward("other")
        return advantages * 0 + 3

    def streams(self, rollout):
        SEEN.append(rollout.advantages)
        return {}


def test_values_measured_before_the_advantages(train):  # noqa: F811
    train(Measured, max_steps=1, reward_weights=[2.0])
    assert SEEN[0].abs().sum() > 0 and (SEEN[1] == 3).all()  # as TRL made them, then as the method left them


@dataclass(frozen=True)
class ReadsReference(Probe):
    def needs(self):
        return frozenset({REF_LOGPS})

    def streams(self, rollout):
        return {"ref": rollout.ref_logps()}

    def observe_loss(self, x):
        SEEN.append((x.ref_logps * x.mask, (x.streams["ref"] * x.mask)))


@pytest.mark.parametrize("peft", [None, "lora"])
def test_reference_logps_do_not_need_beta(train, peft):  # noqa: F811
    plain = weights(train(Probe, peft=peft))
    assert_equal(weights(train(ReadsReference, peft=peft)), plain)
    without, SEEN[:] = list(SEEN), []
    train(ReadsReference, peft=peft, beta=1e-12)  # TRL's own reference
    assert len(SEEN) == len(without) == 3
    for (own, stream), (trl, _) in zip(without, SEEN, strict=True):
        assert torch.equal(own, stream)
        torch.testing.assert_close(own, trl, atol=2e-5, rtol=1e-5)
    assert own.abs().sum() > 0


@dataclass(frozen=True)
class Noise(Probe):
    owns = ("learning rate",)

    def needs(self):
        return frozenset({GRADIENT_NOISE})

    def observe_gradients(self, noise):
        SEEN.append((noise.mean_square, noise.square_of_mean, noise.samples, noise.step))
        noise.metrics.mean("ratio", noise.square_of_mean / noise.mean_square)

    def learning_rate(self, lr, step):
        return lr * (step + 1) / 4


def test_gradient_noise_is_that_of_the_micro_batches(train):  # noqa: F811
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 4}
    trainer = train(Noise, **sizes, max_grad_norm=1e-3, max_steps=2, optim="sgd")
    expected = _norms(trainer, **sizes)
    assert SEEN[0][2:] == (4, 0) and SEEN[1][2:] == (4, 1)
    assert SEEN[0][:2] == pytest.approx(expected, rel=1e-4)
    assert "probe/ratio" in trainer.state.log_history[0]


def _norms(trainer, **sizes):
    """The same two numbers for the first step, from gradients that are taken one by one."""
    args = trl_ext.GRPOConfig(**grpo_args(trainer.args.output_dir, **sizes, max_steps=1, optim="sgd"))
    found = []

    class Apart(trl_ext.GRPOTrainer):
        def training_step(self, *args, **kwargs):
            self.model.zero_grad()
            loss = super().training_step(*args, **kwargs)
            found.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]) * 4)
            return loss

    Apart(tiny_path(), letters_reward, args, prompts()).train()
    squares = torch.stack([g.square().sum() for g in found]).mean()
    return float(squares), float(torch.stack(found).mean(0).square().sum())


def test_the_learning_rate_is_changed_for_the_update_alone(train):  # noqa: F811
    kwargs = {"optim": "sgd", "max_steps": 2, "lr_scheduler_type": "constant", "num_generations": 8}
    start = weights(train(Probe, **kwargs | {"learning_rate": 0.0}))
    plain, scaled = (weights(train(cls, **kwargs | {"max_steps": 1})) for cls in (Probe, Noise))
    for name, value in start.items():
        torch.testing.assert_close(scaled[name] - value, (plain[name] - value) / 4, atol=1e-7, rtol=1e-3)
    trainer = train(Noise, **kwargs)
    assert [e["learning_rate"] for e in trainer.state.log_history if "loss" in e] == [1e-2, 1e-2]
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-2
    assert SEEN == []  # one micro-batch tells nothing about noise


def test_one_gradient_tells_nothing():
    p = torch.nn.Parameter(torch.zeros(2))
    watch = GradientWatch(processes=1)
    p.grad = torch.tensor([1.0, 2.0])
    watch.after_backward([p])
    assert watch.result() is None and watch.result() is None
    p.grad = torch.tensor([0.25, 0.0])
    watch.after_backward([p])
    p.grad = torch.tensor([0.45, 0.1])
    watch.after_backward([p], scale=1.0)
    own, square, samples = watch.result()
    assert own.tolist() == pytest.approx([4 * (0.0625 + 0.04 + 0.01), 2]) and samples == 2
    assert float(square) == pytest.approx(0.45**2 + 0.01)


def test_with_processes_the_last_backward_is_left_out():
    p = torch.nn.Parameter(torch.zeros(1))
    watch = GradientWatch(processes=2)
    for value in (1.0, 3.0, 4.0):
        p.grad = torch.tensor([value])
        watch.after_backward([p])
    own, square, samples = watch.result()
    assert own.tolist() == [9 * (1 + 4), 2] and float(square) == 16 and samples == 6


@dataclass(frozen=True)
class Questions(Probe):
    def shape_rewards(self, rewards, group):
        SEEN.append((group.questions.tolist(), group.tool_calls, group.tool_turns))
        return rewards


def test_questions_have_numbers_that_stay(train):  # noqa: F811
    train(Questions, num_train_epochs=2, max_steps=-1)  # 16 prompts, two a step, twice
    numbers = [number for questions, *_ in SEEN for number in questions]
    assert len(numbers) == 32 and len(set(numbers)) == 16 and set(numbers[:16]) == set(numbers[16:])
    assert all(0 < number < 2**62 for number in numbers)
    assert all((calls == 0).all() and (turns == 0).all() for _, calls, turns in SEEN)


def test_tool_calls_are_counted():
    def turn(*names):
        return {"role": "assistant", "tool_calls": [{"function": {"name": n}} for n in names]}

    completion = [turn("a", "b"), {"role": "tool", "content": "1"}, turn("a"), {"role": "assistant", "content": "x"}]
    assert _tools_used(completion) == (3, 2) and _tools_used("text") == (0, 0)


def test_a_first_gradient_may_come_late():
    """A part of the model that only some micro-batches use counts as 0 before."""
    first, late = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    watch = GradientWatch(processes=1)
    first.grad = torch.tensor([2.0])
    watch.after_backward([first, late], scale=2.0)
    late.grad = torch.tensor([6.0])
    watch.after_backward([first, late], scale=2.0)
    own, square, samples = watch.result()
    assert own.tolist() == [4 * (1 + 9), 2] and float(square) == 1 + 9 and samples == 2


def test_deepspeed_is_refused_for_a_rate_of_the_step_alone(monkeypatch):
    monkeypatch.setitem(METHODS, "probe", Noise)
    plan = make_plan("probe")
    for engine in ("zero", "zero3"):
        with pytest.raises(PlanError, match="probe: DeepSpeed makes its update inside the backward pass"):
            plan.check(Setup(None, engine=engine))


def test_a_prompt_with_an_image_keeps_its_number():
    from PIL import Image

    def prompt(color):
        return [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (4, 4), color)}]}]

    assert _number_of(prompt("red")) == _number_of(prompt("red")) != _number_of(prompt("blue"))
