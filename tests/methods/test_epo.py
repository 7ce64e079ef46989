"""epo: the card's worked example and limits, gradients, turns through TRL's tool loop, history, splits and restart."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import trl
from datasets import Dataset

import trl_ext
from tests.methods.scripted_tools import random_model
from tests.tiny import QUIET, assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext.method import Metrics, RunShape
from trl_ext.methods.grpo.epo import Epo, corridor_penalty, penalty_factor, rl_steps, turn_ids, turn_weights
from trl_ext.plan import PlanError
from trl_ext.recipe import load_recipe
from trl_ext.sandbox import calculator
from trl_ext.sandbox.model import sandbox_tokenizer

H = torch.tensor([[0.2, 1.0, 7.0], [2.5, 0.6, 0.8]])  # 7.0 is padding
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
EDGES = {"lower": 0.5, "upper": 1.5, "alpha": 0.1}


@dataclasses.dataclass
class FakeInput:
    """What `aux_loss` and `observe_loss` read, for one process and K = 100 RL steps."""

    entropy: torch.Tensor
    mask: torch.Tensor
    run: RunShape = RunShape(100, 4, 1.0)
    row_scale: float = 1.0
    first_pass: bool = True
    metrics: Metrics = dataclasses.field(default_factory=Metrics)

    def gather(self, values):
        return values, slice(None)

    def logged(self):
        return {name: float(total[0] / total[1]) for name, total in self.metrics.totals.items()}


def after(k=25, means=(0.9, 0.7), **settings):
    """EPO with `k` closed steps of which the mean is that of `means`."""
    method = Epo(**settings)
    method.state["means"] = [sum(means) / len(means)] * k
    return method


# The maths


def test_worked_penalty():
    found = corridor_penalty(H, 0.4, 1.2)
    assert found[MASK.bool()].tolist() == pytest.approx([0.2, 0, 1.3, 0, 0], abs=1e-6)


def test_worked_example():
    """L_H 0.95, L_smooth 0.026667, beta 1.22313: -0.001 (0.95 - 1.22313 * 0.026667) = -0.000917383."""
    x = FakeInput(H, MASK)
    assert float(after(**EDGES).aux_loss(x)) == pytest.approx(-0.000917383, abs=1e-9)
    logged = x.logged()
    expected = {"L_H": 0.95, "L_smooth": 0.026667, "beta": 1.223130, "Hw": 0.8, "low_edge": 0.4, "high_edge": 1.2}
    assert {name: logged[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert (logged["below"], logged["above"]) == pytest.approx((0.2, 0.2), abs=1e-6)


def test_worked_example_of_the_released_form():
    """Token means: L_H 5.1 / 5, penalty 0.1 * 2 / 5."""
    x = FakeInput(H, MASK)
    method = after(penalty="step", mean="token", schedule="none", **EDGES)
    assert float(method.aux_loss(x)) == pytest.approx(-0.00098, abs=1e-9)
    assert x.logged()["L_H"] == pytest.approx(1.02, abs=1e-6)
    assert x.logged()["L_smooth"] == pytest.approx(0.04, abs=1e-6)


def test_worked_example_of_the_papers_edges():
    x = FakeInput(H, MASK)
    after(alpha=0.05).aux_loss(x)
    assert x.logged()["L_smooth"] == pytest.approx(0.0075, abs=1e-6)
    assert x.logged()["below"] == 0


def test_history_has_the_token_mean_of_closed_steps_only():
    """1.02 is appended when a rollout of other weights comes, and not used before."""
    method, x = Epo(**EDGES), FakeInput(H, MASK)
    group = dataclasses.make_dataclass("G", ["step", "metrics"])
    method.observe(group(0, Metrics()))
    assert float(method.aux_loss(x)) == pytest.approx(-0.00095, abs=1e-9), "k = 0: no smoothing"
    method.observe_loss(x)
    method.observe(group(0, Metrics()))  # another rollout for the same optimizer step
    method.observe_loss(FakeInput(H, MASK))
    assert method.state.get("means", []) == []
    method.observe(group(1, Metrics()))
    assert method.state["means"] == pytest.approx([1.02], abs=1e-6)
    method.observe_loss(dataclasses.replace(x, first_pass=False))
    assert "open" not in method.state


def test_penalty_is_continuous_with_slope_one():
    entropy = torch.tensor([0.1, 0.4, 0.8, 1.2, 2.0], requires_grad=True)
    penalty = corridor_penalty(entropy, 0.4, 1.2)
    assert penalty.tolist() == pytest.approx([0.3, 0, 0, 0, 0.8], abs=1e-6)
    inner = corridor_penalty(torch.tensor([0.4 - 1e-6, 1.2 + 1e-6]), 0.4, 1.2)
    assert inner.tolist() == pytest.approx([0, 0], abs=1e-5)
    penalty.sum().backward()
    assert entropy.grad[[0, 2, 4]].tolist() == [-1, 0, 1]
    assert bool((corridor_penalty(torch.rand(50), 0.0, 2.0) == 0).all()), "kl = 0 never penalises from below"


def test_step_form():
    """Inside the corridor the inequalities are strict."""
    assert corridor_penalty(torch.tensor([0.4, 0.5, 1.2]), 0.4, 1.2, "step").tolist() == [1, 0, 1]


@pytest.mark.parametrize("k, beta", [(0, 2.0), (25, 1.223130), (50, 1.049787), (100, 1.002479)])
def test_beta(k, beta):
    assert penalty_factor(k, 100, 3.0) == pytest.approx(beta, abs=1e-6)


@pytest.mark.parametrize("epoch, w", [(0, 1.0), (75, 0.827067), (76, 0.768632), (150, 0.039830)])
def test_released_schedule(epoch, w):
    assert penalty_factor(epoch, 100, 3.0, "code") == pytest.approx(w, abs=1e-6)


@pytest.mark.parametrize("per_rollout, steps", [(1.0, 100), (4.0, 25), (3.0, 34), (0.25, 100)])
def test_rl_steps(per_rollout, steps):
    """Several rollouts in one optimizer step are one RL step; one rollout may serve several optimizer steps."""
    assert rl_steps(RunShape(100, 4, per_rollout)) == steps


def test_gradient_of_each_region():
    """-lambda w (1 + alpha beta [below] - alpha beta [above]), with w = 1 / (2 rows * tokens of the row)."""
    entropy = H.clone().requires_grad_()
    after(**EDGES).aux_loss(FakeInput(entropy, MASK)).backward()
    w, ab = torch.tensor([[1 / 4] * 3, [1 / 6] * 3]), 0.1 * 1.2231302
    factor = torch.tensor([[1 + ab, 1, 0], [1 - ab, 1, 1]])
    torch.testing.assert_close(entropy.grad, -0.001 * w * factor, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("mean", ["turn", "token"])
def test_step_form_has_the_gradient_of_the_plain_bonus(mean):
    grads = []
    for settings in (EDGES | {"penalty": "step"}, EDGES | {"alpha": 0}):
        entropy = H.clone().requires_grad_()
        after(mean=mean, **settings).aux_loss(FakeInput(entropy, MASK)).backward()
        grads.append(entropy.grad)
    assert torch.equal(*grads)


TOOL = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0, 0], [0] * 9])


def test_turns():
    assert turn_ids(TOOL).tolist() == [[0, 0, -1, -1, 1, -1, 2, 2, 2], [0, 0, 0] + [-1] * 6, [-1] * 9]
    expected = [[1 / 6, 1 / 6, 0, 0, 1 / 3, 0, 1 / 9, 1 / 9, 1 / 9], [1 / 3] * 3 + [0] * 6, [0] * 9]
    torch.testing.assert_close(turn_weights(turn_ids(TOOL)) * 3, torch.tensor(expected))


@pytest.mark.parametrize("history", ["step", "turn"])
def test_tool_output_and_padding_do_not_matter(history):
    """What stands there reaches neither loss, gradient nor history."""
    entropy = torch.rand(3, 9).masked_fill(TOOL == 0, 50.0).requires_grad_()
    method = Epo(lower=0.9, upper=1.1, history=history)
    method.state.update(means=[0.5], by_turn=[torch.tensor([0.5, 0.4, 0.6])])
    loss = method.aux_loss(FakeInput(entropy, TOOL))
    loss.backward()
    assert abs(float(loss.detach())) < 0.001 and bool((entropy.grad[TOOL == 0] == 0).all())
    method.observe_loss(FakeInput(entropy, TOOL))
    assert method.state["open"].sum(1).tolist() == pytest.approx(
        [float((entropy.detach() * TOOL).sum()), 9.0], rel=1e-5
    )


def test_history_by_turn():
    """Turn 0: mean of two steps; turn 1: the one step that had it; turn 2: never seen, not penalised."""
    method = Epo(history="turn", lower=0.0, upper=1.0, alpha=1.0, schedule="none", coefficient=1.0)
    group = dataclasses.make_dataclass("G", ["step", "metrics"])
    for step, (entropy, mask) in enumerate([([[0.2, 9, 0.6]], [[1, 0, 1]]), ([[0.4, 9, 9]], [[1, 0, 0]])]):
        method.observe(group(step, Metrics()))
        method.observe_loss(FakeInput(torch.tensor(entropy), torch.tensor(mask)))
    method.observe(group(2, Metrics()))
    x = FakeInput(torch.tensor([[1.0, 9, 1.0, 9, 1.0]]), torch.tensor([[1, 0, 1, 0, 1]]))
    method.aux_loss(x)
    assert x.logged()["L_smooth"] == pytest.approx(((1 - 0.3) + (1 - 0.6) + 0) / 3, abs=1e-6)


def test_gate_by_turn_and_window():
    x = FakeInput(H, MASK)
    assert float(after(from_turn=1, **EDGES).aux_loss(x)) == pytest.approx(-0.00095, abs=1e-9)
    method = Epo(window=2, **EDGES)
    method.state["means"] = [5.0, 0.9, 0.7]
    x = FakeInput(H, MASK)
    method.aux_loss(x)
    assert x.logged()["Hw"] == pytest.approx(0.8)


# In the trainer


def train(tmp_path, methods, cls=trl_ext.GRPOTrainer, config=trl_ext.GRPOConfig, resume=None, **kwargs):
    extra = {"methods": methods} if config is trl_ext.GRPOConfig else {}
    trainer = cls(tiny_path(), letters_reward, config(**grpo_args(str(tmp_path), **kwargs), **extra), prompts())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


STRONG = {"coefficient": 0.1, "lower": 0.9, "upper": 1.1, "alpha": 2.0}


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_no_coefficient_is_trl(tmp_path, loss_type):
    ours = train(tmp_path, {"epo": {"coefficient": 0}}, loss_type=loss_type, beta=0.1)
    stock = train(tmp_path, None, trl.GRPOTrainer, trl.GRPOConfig, loss_type=loss_type, beta=0.1)
    assert_equal(weights(ours), weights(stock))


def test_without_penalty_it_is_trls_bonus(tmp_path):
    """alpha 0 and token means: TRL's own entropy_coef."""
    ours = train(tmp_path, {"epo": {"coefficient": 0.1, "alpha": 0, "mean": "token"}})
    theirs = train(tmp_path, None, trl.GRPOTrainer, trl.GRPOConfig, entropy_coef=0.1)
    for name, value in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], value, rtol=1e-4, atol=2e-6)


def test_metrics_and_history(tmp_path):
    trainer = train(tmp_path, {"epo": STRONG}, max_steps=4)
    log, (method,) = trainer.state.log_history[:4], trainer.plan.methods
    seen = [entry["epo/Hbar"] for entry in log]
    assert seen == pytest.approx([entry["entropy"] for entry in log], rel=1e-4)
    assert method.state["means"] == pytest.approx(seen[:3], rel=1e-5), "the last step is still open"
    assert "epo/Hw" not in log[0] and "epo/L_smooth" not in log[0]
    for k in (1, 2, 3):
        centre = sum(seen[:k]) / k
        assert log[k]["epo/Hw"] == pytest.approx(centre, rel=1e-4)
        assert log[k]["epo/low_edge"] == pytest.approx(0.9 * centre, rel=1e-4)
        assert log[k]["epo/high_edge"] == pytest.approx(1.1 * centre, rel=1e-4)
        assert log[k]["epo/beta"] == pytest.approx(1 + math.exp(-3 * k / 2), abs=1e-6)
        assert 0 < log[k]["epo/below"] + log[k]["epo/above"] <= 1
        spread = torch.tensor(seen[:k]).std(correction=0)
        assert log[k]["epo/Hbar_std"] == pytest.approx(float(spread), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("extra", [{"history": "turn"}, {"penalty": "step"}, {}])
def test_accumulation_does_not_matter(tmp_path, extra):
    runs = {}
    for size in (8, 2):
        trainer = train(
            tmp_path,
            {"epo": STRONG | extra},
            max_steps=3,
            num_iterations=3,
            loss_type="grpo",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            optim="sgd",
            learning_rate=0.1,
        )
        runs[size] = weights(trainer)
    for name, value in runs[8].items():
        torch.testing.assert_close(runs[2][name], value, rtol=1e-3, atol=1e-5)


def test_several_rollouts_of_one_optimizer_step_are_one_step(tmp_path):
    kwargs = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 2}
    trainer = train(tmp_path, {"epo": STRONG}, **kwargs)
    assert len(trainer.plan.methods[0].state["means"]) == 2  # steps 0 and 1 of 3


def test_only_the_first_pass_counts(tmp_path):
    """Two passes over each rollout: 4 optimizer steps are 2 RL steps, and Hbar is the first pass's."""
    trainer = train(tmp_path, {"epo": STRONG}, max_steps=4, num_iterations=2)
    log, (method,) = trainer.state.log_history[:4], trainer.plan.methods
    assert method.state["means"] == pytest.approx([log[0]["entropy"]], rel=1e-4)
    assert "epo/Hbar" in log[0] and "epo/Hbar" not in log[1]


@pytest.mark.parametrize("history", ["step", "turn"])
def test_resume_inside_a_window_equals_not_stopping(tmp_path, history):
    settings = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    methods = {"epo": STRONG | {"history": history}}
    whole = train(tmp_path, methods, **settings)
    resumed = train(tmp_path, methods, resume=str(tmp_path / "checkpoint-3"), **settings)
    assert_equal(weights(whole), weights(resumed))
    assert resumed.plan.methods[0].state["means"] == whole.plan.methods[0].state["means"]


def test_masks_of_other_methods_do_not_touch_it(tmp_path):
    """Trained beside high_entropy, which drops most tokens, the bonus still averages over all of them."""
    both = train(tmp_path, {"high_entropy": {}, "epo": STRONG}, max_steps=1, loss_type="grpo").state.log_history[0]
    assert both["epo/L_H"] == pytest.approx(both["entropy"], rel=1e-4)  # all rows have 6 tokens


def tool_trainer(tmp_path, methods):
    """A random model that is made to call the calculator once in every second row, through TRL's own tool loop."""
    words = sandbox_tokenizer()
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12+3"}}\n</tool_call><|im_end|>'
    args = QUIET | {"output_dir": str(tmp_path), "num_generations": 4, "per_device_train_batch_size": 4}
    args |= {"max_completion_length": 96, "max_steps": 2, "loss_type": "grpo", "learning_rate": 1e-2}
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "What is 12+3?"}]}] * 4)
    trainer = trl_ext.GRPOTrainer(
        random_model(words),
        lambda completions, **kw: [float(i) for i in range(len(completions))],
        trl_ext.GRPOConfig(**args, methods=methods),
        data,
        processing_class=words,
        tools=[calculator],
    )
    first = [words(call if i % 2 else "15<|im_end|>")["input_ids"] for i in range(4)]
    last = words("the answer is 15<|im_end|>")["input_ids"]
    trainer._generate_single_turn = lambda ids, *a, num_generations=1, **k: (
        [list(row) for row in (first if len(ids) == 4 else [last] * len(ids))],
        None,
    )
    return trainer


def test_turns_through_trls_tool_loop(tmp_path, monkeypatch):
    """Rows that call the tool have two turns; L_H is the mean over rows of the mean over turns of the turn's mean."""
    seen = []
    original = trl_ext.GRPOTrainer._loss_input
    monkeypatch.setattr(trl_ext.GRPOTrainer, "_loss_input", lambda *args: seen.append(original(*args)) or seen[-1])
    trainer = tool_trainer(tmp_path, {"epo": STRONG | {"history": "turn"}})
    trainer.train()
    x, log = seen[0], trainer.state.log_history
    assert log[0]["tools/call_frequency"] == 0.5
    ids = turn_ids(x.mask)
    assert sorted(ids.amax(1).tolist()) == [0, 0, 1, 1]
    shown = trainer.processing_class.decode(x.completion_ids[ids.amax(1) == 1][0])
    assert "tool" in shown and "15" in shown
    rows = []
    for entropy, turns in zip(x.entropy.detach(), ids, strict=True):
        means = [entropy[turns == t].mean() for t in range(int(turns.max()) + 1)]
        rows.append(torch.stack(means).mean())
    assert log[0]["epo/L_H"] == pytest.approx(float(torch.stack(rows).mean()), rel=1e-4)
    (method,) = trainer.plan.methods
    by_turn = [x.entropy.detach()[ids == t].mean().item() for t in (0, 1)]
    assert method.state["by_turn"][0].tolist() == pytest.approx(by_turn, rel=1e-4)
    assert log[1]["epo/L_smooth"] > 0


@pytest.mark.parametrize(
    "settings, kwargs, words",
    [
        ({}, {"entropy_coef": 0.01}, "leave entropy_coef at 0"),
        ({}, {"use_adaptive_entropy": True}, "use_adaptive_entropy off"),
        ({"lower": 3.0}, {}, "corridor is empty"),
        ({"penalty": "hing"}, {}, "did you mean 'hinge'"),
    ],
)
def test_clashes_name_the_flag(tmp_path, settings, kwargs, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **kwargs), methods={"epo": settings})


def test_recipe_has_the_papers_numbers():
    """One optimizer step on 128 rollouts, half of them generated at a time: 150 RL steps."""
    recipe = load_recipe("epo_qwen2.5_3b", ["--use_cpu", "true"])
    (epo,), args = recipe.plan.methods, recipe.training_args
    assert (epo.coefficient, epo.lower, epo.upper, epo.alpha, epo.gamma) == (0.001, 0.0, 2.0, 0.1, 3.0)
    assert (args.epsilon, args.beta, args.num_generations, args.max_steps) == (0.2, 0.01, 8, 150)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16 * 8
    assert rl_steps(RunShape(150, 8, args.steps_per_generation / args.gradient_accumulation_steps)) == 150
